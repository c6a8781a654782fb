"""What the model answers to questions about pictures, and how often that is right.

B images  H rows and W columns of pixels, C colours  h rows and w columns of codes
"""

import collections
import dataclasses
import itertools
import json
import pathlib

import numpy as np

from data_pipelines import chat, image_folder
from demo import questions
from emu3_jax.sampling import PRESETS
from inference.artist import Artist, Model

WAYS = {"likeliest": PRESETS["greedy"], "sampled": PRESETS["official"]}
MEANING = {
    "questions": "how many were asked",
    "likeliest": "the likeliest answer is right to the letter",
    "sampled": "an answer drawn from all (temperature 1) is",
    "best_constant": "chance: always the answer that is right most often here",
    "uniform": "chance: any of the answers that were taught to this kind of question",
}


@dataclasses.dataclass
class Answer:
    """Job: puts the questions of `asked` (see questions.py), each for itself, to the model.

    `path` gets the entries, with what was said under `said`, by the names of WAYS. Pictures are
    those of `images`; an answer has at most `length` ids; `batch` questions are put at a time.
    """

    model: Model
    images: str
    asked: str
    path: str
    length: int = 24
    batch: int = 64

    def run(self) -> None:
        """Writes `path`, or says that it is there."""
        path = pathlib.Path(self.path)
        if path.exists():
            print(f"{path}: answered")
            return
        asked = json.loads(pathlib.Path(self.asked).read_text())["asked"]
        with self.model.load() as artist:
            blocks = self._blocks(artist, sorted({entry["file"] for entry in asked}))
            prompts = [chat.prompt([(entry["question"], "")], artist.vocab, blocks[entry["file"]])
                       for entry in asked]  # fmt: skip
            said = {way: self._said(artist, prompts, way) for way in WAYS}
        for i, entry in enumerate(asked):
            entry["said"] = {name: texts[i] for name, texts in said.items()}
        path.write_text(json.dumps(asked, indent=1, ensure_ascii=False))

    def _blocks(self, artist: Artist, files: list[str]) -> dict[str, np.ndarray]:
        """The image block of each file."""
        folder, blocks = pathlib.Path(self.images), {}
        for part, short in _filled(files, self.batch):
            x_BHWC = np.stack([image_folder.read_image(folder / file) for file in part])
            codes_Bhw = artist.codes(x_BHWC)[:short]
            blocks |= {file: artist.vocab.image_block(codes_hw)
                       for file, codes_hw in zip(part, codes_Bhw, strict=False)}  # fmt: skip
        return blocks

    def _said(self, artist: Artist, prompts: list[list[int]], way: str) -> list[str]:
        said = []
        for part, short in _filled(prompts, self.batch):
            texts = artist.texts(part, self.length, WAYS[way])
            said += [text.strip() for text in texts[:short]]
        print(f"{len(said)} questions answered ({way})", flush=True)
        return said


def _filled(items: list, batch: int):
    """Batches of one size, and how many of each are no filling: one size is compiled for."""
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        yield part + part[-1:] * (batch - len(part)), len(part)


@dataclasses.dataclass
class Evaluate:
    """Job: writes the figures of MEANING, by set and kind of question, to `path`."""

    asked: str
    answered: str
    path: str

    def run(self) -> None:
        """Writes and prints them anew each time."""
        possible = json.loads(pathlib.Path(self.asked).read_text())["possible"]
        values = figures(json.loads(pathlib.Path(self.answered).read_text()), possible)
        for name, kinds in values.items():
            print(f"{name}: {questions.SETS[name]}")
            for kind, value in kinds.items():
                shown = "  ".join(f"{figure} {x:.3g}" for figure, x in value.items())
                print(f"  {kind:11s} {shown}")
        pathlib.Path(self.path).write_text(json.dumps(values, indent=1) + "\n")


def figures(
    answered: list[dict], possible: dict[str, list[str]]
) -> dict[str, dict[str, dict[str, float]]]:
    """The figures of MEANING, by set and kind, of the entries of Answer.

    `possible` has the answers that were taught of each kind.
    """
    groups = collections.defaultdict(list)
    for entry in answered:
        groups[entry["set"], entry["kind"]].append(entry)
    values = collections.defaultdict(dict)
    order = itertools.product(questions.SETS, questions.KINDS)
    for name, kind in (key for key in order if key in groups):
        entries = groups[name, kind]
        right = collections.Counter(entry["answer"] for entry in entries)
        values[name][kind] = (
            dict(questions=len(entries))
            | {how: float(np.mean([e["said"][how] == e["answer"] for e in entries]))
               for how in WAYS}
            | dict(best_constant=max(right.values()) / len(entries),
                   uniform=1 / len(possible[kind]))
        )  # fmt: skip
    return dict(values)
