"""How well frames were predicted, beside what needs no model: RUN/evaluation.json.

B clips  T frames, H rows and W columns of pixels, C colours
"""

import collections
import dataclasses
import json
import pathlib

import numpy as np

from emu3_jax import untrusted

MEANING = {
    "predicted_psnr_db": "the model, from the caption and the first frames",
    "repeat_last_psnr_db": "the last given frame, repeated",
    "linear_psnr_db": "each pixel goes on to change as it did between the last two given frames",
    "white_psnr_db": "nothing but white, which is all that a model can do that knows no place",
    "tokenizer_psnr_db": "the real frames through the tokenizer: what no choice of codes by the "
    "model can be expected to exceed",
    "gain_db": "the model above the best of the three that need none",
    "better_share": "share of the clips in which the model is above all three",
}
BASELINES = ("repeat_last", "linear", "white")
PEAK_DB = 100.0  # for frames that are right in every pixel, which have no PSNR


@dataclasses.dataclass
class Evaluate:
    """Job: computes the figures of MEANING from what Continue left in `predicted`.

    They are given for each list, of all clips and of those of each motion. A clip's PSNR is that of
    all its predicted 8-bit pixels together, a figure the mean over clips.
    """

    predicted: str
    path: str
    lists: tuple[str, ...] = ("heldout.jsonl", "train.jsonl")

    def run(self) -> None:
        """Writes `path`, or says that it is there."""
        path = pathlib.Path(self.path)
        if path.exists():
            print(f"{path}: evaluated")
            return
        values = {pathlib.Path(name).stem: self._list(name) for name in self.lists}
        for name, groups in values.items():
            for figure, value in groups["all"].items():
                print(f"{name:8s} {figure:22s} {value:7.3f}   {MEANING[figure]}")
        path.write_text(json.dumps(values, indent=1) + "\n")

    def _list(self, name: str) -> dict[str, dict[str, float]]:
        predicted = Predicted(self.predicted, name)
        psnr = {kind: psnr_B(x, predicted.next_BTHWC) for kind, x in predicted.guesses().items()}
        members = collections.defaultdict(list, all=list(range(len(predicted.entries))))
        for index, entry in enumerate(predicted.entries):
            if "motion" in entry:
                members[entry["motion"]].append(index)
        return {group: _figures(psnr, indices) for group, indices in members.items()}


def _figures(psnr: dict[str, np.ndarray], indices: list[int]) -> dict[str, float]:
    means = {kind: float(psnr_B[indices].mean()) for kind, psnr_B in psnr.items()}
    model_B = psnr["predicted"][indices]
    other_B = np.max([psnr[name][indices] for name in BASELINES], axis=0)
    return {f"{kind}_psnr_db": mean for kind, mean in means.items()} | {
        "gain_db": means["predicted"] - max(means[name] for name in BASELINES),
        "better_share": float((model_B > other_B).mean()),
    }


class Predicted:
    """One list's part of what Continue made.

    entries      of the list
    given_BTHWC  the real frames that the model was shown, and `next_BTHWC` those after them
    """

    def __init__(self, directory: str, name: str):
        path = pathlib.Path(directory, name)
        self.entries = json.loads(path.with_suffix(".json").read_text())
        self.pixels = untrusted.read_arrays(path.with_suffix(".npz"))
        given = self.pixels["real"].shape[1] - self.pixels["predicted"].shape[1]
        self.given_BTHWC, self.next_BTHWC = np.split(self.pixels["real"], [given], axis=1)

    def guesses(self) -> dict[str, np.ndarray]:
        """What stands in for the next frames, by name; in the order of MEANING's figures."""
        given, frames = self.given_BTHWC.shape[1], self.next_BTHWC.shape[1]
        return {
            "predicted": self.pixels["predicted"],
            "repeat_last": repeat_last(self.given_BTHWC, frames),
            "linear": extrapolate(self.given_BTHWC, frames),
            "white": np.full_like(self.next_BTHWC, 255),
            "tokenizer": self.pixels["decoded"][:, given:],
        }


def repeat_last(given_BTHWC: np.ndarray, frames: int) -> np.ndarray:
    """The last frame, so many times."""
    return np.repeat(given_BTHWC[:, -1:], frames, axis=1)


def extrapolate(given_BTHWC: np.ndarray, frames: int) -> np.ndarray:
    """The straight line through the last two frames, within 0 to 255."""
    before_B1HWC, last_B1HWC = (given_BTHWC[:, i, None].astype(np.int32) for i in (-2, -1))
    ahead_T111 = np.arange(1, frames + 1)[:, None, None, None]
    line_BTHWC = last_B1HWC + ahead_T111 * (last_B1HWC - before_B1HWC)
    return np.clip(line_BTHWC, 0, 255).astype(np.uint8)


def psnr_B(guess_BTHWC: np.ndarray, real_BTHWC: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each clip in dB, at most PEAK_DB."""
    difference_BTHWC = guess_BTHWC.astype(np.float32) - real_BTHWC.astype(np.float32)
    error_B = np.square(difference_BTHWC / 255).mean(axis=(1, 2, 3, 4), dtype=np.float64)
    return -10 * np.log10(np.maximum(error_B, 10 ** (-PEAK_DB / 10)))
