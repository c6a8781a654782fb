"""The decoder's data: stores mixed by weight, shuffled and packed into rows.

Row i is a function of (configuration, stores, i): the same on any number of hosts and reader
threads, in any order of asking. The data state of a training run is therefore its row, and, so
that planning need not begin at the first one, a cursor of a few integers.

Legend: T position in a row, B rows, M documents or pieces of such, S slots.
"""

import dataclasses
import hashlib
import pathlib
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from data_pipelines import documents, packing, shuffle, store
from emu3_jax import config as config_lib
from emu3_jax import data
from emu3_jax import vocab as vocabulary

UNREADABLE = ("stop", "skip")


@dataclasses.dataclass
class Component:
    """One store in one layout; `weight` is its share of the tokens, relative to the others'.

    `name` tells it apart; "" means "DIRECTORY (LAYOUT)", of the store's path the last part. The
    order of its documents follows from it, and one that keeps its name keeps its place in them
    when the mixture changes or the store has moved.
    """

    store: str
    layout: documents.Layout = dataclasses.field(default_factory=documents.Layout)
    weight: float = 1.0
    name: str = ""

    @property
    def title(self) -> str:
        """Its name."""
        return self.name or f"{pathlib.PurePath(self.store).name} ({self.layout.name})"


@dataclasses.dataclass
class Stage:
    """From a training step on, the weights of all components, in their order; 0 leaves one out."""

    step: int
    weights: tuple[float, ...] = ()


@dataclasses.dataclass
class Mixture(data.Data):
    """Packed rows of a mixture of stores.

    Rows are dictionaries of tokens, targets, segments, positions (int32) and weights (float32),
    each [length]. Segment 0 is padding; positions restart with each document; a target never
    crosses documents, so a document of n ids takes n - 1 positions. A store's documents come once
    an epoch, in another order each time.

    Documents that do not fit a row: text is split (the pieces are segments of their own). Others
    are dropped and counted with too_long "drop" and are an error with "error"; with "truncate"
    captions are cut until they fit, and what has no room for its image is dropped. `window` is the
    number of rows that are packed together: larger fills better and shuffles wider, smaller plans
    faster. `vocab` is a ranks file or "emu3", `codes` its visual codes, and `tokenizer`, if
    given, the fingerprint that stores must have; in any case all must have the same.

    `schedule` changes the weights at steps: in each case from the first window on that begins
    there or later. A run that goes on with other components or weights finishes the window it is
    in as it was planned; then each component that was there before goes on with the documents it
    has not given yet. `unreadable` says what happens to documents of a part that cannot be read
    any more: "stop", or "skip", which leaves their places empty and counts them.
    """

    components: tuple[Component, ...] = ()
    vocab: str = "emu3"
    codes: int = 32768
    length: int = 5120
    seed: int = 0
    window: int = 128
    too_long: str = "drop"
    tokenizer: str = ""
    schedule: tuple[Stage, ...] = ()
    unreadable: str = "stop"

    def rows(self) -> grain.MapDataset:
        """The rows, without end and by any index; a schedule counts them as steps of one.

        Raises ValueError for a missing store or one of another vocabulary or tokenizer, a weight
        that is not positive, a row that no document fits.
        """
        return self.open(1).dataset

    def open(
        self, batch: int, state: dict | None = None, positions: data.Positions | None = None
    ) -> "MixtureRows":
        """The rows for steps of `batch` of them; see data.Data.open."""
        return MixtureRows(self, batch, state, positions)

    def report(self, rows: int) -> dict[str, float]:
        """What the first `rows` rows hold: see packing.Plan.report."""
        return self.open(1).figures(rows)


class MixtureRows(data.Rows):
    """An opened mixture, perhaps after the rest of a window that another one planned."""

    def __init__(
        self, config: Mixture, batch: int, state: dict | None, positions: data.Positions | None
    ):
        self._eras = _eras(config, batch, state, positions)
        super().__init__(grain.MapDataset.source(_Single(self)), batch, state, positions)

    def block(self, first: int, count: int) -> dict[str, np.ndarray]:
        """Rows first ... first + count - 1, [B, T]: all documents of a store in one read."""
        rows, blocks = range(first, first + count), []
        while rows:
            packed = _at(self._eras, rows[0])[1]
            mine = [row for row in rows if _at(self._eras, row)[1] is packed]
            blocks.append(packed.read(mine))
            rows = rows[len(mine) :]
        return {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}

    def state(self, step: int) -> dict:
        """The cursor of the window in which `step` begins, and how that was planned."""
        state = super().state(step)
        return state | _at(self._eras, state["row"])[1].state(state["row"])

    def figures(self, step: int) -> dict[str, float]:
        """See packing.Plan.report; `unreadable` counts documents left out by this process."""
        row = self.row(step)
        packed = _at(self._eras, max(0, row - 1))[1]
        return packed.plan.report(row) | {"unreadable": sum(p.lost for _, p in self._eras)}


def _eras(config: Mixture, batch: int, state: dict | None, positions) -> list[tuple]:
    """(first row, PackedRows) of the mixtures that rows from the saved state on come of."""
    steps = batch, data.origin(batch, state)
    if not state:
        return [(0, PackedRows(config, *steps, {}, positions))]
    plan = state["plan"]
    then = plan["batch"], tuple(plan["origin"])
    rest = PackedRows(_same_rows(plan["mixture"], config), *then, state["cursor"], positions)
    eras = [(state["cursor"]["row"], rest)]
    if (plan["mixture"], then) != (config_lib.to_json(config), steps):
        row = rest.plan.after(state["row"]).row
        cursor = rest.state(row)["cursor"] | {"stage": -1}
        eras.append((row, PackedRows(config, *steps, cursor, positions)))
    return eras


def _same_rows(saved: dict, config: Mixture) -> Mixture:
    """The saved mixture; ValueError if its rows are not of the kind that `config` has."""
    planned = config_lib.from_json(saved)
    for name in ("length", "seed", "vocab", "codes", "tokenizer"):
        was, now = getattr(planned, name), getattr(config, name)
        if was != now:
            raise ValueError(
                f"data.{name} is {now!r}, the run has {was!r}; begin another run with this one as "
                "its initial to change it"
            )
    return planned


def _at(eras: list[tuple], row: int) -> tuple:
    return [era for era in eras if era[0] <= row or era is eras[0]][-1]


class _Single:
    """Rows one by one, as a source for Grain."""

    def __init__(self, rows: MixtureRows):
        self._rows = rows

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return {name: x_BT[0] for name, x_BT in self._rows.block(int(row), 1).items()}


class PackedRows:
    """The rows of one mixture; threads may share it.

    plan   which documents stand where
    lost   how many documents could not be read, and were left out
    """

    def __init__(
        self, config: Mixture, batch: int, origin: tuple[int, int], cursor: dict,
        positions: data.Positions | None,
    ):  # fmt: skip
        self.config, self._batch, self._origin = config, batch, origin
        self._positions = positions or data.Positions(0, config.length, config.length)
        self._vocab = vocabulary.Vocab.load(config.vocab, config.codes)
        _check(config)
        stores = _open_stores(config, self._vocab.fingerprint)
        self._writers = [
            documents.Writer(stores[c.store], c.layout, self._vocab) for c in config.components
        ]
        sources = [
            _source(c, stores[c.store], writer.lengths_N, config.seed)
            for c, writer in zip(config.components, self._writers, strict=True)
        ]
        self.plan = packing.Plan(
            sources, _stages(config, batch, origin), config.length, config.window, config.seed,
            config.too_long, self._cursor(cursor),
        )  # fmt: skip
        self.lost, self._told, self._lock = 0, set(), threading.Lock()

    def state(self, row: int) -> dict:
        """What is needed to plan on from the window that holds `row`."""
        cursor = dataclasses.asdict(self.plan.cursor(row))
        titles = [component.title for component in self.config.components]
        cursor["sources"] = self._others | dict(zip(titles, cursor["sources"], strict=True))
        plan = dict(mixture=config_lib.to_json(self.config), batch=self._batch)
        return dict(cursor=cursor, plan=plan | dict(origin=list(self._origin)))

    def _cursor(self, saved: dict) -> packing.Cursor:
        """The saved cursor; what it holds of components that are not there now is kept apart."""
        place = dict(saved)
        self._others = dict(place.pop("sources", {}))
        mine = [self._others.pop(c.title, {}) for c in self.config.components]
        return packing.Cursor(**place, sources=tuple(packing.Taken(**one) for one in mine))

    def read(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """These rows [B, T] (of the positions asked for), all documents of a store in one go."""
        slots = self.plan.rows(rows)
        here = self._positions
        slots = slots[(slots.at_S < here.high) & (slots.at_S + slots.count_S > here.low)]
        filled = self._empty(len(rows))
        started = []
        for number in np.unique(slots.source_S):
            mine = slots[slots.source_S == number]
            started.append((number, mine, self._start(number, mine)))
        for number, mine, wait in started:
            self._fill(filled, mine, *self._wait(number, mine, wait))
        return filled

    def _empty(self, rows: int) -> dict[str, np.ndarray]:
        shape = (rows, self._positions.high - self._positions.low)
        filled = {name: np.zeros(shape, np.int32) for name in ("segments", "positions")}
        pad = self._vocab.pad
        filled |= {name: np.full(shape, pad, np.int32) for name in ("tokens", "targets")}
        return filled | {"weights": np.zeros(shape, np.float32)}

    def _start(self, number: int, slots: packing.Slots) -> Callable:
        columns = slots.index_S, slots.last_S, slots.begin_S, slots.count_S
        return self._writers[number].start(*columns)

    def _wait(self, number: int, slots: packing.Slots, wait: Callable) -> tuple:
        """Ids and weights of the slots, end to end; the policy says what a damaged part does."""
        try:
            return wait()
        except store.StoreError as error:
            if self.config.unreadable == "stop":
                raise
            if len(slots) > 1:
                one = [slots[i : i + 1] for i in range(len(slots))]
                found = [self._wait(number, s, self._start(number, s)) for s in one]
                return tuple(np.concatenate(column) for column in zip(*found, strict=True))
            with self._lock:
                self.lost += 1
                if str(error) not in self._told:
                    print(f"skipped: {error}", file=sys.stderr)
                    self._told.add(str(error))
            empty = int(slots.count_S[0]) + 1
            return np.full(empty, self._vocab.pad, np.int32), np.zeros(empty, np.float32)

    def _fill(self, filled: dict, slots: packing.Slots, ids_E, weights_E) -> None:
        here = self._positions
        places_T = np.arange(here.length, dtype=np.int32)
        end = 0
        columns = slots.row_S, slots.at_S, slots.count_S, slots.segment_S
        for row, at, count, segment in zip(*(c.tolist() for c in columns), strict=True):
            first, end = end, end + count + 1
            low, high = max(at, here.low) - at, min(at + count, here.high) - at
            to = slice(at + low - here.low, at + high - here.low)
            filled["tokens"][row, to] = ids_E[first + low : first + high]
            filled["targets"][row, to] = ids_E[first + low + 1 : first + high + 1]
            filled["weights"][row, to] = weights_E[first + low + 1 : first + high + 1]
            filled["segments"][row, to] = segment
            filled["positions"][row, to] = places_T[low:high]


def _source(component: Component, opened: store.Store, lengths_N: Any, seed: int):
    """What planning must know. The order of its documents hangs on its name alone, not on the
    other components."""
    name = int.from_bytes(hashlib.sha256(component.title.encode()).digest()[:8], "little")
    captions_N = opened.text_length_N
    if component.layout.name not in documents.CAPTIONS:  # nothing to leave out
        captions_N = np.broadcast_to(np.uint32(0), len(opened))
    return packing.Source(
        name=component.title,
        lengths_N=lengths_N,
        caption_lengths_N=captions_N,
        dropout=component.layout.caption_dropout,
        last=component.layout.last,
        splits=component.layout.name == "text",
        seed=int(shuffle.hash64(seed, np.uint64(name))[0]),
    )


def _stages(config: Mixture, batch: int, origin: tuple[int, int]) -> list[packing.Stage]:
    first = Stage(0, tuple(component.weight for component in config.components))
    stages = config.schedule if config.schedule and config.schedule[0].step == 0 else ()
    stages = stages or (first, *config.schedule)
    rows = [data.row(batch, origin, stage.step) for stage in stages]
    rows[0] = 0  # the first stage is that of the beginning, however the batch has changed
    return [packing.Stage(r, tuple(s.weights)) for r, s in zip(rows, stages, strict=True)]


def _check(config: Mixture) -> None:
    if not config.components:
        raise ValueError("a mixture without components; name at least one store")
    if config.unreadable not in UNREADABLE:
        raise ValueError(f"unreadable {config.unreadable!r} is none of {', '.join(UNREADABLE)}")
    titles = [component.title for component in config.components]
    for component in config.components:
        component.layout.check()
        if titles.count(component.title) > 1:
            raise ValueError(f"two components are {component.title}; give each a name of its own")
    steps = [stage.step for stage in config.schedule]
    if steps != sorted(set(steps)) or min(steps, default=0) < 0:
        raise ValueError(f"schedule's steps {steps} do not rise; give each stage a later one")
    for stage in config.schedule:
        if len(stage.weights) != len(titles):
            raise ValueError(
                f"the schedule's stage at step {stage.step} has {len(stage.weights)} weights for "
                f"{len(titles)} components; give each one"
            )


def _open_stores(config: Mixture, vocab: str) -> dict[str, store.Store]:
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
