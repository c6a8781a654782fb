"""A tiny decoder, rows without a store and a job without work: what the tests of the core use.

T position in a row, or frame of a clip  B rows  H height  W width  C colours
"""

import dataclasses
import sys

import grain
import jax
import numpy as np

from emu3_jax import data, mesh
from emu3_jax.transformer import Transformer

VOCAB, FIRST_VISUAL, PAD = 48, 32, 0


def model(**fields) -> Transformer:
    """Two layers of width 16, 4 heads over 2; large initial weights, so that attention matters."""
    sizes = dict(layers=2, width=16, heads=4, kv_heads=2, head_dim=8, ffn=24, vocab=VOCAB)
    rest = dict(first_visual=FIRST_VISUAL, init_std=0.3, dtype="float32", loss_tile=16)
    return Transformer(**sizes | rest | fields)


def pack(documents: list[list[int]], length: int) -> dict[str, np.ndarray]:
    """One row after the batch contract: a document of n ids takes n - 1 positions."""
    row = {name: np.zeros(length, np.int32) for name in ("segments", "positions")}
    row |= {name: np.full(length, PAD, np.int32) for name in ("tokens", "targets")}
    row["weights"] = np.zeros(length, np.float32)
    at = 0
    for segment, ids in enumerate(documents, start=1):
        here = slice(at, at + len(ids) - 1)
        row["tokens"][here], row["targets"][here] = ids[:-1], ids[1:]
        row["weights"][here] = np.where(np.array(ids[1:]) < FIRST_VISUAL, 1.0, 0.5)
        row["segments"][here], row["positions"][here] = segment, np.arange(len(ids) - 1)
        at = here.stop
    return row


def stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows as a batch [B, T]."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@dataclasses.dataclass
class Counting(data.Data):
    """Data: documents that count upwards in steps of 1 to 3, packed, with padding behind.

    The weights of `poisoned` rows from row `poison` on are infinite: their loss is not a number.
    """

    length: int = 16
    seed: int = 0
    poison: int = -1
    poisoned: int = 1

    def rows(self) -> grain.MapDataset:
        """Rows without end, each a function of its index."""
        return grain.MapDataset.source(_CountingRows(self))


class _CountingRows:
    def __init__(self, config: Counting):
        self.config = config

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.config.seed, int(index)))
        documents, left = [], self.config.length
        while (count := int(rng.integers(3, 9))) <= left:
            start, step = rng.integers(0, VOCAB), rng.integers(1, 4)
            documents.append([int(i) % VOCAB for i in start + step * np.arange(count + 1)])
            left -= count
        row = pack(documents, self.config.length)
        if 0 <= index - self.config.poison < self.config.poisoned and self.config.poison >= 0:
            row["weights"][row["weights"] > 0] = np.inf
        return row


@dataclasses.dataclass
class Pictures(data.Data):
    """Data: rows of an image and a clip of noise."""

    size: int = 8
    frames: int = 4

    def rows(self) -> grain.MapDataset:
        """Rows without end, each a function of its index."""
        return grain.MapDataset.range(sys.maxsize).map(self._row)

    def _row(self, index: int) -> dict[str, np.ndarray]:
        shape_THWC = (1 + self.frames, self.size, self.size, 3)
        x_THWC = np.random.default_rng(int(index)).integers(0, 256, shape_THWC, np.uint8)
        return {"image": x_THWC[0], "clip": x_THWC[1:]}


@dataclasses.dataclass
class Single(mesh.Mesh):
    """One device, for which programs are compiled sooner than for eight."""

    def make(self, devices=None, **fields) -> jax.sharding.Mesh:
        """The first device."""
        return super().make(jax.devices()[:1], **fields)


@dataclasses.dataclass
class Part:
    """A field of each kind."""

    names: tuple[str, ...] = ("a", "b")
    sizes: tuple[int, ...] = (1, 2)
    rate: float = 0.5
    wide: bool = False
    word: str = "x"
    limit: int | None = None


@dataclasses.dataclass
class Job:
    """Says what it is, or raises what it is told to."""

    part: Part = dataclasses.field(default_factory=Part)
    steps: int = 3
    parts: tuple[Part, ...] = ()
    fails: str = ""

    def run(self) -> None:
        """Prints, or raises."""
        if self.fails == "interrupt":
            raise KeyboardInterrupt
        if self.fails == "defect":
            raise TypeError("a defect")
        if self.fails:
            raise ValueError(self.fails)
        print(f"steps {self.steps}")
