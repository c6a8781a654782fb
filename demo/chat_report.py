"""RUN/report.html of the demo that answers questions, and its stages."""

import dataclasses
import html
import json
import pathlib
from typing import Any

from data_pipelines import image_folder
from demo.answers import MEANING
from demo.pipeline import Stages
from demo.questions import SETS
from demo.report import curves, times, training_time
from tokenizer import report

STYLE = """
.right { color: #17732b; } .wrong { color: #a33; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 10px; }
.card { border: 1px solid #ddd; border-radius: 6px; padding: 8px; font-size: 13px;
        display: flex; gap: 10px; }
.card img { width: 72px; height: 72px; image-rendering: pixelated; }
"""


@dataclasses.dataclass
class ChatDemo(Stages):
    """Questions about pictures, taught to the decoder that another demo left, and answered."""

    run_dir: str
    questions: Any
    store: Any
    decoder: Any
    answer: Any
    evaluate: Any
    report: Any


@dataclasses.dataclass
class ChatReport:
    """Job: writes `run_dir`/report.html from what the other stages left there: the figures, and
    `shown` pictures of each set with what was asked and answered (the likeliest)."""

    run_dir: str
    images: str
    shown: int = 24

    def run(self) -> None:
        """Writes the page anew each time: it takes seconds."""
        run_dir = pathlib.Path(self.run_dir)
        values = json.loads((run_dir / "evaluation.json").read_text())
        answered = json.loads((run_dir / "answered.json").read_text())
        seconds = json.loads((run_dir / "seconds.json").read_text())
        parts = [
            "<h1>emu3_jax: questions about pictures</h1><p>The decoder of the demo, tuned on "
            "conversations in Emu3-Chat's prompt whose answers are made from the pictures' labels."
            "</p><h2>Figures</h2>", _meaning(),
            *(_figures(name, kinds) for name, kinds in values.items()),
        ]  # fmt: skip
        for name in ("heldout", "heldout_wording", "new_people", "train"):
            parts += [f"<h2>{SETS[name].capitalize()}</h2>",
                      self._cards([e for e in answered if e["set"] == name])]  # fmt: skip
        parts += [
            "<h2>Training</h2>", curves(self.run_dir, "decoder", ("loss_text",), "nats a token"),
            "<h2>Time</h2>", times(seconds), training_time(run_dir / "decoder"),
            "<p class=said>Pictures: OpenMoji, CC BY-SA 4.0.</p>",
        ]  # fmt: skip
        path = run_dir / "report.html"
        path.write_text(report.page("emu3_jax: questions about pictures", parts, STYLE))
        print(f"{path}: written")

    def _cards(self, entries: list[dict]) -> str:
        cards = []
        for file in list(dict.fromkeys(entry["file"] for entry in entries))[: self.shown]:
            image_HWC = image_folder.read_image(pathlib.Path(self.images, file))
            lines = "".join(_line(entry) for entry in entries if entry["file"] == file)
            cards.append(f"<div class=card><img alt='' src='{report.image_uri(image_HWC)}'>"
                         f"<div>{lines}</div></div>")  # fmt: skip
        return f"<div class=cards>{''.join(cards)}</div>"


def _line(entry: dict) -> str:
    said, right = entry["said"]["likeliest"], entry["answer"]
    state = "right" if said == right else "wrong"
    note = "" if said == right else f" <span class=said>({html.escape(right)})</span>"
    return (f"<div>{html.escape(entry['question'])} <b class={state}>{html.escape(said)}</b>"
            f"{note}</div>")  # fmt: skip


def _meaning() -> str:
    rows = "".join(f"<tr><th>{name}<td>{what}" for name, what in MEANING.items())
    return f"<table>{rows}</table>"


def _figures(name: str, kinds: dict[str, dict[str, float]]) -> str:
    """A table of a set's figures: a row a kind of question."""
    head = "".join(f"<th>{figure}" for figure in MEANING)
    rows = [f"<h3>{SETS[name].capitalize()}</h3><table><tr><th>{name}{head}"]
    for kind, values in kinds.items():
        cells = "".join(f"<td class=value>{values[figure]:.3g}" for figure in MEANING)
        rows.append(f"<tr><td><code>{kind}</code>{cells}")
    return "".join(rows) + "</table>"
