"""What an evaluation adds up over a source, batch by batch, and the files that keep it.

Legend: B items of a batch (images or videos), T frames of each (1 of an image), F = B x T frames,
H rows, W columns, C colours of pixels; N codes of an item, K codes of the codebook, D features.
"""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from emu3_jax import untrusted
from tokenizer import frechet, measures

CARDS = ("worst", "best", "random")


@dataclasses.dataclass
class Judged:
    """What there is to say of a batch: pixels in 8 bits, codes, and figures of every frame.

    features: by figure, of the real and of the made frames
    """

    real_BTHWC: np.ndarray
    made_BTHWC: np.ndarray
    codes_BN: np.ndarray
    values_BT: dict[str, np.ndarray]
    features: dict[str, Sequence[np.ndarray]]


@dataclasses.dataclass
class Card:
    """One frame to look at, the middle one of a video: as it is, and as it was kept."""

    row: dict[str, Any]
    real_HWC: np.ndarray
    made_HWC: np.ndarray


@dataclasses.dataclass
class Result:
    """A source at one size: figures, a row of figures for each item, codes counted, cards by kind.

    `about` says what was measured.
    """

    figures: dict[str, float]
    rows: list[dict[str, Any]]
    count_K: np.ndarray
    cards: dict[str, list[Card]]
    about: dict = dataclasses.field(default_factory=dict)

    def write(self, path: pathlib.Path) -> None:
        """figures.json, written last, makes the folder count; values.csv has the rows."""
        path.mkdir(parents=True, exist_ok=True)
        (path / "figures.json").unlink(missing_ok=True)
        with (path / "values.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, self.rows[0])
            writer.writeheader()
            writer.writerows(self.rows)
        np.save(path / "codes.npy", self.count_K)
        pixels = {
            f"{kind}_{name}": np.stack([getattr(card, f"{name}_HWC") for card in cards])
            for kind, cards in self.cards.items() if cards for name in ("real", "made")
        }  # fmt: skip
        np.savez(path / "cards.npz", **pixels)
        cards = {kind: [card.row for card in cards] for kind, cards in self.cards.items()}
        text = json.dumps(dict(about=self.about, figures=self.figures, cards=cards), indent=1)
        (path / "figures.json").write_text(text + "\n")


def read(path: pathlib.Path) -> Result | None:
    """What `Result.write` left, without its rows; None if it did not finish."""
    if not (path / "figures.json").exists():
        return None
    values = untrusted.read_object(path / "figures.json")
    pixels = untrusted.read_arrays(path / "cards.npz")
    cards = {
        kind: [Card(row, pixels[f"{kind}_real"][i], pixels[f"{kind}_made"][i])
               for i, row in enumerate(rows)]
        for kind, rows in values["cards"].items()
    }  # fmt: skip
    count_K = np.load(path / "codes.npy", mmap_mode="r")  # mapped, it is no larger than its file
    return Result(values["figures"], [], count_K, cards, values["about"])


class Tally:
    """Adds up batches. Of each item it keeps a row of figures, of pixels only the cards'."""

    def __init__(self, codebook_size: int, shown: int, total: int):
        self._shown = shown
        self._random = set(np.random.default_rng(0).permutation(total)[:shown].tolist())
        self._rows: list[dict[str, Any]] = []
        self._cards: dict[str, list[Card]] = {kind: [] for kind in CARDS}
        self._count_K = np.zeros(codebook_size, np.int64)
        self._pixels = 0
        self._statistics: dict[str, list[frechet.Statistics]] = {}

    @property
    def count(self) -> int:
        """Items so far."""
        return len(self._rows)

    def add(self, keys: Sequence[str], judged: Judged) -> None:
        """Counts the first len(keys) items of a batch; the others only fill it up."""
        B, T = len(keys), judged.real_BTHWC.shape[1]
        self._pixels += judged.real_BTHWC[:B, ..., 0].size
        self._count_K += np.bincount(judged.codes_BN[:B].ravel(), minlength=len(self._count_K))
        for name, pair in judged.features.items():
            if name not in self._statistics:
                self._statistics[name] = [frechet.Statistics(f_FD.shape[1]) for f_FD in pair]
            for statistics, f_FD in zip(self._statistics[name], pair, strict=True):
                statistics.add(f_FD[: B * T])
        for b, key in enumerate(keys):
            values = {name: float(v_BT[b].mean()) for name, v_BT in judged.values_BT.items()}
            pair = judged.real_BTHWC[b, T // 2], judged.made_BTHWC[b, T // 2]
            self._add_row(Card({"key": key, **values}, *(x_HWC.copy() for x_HWC in pair)))

    def _add_row(self, card: Card) -> None:
        if self.count in self._random:
            self._cards["random"].append(card)
        self._rows.append(card.row)
        for kind, sign in (("worst", 1), ("best", -1)):
            cards = [*self._cards[kind], card]
            cards.sort(key=lambda card, sign=sign: sign * card.row["psnr_db"])
            self._cards[kind] = cards[: self._shown]

    def finish(self) -> Result:
        """The figures of all that was added, of at least one item."""
        names = [name for name in self._rows[0] if name != "key"]
        figures = {name: float(np.mean([row[name] for row in self._rows])) for name in names}
        for name, (real, made) in self._statistics.items():
            if real.count > 1:  # one image has no covariance
                figures[name] = frechet.distance(real, made)
        tokens = int(self._count_K.sum())
        figures |= {
            "codebook_usage": measures.usage(self._count_K),
            "perplexity": measures.perplexity(self._count_K),
            "entropy_bits": measures.entropy_bits(self._count_K),
            "bits_per_pixel": measures.bits_per_pixel(len(self._count_K), tokens, self._pixels),
            "tokens": tokens,
            "count": len(self._rows),
        }
        return Result(figures, self._rows, self._count_K, self._cards)
