"""The decoder's data: stores mixed by weight, shuffled and packed into rows.

Row i is a function of (configuration, stores, i): the same on any number of hosts and reader
threads, in any order of asking. The data state of a training run is therefore its step.

Legend: T position in a row, B rows, N documents of a store, D ids of one document.
"""

import dataclasses
import sys
from collections.abc import Sequence

import grain
import numpy as np

from data_pipelines import documents, packing, shuffle, store
from emu3_jax import vocab as vocabulary


@dataclasses.dataclass
class Component:
    """One store in one layout; `weight` is its share of the tokens, relative to the others'."""

    store: str
    layout: documents.Layout = dataclasses.field(default_factory=documents.Layout)
    weight: float = 1.0


@dataclasses.dataclass
class Mixture:
    """Packed rows of a mixture of stores.

    Rows are dictionaries of tokens, targets, segments, positions (int32) and weights (float32),
    each [length]. Segment 0 is padding; positions restart with each document; a target never
    crosses documents, so a document of n ids takes n - 1 positions. A store's documents come once
    an epoch, in another order each time.

    Documents that do not fit a row: text is split (the pieces are segments of their own), others
    are dropped and counted with too_long "drop" and are an error with "error". `window` is the
    number of rows that are packed together: larger fills better and shuffles wider, smaller plans
    faster. `vocab` is a ranks file or "emu3", `codes` its visual codes, and `tokenizer`, if
    given, the fingerprint that stores must have; in any case all must have the same.
    """

    components: tuple[Component, ...] = ()
    vocab: str = "emu3"
    codes: int = 32768
    length: int = 5120
    seed: int = 0
    window: int = 128
    too_long: str = "drop"
    tokenizer: str = ""

    def rows(self) -> grain.MapDataset:
        """The rows, without end and by any index.

        Grain's batched reads (`rows().batch(n)`) fetch all documents of a batch at once. Raises
        ValueError for a missing store or one of another vocabulary or tokenizer, a weight that is
        not positive, a row that no document fits.
        """
        return grain.MapDataset.source(PackedRows(self))

    def cursor(self, row: int) -> packing.Cursor:
        """Where planning must start to give `row`: a few integers, for a checkpoint."""
        return PackedRows(self).plan.cursor(row)

    def report(self, rows: int) -> dict[str, float]:
        """What the first `rows` rows hold: see packing.Plan.report."""
        return PackedRows(self).plan.report(rows)


class PackedRows:
    """The random-access source behind `Mixture.rows`; threads may share it."""

    def __init__(self, config: Mixture, cursor: packing.Cursor | None = None):
        self.config = config
        self.vocab = vocabulary.Vocab.load(config.vocab, config.codes)
        self.stores = _open_stores(config, self.vocab.fingerprint)
        sources = [self._source(i, c) for i, c in enumerate(config.components)]
        self.plan = packing.Plan(
            sources, config.length, config.window, config.seed, config.too_long, cursor
        )

    def _source(self, number: int, component: Component) -> packing.Source:
        opened = self.stores[component.store]
        lengths_N = documents.lengths(opened, component.layout, self.vocab)
        return packing.Source(
            name=f"{component.store} ({component.layout.name})",
            lengths_N=lengths_N,
            caption_lengths_N=opened.text_length_N,
            weight=component.weight,
            dropout=component.layout.caption_dropout,
            splits=component.layout.name == "text",
            seed=int(shuffle.hash64(self.config.seed, number)[0]),
        )

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return self._getitems([row])[0]

    def _getitems(self, rows: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Several rows with one gathered read a store (Grain's protocol for batched reads)."""
        slots = [self.plan.row(int(row)) for row in rows]
        contents = self._read(sorted({slot.document for row in slots for slot in row}))
        return [self._fill(row, contents) for row in slots]

    def _read(self, wanted: list[tuple]) -> dict[tuple, tuple]:
        """Ids and weights by (component, document, whether its caption is dropped)."""
        contents = {}
        for path, opened in self.stores.items():
            mine = [w for w in wanted if self.config.components[w[0]].store == path]
            unique_N = np.unique(np.array([index for _, index, _ in mine], np.int64))
            found = dict(zip(unique_N.tolist(), opened.read(unique_N), strict=True)) if mine else {}
            for number, index, drop in mine:
                layout = self.config.components[number].layout
                contents[number, index, drop] = documents.build(
                    found[index], layout, self.vocab, drop
                )
        return contents

    def _fill(self, slots: list[packing.Slot], contents: dict) -> dict[str, np.ndarray]:
        length = self.config.length
        row = {name: np.zeros(length, np.int32) for name in ("segments", "positions")}
        row |= {name: np.full(length, self.vocab.pad, np.int32) for name in ("tokens", "targets")}
        row["weights"] = np.zeros(length, np.float32)
        at = 0
        for segment, slot in enumerate(slots, start=1):
            ids_D, weights_D = contents[slot.document]
            here = slice(at, at + slot.count)
            row["tokens"][here] = ids_D[slot.begin : slot.begin + slot.count]
            row["targets"][here] = ids_D[slot.begin + 1 : slot.begin + slot.count + 1]
            row["weights"][here] = weights_D[slot.begin + 1 : slot.begin + slot.count + 1]
            row["segments"][here] = segment
            row["positions"][here] = np.arange(slot.count)
            at += slot.count
        return row


def _open_stores(config: Mixture, vocab: str) -> dict[str, store.Store]:
    if not config.components:
        raise ValueError("a mixture without components; name at least one store")
    for component in config.components:
        component.layout.check()
    stores = {}
    for path in dict.fromkeys(c.store for c in config.components):
        stores[path] = store.Store(path, vocab, config.tokenizer)
    made = {s.info["tokenizer"]: path for path, s in stores.items() if s.info["tokenizer"]}
    if len(made) > 1:
        (one, first), (other, second) = list(made.items())[:2]
        raise ValueError(
            f"stores {first} and {second} were made with tokenizers {one[:12]} and {other[:12]}; "
            "mix only stores of one tokenizer"
        )
    return stores
