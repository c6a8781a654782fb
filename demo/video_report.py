"""RUN/report.html of the video demo: its figures, predicted frames, and curves.

B clips  T frames, H rows and W columns of pixels, C colours
"""

import dataclasses
import html
import json
import pathlib

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image

from demo import prediction
from demo.report import curves, times, training_time
from tokenizer import report

STYLE = """
.strip { margin-bottom: 14px; font-size: 13px; }
.strip img { width: 100%; image-rendering: pixelated; display: block; }
"""
GAP = 4  # pixels between what is given and what follows
NAMES = {"heldout": "clips never seen", "train": "training clips"}


@dataclasses.dataclass
class VideoReport:
    """Job: writes `run_dir`/report.html, and sheet.png, from what the other stages left there."""

    run_dir: str
    predicted: str
    shown: int = 16

    def run(self) -> None:
        """Writes the page anew each time: it takes seconds."""
        run_dir = pathlib.Path(self.run_dir)
        values = json.loads((run_dir / "evaluation.json").read_text())
        seconds = json.loads((run_dir / "seconds.json").read_text())
        lists = {name: prediction.Predicted(self.predicted, name) for name in values}
        shown = lists["heldout"]
        given, frames = shown.given_BTHWC.shape[1], shown.next_BTHWC.shape[1]
        parts = [
            "<h1>emu3_jax video demo</h1><p>One decoder, one stream of tokens: from a caption and "
            f"{given} frames it predicts the next {frames}.</p>",
            "<h2>Figures</h2>", *(_figures(name, groups) for name, groups in values.items()),
            "<h2>Frame by frame</h2>", report.plot(_by_frame(shown), "PSNR by frame"),
            "<h2>Clips never seen</h2><p>Above, the real clip. Below, what the tokenizer keeps of "
            f"its first {given} frames, which are given, and behind the gap what the model "
            "predicts.</p>", *_strips(shown, self.shown),
            "<h2>Training</h2>",
            curves(self.run_dir, "decoder", ("loss_vision",), "nats a token"),
            curves(self.run_dir, "tokenizer", ("psnr",), "PSNR of the batch, dB"),
            "<h2>Time</h2>", times(seconds),
            *(training_time(run_dir / stage) for stage in ("tokenizer", "decoder")),
        ]  # fmt: skip
        path = run_dir / "report.html"
        path.write_text(report.page("emu3_jax video demo", parts, STYLE))
        sheet = [np.pad(strip(shown, i), ((0, GAP), (0, 0), (0, 0)), constant_values=255)
                 for i in range(min(8, len(shown.entries)))]  # fmt: skip
        PIL.Image.fromarray(_enlarged(np.concatenate(sheet))).save(run_dir / "sheet.png")
        print(f"{path}: written")


def strip(predicted: prediction.Predicted, index: int) -> np.ndarray:
    """A clip over what was given and predicted of it -> uint8 strip_HWC."""
    given = predicted.given_BTHWC.shape[1]
    real_THWC, decoded_THWC = (predicted.pixels[name][index] for name in ("real", "decoded"))
    made_THWC = np.concatenate([decoded_THWC[:given], predicted.pixels["predicted"][index]])
    rows = []
    for x_THWC in (real_THWC, made_THWC):
        gap_HWC = np.full((x_THWC.shape[1], GAP, 3), 160, np.uint8)
        rows.append(np.concatenate([*x_THWC[:given], gap_HWC, *x_THWC[given:]], axis=1))
    return np.concatenate(rows)


def _strips(predicted: prediction.Predicted, count: int) -> list[str]:
    return [
        f"<div class=strip>{html.escape(entry['caption'])}"
        f"<img alt='real over predicted' src='{report.image_uri(strip(predicted, i))}'></div>"
        for i, entry in enumerate(predicted.entries[:count])
    ]


def _enlarged(image_HWC: np.ndarray) -> np.ndarray:
    return image_HWC.repeat(2, axis=0).repeat(2, axis=1)


def _figures(name: str, groups: dict[str, dict[str, float]]) -> str:
    """A table of the figures of a list: a column a group of clips."""
    rows = [f"<h3>{NAMES[name].capitalize()}</h3><table><tr><th>figure"
            + "".join(f"<th>{html.escape(group)}" for group in groups)
            + "<th>what it means"]  # fmt: skip
    for figure, meaning in prediction.MEANING.items():
        cells = "".join(f"<td class=value>{values[figure]:.2f}" for values in groups.values())
        rows.append(f"<tr><td><code>{figure}</code>{cells}<td>{meaning}")
    return "".join(rows) + "</table>"


def _by_frame(predicted: prediction.Predicted):
    """PSNR of each predicted frame, of the mean error over all clips: so a still clip counts."""
    figure, axes = plt.subplots(figsize=(9, 3), layout="constrained")
    real_BTHWC = predicted.next_BTHWC.astype(np.float32)
    for name, x_BTHWC in predicted.guesses().items():
        error_T = np.square((x_BTHWC - real_BTHWC) / 255).mean(axis=(0, 2, 3, 4))
        axes.plot(np.arange(1, len(error_T) + 1), -10 * np.log10(error_T + 1e-10), label=name)
    axes.set(xlabel="frames after the last given one", ylabel="PSNR, dB")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
