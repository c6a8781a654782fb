"""A packed row taken apart: its documents, their pieces, each target's role, and what is wrong.

All of it is found in the row itself, as the model gets it, not in the plan that made it.

Legend: T position in a row, D ids of one document; t h w the grid of codes.
"""

import collections
import dataclasses
from collections.abc import Iterator

import numpy as np

from emu3_jax import vocab as vocabulary

ROLES = ("text", "meta", "codes", "breaks")  # as in documents.py


@dataclasses.dataclass
class Run:
    """Ids of text that weigh alike as targets, or a special id, once or several times."""

    text: str
    special: bool
    weight: float


@dataclasses.dataclass
class Block:
    """An image (`fps` 0) or a video, what its head says, and the weights of its ids by role."""

    head: str
    codes_thw: np.ndarray
    fps: float
    weights: dict[str, list[float]]


@dataclasses.dataclass
class Broken:
    """Ids that no document has, and why."""

    reason: str


@dataclasses.dataclass
class Document:
    """Positions [begin, begin + count) of a row: a document, or a piece of a text that was split.

    `starts` and `ends` tell whether BOS and EOS are there.
    """

    begin: int
    count: int
    starts: bool
    ends: bool
    pieces: list[Run | Block | Broken]

    @property
    def form(self) -> str:
        """What follows what, as in "text, image"."""
        names = []
        for piece in self.pieces:
            if isinstance(piece, Run) and piece.special:
                continue
            name = type(piece).__name__.lower().replace("run", "text")
            if isinstance(piece, Block):
                name = "video" if piece.fps else "image"
            names += [name] if names[-1:] != [name] else []
        whole = self.starts and self.ends
        return (", ".join(names) or "nothing") + ("" if whole else " (split)")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong at a position of a row."""

    position: int
    reason: str


@dataclasses.dataclass
class Row:
    """`targets` counts those of each (role, weight); `padding` positions at the end are unused."""

    documents: list[Document]
    problems: list[Problem]
    targets: collections.Counter
    padding: int
    segments_T: np.ndarray
    weights_T: np.ndarray


def take_apart(row: dict[str, np.ndarray], vocab: vocabulary.Vocab) -> Row:
    """A row of the mixture's, checked against the contract that training relies on.

    Positions count from 0 in each document, a target is the next id of the same document, segments
    are numbered 1, 2, ... with padding (0) behind them, and images and frames are whole.
    """
    documents, targets = [], collections.Counter()
    problems = list(_order(row["segments"]))
    for begin, end in _stretches(row["segments"]):
        ids_D = np.append(row["tokens"][begin:end], row["targets"][end - 1])
        # The first id is no target here: it is BOS, or the piece before had it.
        weights_D = np.append(0, row["weights"][begin:end])
        roles_D = _roles(ids_D, vocab)
        pieces = list(_pieces(ids_D, weights_D, roles_D, vocab))
        starts, ends = bool(ids_D[0] == vocab.bos), bool(ids_D[-1] == vocab.eos)
        documents.append(Document(begin, end - begin, starts, ends, pieces))
        targets.update(zip(roles_D[1:].tolist(), weights_D[1:].tolist(), strict=True))
        problems += _wrong(row, begin, end, vocab)
        problems += [Problem(begin, p.reason) for p in pieces if isinstance(p, Broken)]
    unused_T = row["segments"] == 0
    for name, nothing in (("targets", vocab.pad), ("weights", 0)):
        for position in np.flatnonzero(unused_T & (row[name] != nothing))[:1]:
            found = row[name][position]
            problems.append(Problem(int(position), f"padding has {found} for its {name[:-1]}"))
    return Row(
        documents, problems, targets, int(unused_T.sum()), row["segments"], row["weights"]
    )  # fmt: skip


def _stretches(segments_T: np.ndarray) -> list[tuple[int, int]]:
    """[begin, end) of the positions of each segment."""
    edges = np.flatnonzero(np.diff(segments_T)) + 1
    bounds = [0, *edges.tolist(), len(segments_T)]
    return [
        (begin, end) for begin, end in zip(bounds, bounds[1:], strict=False) if segments_T[begin]
    ]


def _order(segments_T: np.ndarray) -> Iterator[Problem]:
    used = int(np.flatnonzero(segments_T).max(initial=-1)) + 1
    steps_T = np.diff(segments_T[:used], prepend=0)
    wrong_T = (steps_T < 0) | (steps_T > 1)
    wrong_T[:1] = steps_T[:1] != 1
    for position in np.flatnonzero(wrong_T)[:1]:
        before = f"follows {segments_T[position - 1]}" if position else "stands first"
        found = f"segment {segments_T[position]} {before}"
        yield Problem(int(position), f"{found}; they count 1, 2, ... with padding behind")


def _wrong(
    row: dict[str, np.ndarray], begin: int, end: int, vocab: vocabulary.Vocab
) -> Iterator[Problem]:
    """What is wrong with the targets, positions and weights of one document."""
    tokens_D, targets_D = row["tokens"][begin:end], row["targets"][begin:end]
    for at in np.flatnonzero(targets_D[:-1] != tokens_D[1:])[:1]:
        pair = [vocab.decode([i]) for i in (targets_D[at], tokens_D[at + 1])]
        yield Problem(begin + int(at), f"its target is {pair[0]!r}, the id after it {pair[1]!r}")
    last, follows = targets_D[-1], row["segments"][end : end + 1].any()
    if last == vocab.bos or (follows and last == row["tokens"][end]):
        name = vocab.decode([last])
        yield Problem(end - 1, f"its target {name!r} crosses into the next document")
    elif last == vocab.pad:
        yield Problem(end - 1, "its target is padding")
    for at in np.flatnonzero(row["positions"][begin:end] != np.arange(end - begin))[:1]:
        found = row["positions"][begin + at]
        yield Problem(begin + int(at), f"its position is {found}, not {at}")
    for at in np.flatnonzero(~(row["weights"][begin:end] >= 0))[:1]:
        yield Problem(begin + int(at), f"its weight is {row['weights'][begin + at]}")


def _roles(ids_D: np.ndarray, vocab: vocabulary.Vocab) -> np.ndarray:
    boi_D, img_D = ids_D == vocab.boi, ids_D == vocab.img
    head_D = np.cumsum(boi_D) > np.cumsum(img_D)
    roles_D = np.where(head_D | img_D | (ids_D == vocab.eoi), "meta", "text").astype("U6")
    roles_D[(ids_D == vocab.eol) | (ids_D == vocab.eof)] = "breaks"
    roles_D[ids_D >= vocab.visual] = "codes"
    return roles_D


def _pieces(
    ids_D: np.ndarray, weights_D: np.ndarray, roles_D: np.ndarray, vocab: vocabulary.Vocab
) -> Iterator[Run | Block | Broken]:
    cuts = np.flatnonzero(ids_D == vocab.boi).tolist()
    cuts += (np.flatnonzero(ids_D == vocab.eoi) + 1).tolist()
    bounds = sorted({0, len(ids_D), *cuts})
    for begin, end in zip(bounds, bounds[1:], strict=False):
        here = slice(begin, end)
        try:
            parsed = vocab.parse(ids_D[here])
        except ValueError as error:
            yield Broken(str(error))
            continue
        if ids_D[begin] != vocab.boi:
            yield from _runs(ids_D[here], weights_D[here], vocab)
            continue
        block, weights = parsed[0], {}
        head = vocab.decode(ids_D[begin + 1 : begin + int((ids_D[here] == vocab.img).argmax())])
        for role in ROLES:
            weights[role] = np.unique(weights_D[here][roles_D[here] == role]).tolist()
        if isinstance(block, vocabulary.Video):
            yield Block(head, block.codes_thw, block.fps, weights)
        else:
            yield Block(head, block.codes_hw[None], 0.0, weights)


def _runs(ids_D: np.ndarray, weights_D: np.ndarray, vocab: vocabulary.Vocab) -> Iterator[Run]:
    names = {vocab.bos: "BOS", vocab.eos: "EOS", vocab.pad: "PAD"}
    special_D = ids_D >= vocab.text_size
    new_D = (special_D[1:] | special_D[:-1]) & (ids_D[1:] != ids_D[:-1])
    new_D |= weights_D[1:] != weights_D[:-1]
    bounds = [0, *(np.flatnonzero(new_D) + 1).tolist(), len(ids_D)]
    for begin, end in zip(bounds, bounds[1:], strict=False):
        first, special = int(ids_D[begin]), bool(special_D[begin])
        text = vocab.decode(ids_D[begin : begin + 1 if special else end])
        text = names[first] if first in names else text
        text += f" x {end - begin:,}" if special and end - begin > 1 else ""
        yield Run(text, special, float(weights_D[begin]))
