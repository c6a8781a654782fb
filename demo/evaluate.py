"""What the demo must show, as figures: RUN/evaluation.json.

B images  H rows and W columns of pixels, C colours  P pixels and colours of a small image
"""

import dataclasses
import json
import pathlib

import numpy as np

from data_pipelines import image_folder, openmoji
from emu3_jax import untrusted
from tokenizer import convert, evaluate

MEANING = {
    "tokenizer_psnr_db": "reconstruction of images the tokenizer never saw: mean over images of "
    "the peak signal-to-noise ratio of 8-bit pixels, in dB",
    "codebook_usage": "share of the codebook that those images use",
    "text_to_image_top1_train": "drawn from training captions: the nearest of all real pictures, "
    "by pixels at 16x16, is the one asked for",
    "text_to_image_heldout_skin_tone": "drawn from captions never seen, a known person in a known "
    "skin tone: the nearest of that person's five real tones is the one asked for (chance 0.2)",
    "caption_exact_train": "captions of training images that are right to the letter",
    "caption_exact_heldout": "the same for pictures never seen, a known person in a known tone",
}


@dataclasses.dataclass
class Evaluate:
    """Job: computes the figures of MEANING from what Draw left in `drawn`."""

    images: str
    tokenizer: str
    drawn: str
    path: str
    batch: int = 100

    def run(self) -> None:
        """Writes `path`, or says that it is there."""
        path = pathlib.Path(self.path)
        if path.exists():
            print(f"{path}: evaluated")
            return
        psnr, usage = self._tokenizer()
        train, heldout = (
            Drawn(self.drawn, name) for name in ("train.jsonl", "heldout_skin_tone.jsonl")
        )
        every = image_folder.ImageFolder(self.images, "captions.jsonl")
        real_BP = small(np.stack([record.image_HWC for record in every]))
        values = dict(
            tokenizer_psnr_db=psnr,
            codebook_usage=usage,
            text_to_image_top1_train=float(np.mean(nearest(train, every, real_BP))),
            text_to_image_heldout_skin_tone=float(np.mean(right_tone(heldout, every, real_BP))),
            caption_exact_train=train.exact_captions(),
            caption_exact_heldout=heldout.exact_captions(),
        )
        for name, value in values.items():
            print(f"{name:34s} {value:7.3f}   {MEANING[name]}")
        path.write_text(json.dumps(values, indent=1) + "\n")

    def _tokenizer(self) -> tuple[float, float]:
        """(PSNR in dB, share of codes used) on the images held out from the tokenizer."""
        folder = image_folder.ImageFolder(self.images, "tokenizer_heldout.jsonl")
        job = evaluate.Evaluate(batch=self.batch, shown=0)
        judges = evaluate.Judges({}, figures=())
        size = len(folder[0].image_HWC)
        figures = evaluate.measure(
            job, convert.load(self.tokenizer), judges, folder, "images", size
        ).figures
        return figures["psnr_db"], figures["codebook_usage"]


class Drawn:
    """One list's part of what Draw made: entries, and pixels by name (real, decoded, drawn)."""

    def __init__(self, directory: str, name: str):
        path = pathlib.Path(directory, name)
        self.entries = json.loads(path.with_suffix(".json").read_text())
        self.pixels = untrusted.read_arrays(path.with_suffix(".npz"))

    def exact_captions(self) -> float:
        """The share of captions that are right to the letter."""
        return float(np.mean([entry["said"] == entry["caption"] for entry in self.entries]))


def small(image_BHWC: np.ndarray, side: int = 16) -> np.ndarray:
    """Images reduced to side x side by averaging, as float32 vectors [B, P]."""
    B, H, W, C = image_BHWC.shape
    if H % side or W % side:
        raise ValueError(f"images of {H}x{W} do not reduce to {side}x{side} by whole pixels")
    blocks = image_BHWC.astype(np.float32).reshape(B, side, H // side, side, W // side, C)
    return blocks.mean(axis=(2, 4)).reshape(B, -1)


def nearest(drawn: Drawn, every, real_BP: np.ndarray) -> list[bool]:
    """Whether each drawn image is nearer to the picture asked for than to any other."""
    files = [entry["file"] for entry in every.entries]
    found = []
    for entry, image_P in zip(drawn.entries, small(drawn.pixels["drawn"]), strict=True):
        distance_B = np.sum((real_BP - image_P) ** 2, axis=1)
        found.append(files[int(distance_B.argmin())] == entry["file"])
    return found


def right_tone(drawn: Drawn, every, real_BP: np.ndarray) -> list[bool]:
    """Whether, of the same person's five tones, the one asked for is the nearest."""
    asked = {entry["file"]: entry for entry in every.entries}
    found = []
    for entry, image_P in zip(drawn.entries, small(drawn.pixels["drawn"]), strict=True):
        family = asked[entry["file"]]["family"]
        five = [i for i, e in enumerate(every.entries)
                if e["family"] == family and e["tone"] in openmoji.TONES]  # fmt: skip
        distance_B = np.sum((real_BP[five] - image_P) ** 2, axis=1)
        found.append(every.entries[five[int(distance_B.argmin())]]["file"] == entry["file"])
    return found
