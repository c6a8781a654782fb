"""RUN/report.html: one self-contained page with the demo's figures, pictures and curves.

H rows and W columns of pixels, C colours
"""

import dataclasses
import html
import json
import pathlib

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image

from demo import evaluate
from emu3_jax import goodput, metrics
from tokenizer import report

AIMS = {  # what the demo is asked to reach
    "tokenizer_psnr_db": 22.0,
    "codebook_usage": 0.8,
    "text_to_image_top1_train": 0.9,
    "text_to_image_heldout_skin_tone": 0.7,
    "caption_exact_train": 0.6,
}
STYLE = """
.hit { color: #17732b; } .miss { color: #a33; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 10px; }
.card { border: 1px solid #ddd; border-radius: 6px; padding: 8px; font-size: 13px; }
.card img { width: 68px; height: 68px; image-rendering: pixelated; margin-right: 4px; }
"""


@dataclasses.dataclass
class Report:
    """Job: writes `run_dir`/report.html, and sheet.png, from what the other stages left there."""

    run_dir: str
    drawn: str
    shown: int = 24

    def run(self) -> None:
        """Writes the page anew each time: it takes seconds."""
        run_dir = pathlib.Path(self.run_dir)
        values = json.loads((run_dir / "evaluation.json").read_text())
        seconds = json.loads((run_dir / "seconds.json").read_text())
        parts = [
            "<h1>emu3_jax demo</h1><p>One decoder, one stream of tokens: it draws pictures from "
            "captions and writes captions for pictures.</p>",
            "<h2>Figures</h2>", _figures(values),
            "<h2>Never seen together</h2><p>These people and these skin tones were in the training "
            "set, but not in this combination. From left to right: the real picture, what the "
            "tokenizer keeps of it, what the model draws from the caption alone.</p>",
            _cards(evaluate.Drawn(self.drawn, "heldout_skin_tone.jsonl"), self.shown),
            "<h2>Training captions</h2><p>The same three pictures, for captions that were learnt."
            "</p>", _cards(evaluate.Drawn(self.drawn, "train.jsonl"), self.shown),
            "<h2>Training</h2>",
            curves(self.run_dir, "decoder", ("loss_text", "loss_vision"), "nats a token"),
            curves(self.run_dir, "tokenizer", ("psnr",), "PSNR of the batch, dB"),
            "<h2>Time</h2>", times(seconds),
            *(training_time(run_dir / stage) for stage in ("tokenizer", "decoder")),
            "<p class=said>Pictures: OpenMoji, CC BY-SA 4.0.</p>",
        ]  # fmt: skip
        path = run_dir / "report.html"
        path.write_text(report.page("emu3_jax demo", parts, STYLE))
        sheets = [evaluate.Drawn(self.drawn, f"{name}.jsonl") for name in
                  ("heldout_skin_tone", "train")]  # fmt: skip
        PIL.Image.fromarray(_sheet(sheets, columns=12)).save(run_dir / "sheet.png")
        print(f"{path}: written")


def _figures(values: dict[str, float]) -> str:
    rows = ["<table><tr><th>figure<th>value<th>aim<th>what it means"]
    for name, value in values.items():
        aim = AIMS.get(name)
        state = "" if aim is None else "hit" if value >= aim else "miss"
        rows.append(
            f"<tr><td><code>{name}</code><td class={state or 'none'}>{value:.3f}"
            f"<td>{'' if aim is None else aim}<td>{evaluate.MEANING[name]}"
        )
    return "".join(rows) + "</table>"


def _cards(drawn: evaluate.Drawn, count: int) -> str:
    cards = []
    for i, entry in enumerate(drawn.entries[:count]):
        images = "".join(
            f"<img title={kind} alt={kind} src='{report.image_uri(drawn.pixels[kind][i])}'>"
            for kind in ("real", "decoded", "drawn")
        )
        cards.append(
            f"<div class=card>{images}<br>{html.escape(entry['caption'])}"
            f"<div class=said>says: {html.escape(entry['said'])}</div></div>"
        )
    return f"<div class=cards>{''.join(cards)}</div>"


def _sheet(lists: list[evaluate.Drawn], columns: int, scale: int = 2) -> np.ndarray:
    """Rows of real pictures over drawn ones, two pairs of rows a list -> uint8 sheet_HWC."""
    rows = []
    for drawn in lists:
        for start in (0, columns):
            for kind in ("real", "drawn"):
                shown = drawn.pixels[kind][start : start + columns]
                blank = np.full((columns - len(shown), *shown.shape[1:]), 255, np.uint8)
                rows.append(np.concatenate([*shown, *blank], axis=1))
    return np.concatenate(rows).repeat(scale, axis=0).repeat(scale, axis=1)


def curves(run_dir: str, stage: str, names: tuple[str, ...], unit: str) -> str:
    """A plot of metrics of a stage's training."""
    records = metrics.read(str(pathlib.Path(run_dir, stage)))
    figure, axes = plt.subplots(figsize=(9, 3), layout="constrained")
    for name in names:
        points = [(r["step"], r[name]) for r in records if name in r]
        axes.plot(*zip(*points, strict=True), label=name)
    axes.set(title=stage, xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    axes.legend()
    return report.plot(figure, stage)


def times(seconds: dict[str, float]) -> str:
    """A table of what each stage took."""
    rows = [f"<tr><td>{stage}<td>{metrics.time_left(s)}" for stage, s in seconds.items()]
    total = f"<tr><th>all<th>{metrics.time_left(sum(seconds.values()))}"
    return f"<table><tr><th>stage<th>time{''.join(rows)}{total}</table>"


def training_time(run_dir: pathlib.Path) -> str:
    """Where the time of a training run went."""
    text = html.escape(goodput.table(goodput.read(str(run_dir))))
    return f"<h3>Training of the {run_dir.name}</h3><pre>{text}</pre>"
