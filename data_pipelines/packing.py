"""Which documents stand in which row: planned from lengths alone, window by window.

A window is about `window` rows. Its documents are the next ones of all sources, taken so that
each source's share of the tokens follows its weight; each source counts its documents through
epoch after epoch, each epoch a permutation. They are placed best-fit, longest first: into the
fullest row that still takes them. Then the rows of the window are shuffled, and the documents in
each row. Where a window starts is known from a few integers (`Cursor`), so a plan can begin
anywhere.

Legend: N documents of a store, W documents of a window.
"""

import bisect
import collections
import dataclasses
import threading

import numpy as np

from data_pipelines import shuffle

_KEPT = 4
_DROP, _PLACE, _ROWS = 1, 2, 3


@dataclasses.dataclass
class Source:
    """What planning must know about one component of a mixture; lengths count ids, BOS to EOS."""

    name: str
    lengths_N: np.ndarray
    caption_lengths_N: np.ndarray
    weight: float
    dropout: float
    splits: bool
    seed: int


@dataclasses.dataclass(frozen=True)
class Cursor:
    """A place between windows: its number, its first row, and how many documents each source has
    given.

    `placed` and `dropped` count, up to here, the positions filled and the documents too long by
    source.
    """

    window: int
    row: int
    taken: tuple[int, ...]
    placed: tuple[int, ...]
    dropped: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Slot:
    """`count` positions of a row: the ids from `begin` of a (source, index, caption dropped)."""

    document: tuple[int, int, bool]
    begin: int
    count: int


class Plan:
    """Rows of documents, by index. Threads may share it."""

    def __init__(
        self, sources: list[Source], length: int, window: int, seed: int, too_long: str,
        cursor: Cursor | None = None,
    ):  # fmt: skip
        """Raises ValueError for settings that give no rows; see Mixture for what they mean."""
        if too_long not in ("drop", "error"):
            raise ValueError(f"too_long {too_long!r} is neither 'drop' nor 'error'")
        if length < 1 or window < 1:
            raise ValueError(
                f"rows of {length} tokens in windows of {window}; both must be at least 1"
            )
        self._sources, self._length, self._seed = sources, length, seed
        means = [_mean_length(source, length, too_long) for source in sources]
        self._rates = np.array([s.weight / mean for s, mean in zip(sources, means, strict=True)])
        tokens = sum(rate * mean for rate, mean in zip(self._rates, means, strict=True))
        self._documents = max(1, round(window * length * self._rates.sum() / tokens))
        none = (0,) * len(sources)
        self._cursors = [cursor or Cursor(0, 0, none, none, none)]
        self._recent: collections.OrderedDict[int, list[list[Slot]]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def row(self, row: int) -> list[Slot]:
        """The documents of a row, in order."""
        with self._lock:
            cursor = self._find(row)
            return self._rows(cursor)[row - cursor.row]

    def cursor(self, row: int) -> Cursor:
        """The start of the window that holds `row`; planning from there gives the same rows."""
        with self._lock:
            return self._find(row)

    def report(self, rows: int) -> dict[str, float]:
        """Over the windows of the first `rows` rows: `fill`, the share of positions in use, and
        by source `epochs/`, `share/` (of tokens) and `dropped/` (documents too long)."""
        with self._lock:
            start = self._find(max(0, rows - 1))
            end = self._cursors[start.window - self._cursors[0].window + 1]
        total = sum(end.placed)
        report = {"fill": total / (end.row * self._length)}
        for i, source in enumerate(self._sources):
            report[f"epochs/{source.name}"] = end.taken[i] / len(source.lengths_N)
            report[f"share/{source.name}"] = end.placed[i] / total
            report[f"dropped/{source.name}"] = end.dropped[i]
        return report

    def _find(self, row: int) -> Cursor:
        first = self._cursors[0]
        if row < first.row:
            raise IndexError(f"row {row} lies before the cursor's row {first.row}")
        while self._cursors[-1].row <= row:
            self._rows(self._cursors[-1])
        return self._cursors[bisect.bisect_right(self._cursors, row, key=lambda c: c.row) - 1]

    def _rows(self, cursor: Cursor) -> list[list[Slot]]:
        if cursor.window in self._recent:
            self._recent.move_to_end(cursor.window)
            return self._recent[cursor.window]
        rows, after = self._pack(cursor)
        if cursor is self._cursors[-1]:
            self._cursors.append(after)
        self._recent[cursor.window] = rows
        if len(self._recent) > _KEPT:
            self._recent.popitem(last=False)
        return rows

    def _pack(self, cursor: Cursor) -> tuple[list[list[Slot]], Cursor]:
        counts = _next_counts(cursor.taken, self._rates, self._documents)
        slots, placed, dropped = [], list(cursor.placed), list(cursor.dropped)
        for number, (source, count) in enumerate(zip(self._sources, counts, strict=True)):
            chosen, over = _choose(number, source, cursor.taken[number], count, self._length)
            slots += chosen
            placed[number] += sum(slot.count for slot in chosen)
            dropped[number] += over
        rows = self._shuffled(_best_fit(slots, self._length), cursor.window)
        taken = tuple(int(t + c) for t, c in zip(cursor.taken, counts, strict=True))
        after = Cursor(
            cursor.window + 1, cursor.row + len(rows), taken, tuple(placed), tuple(dropped)
        )
        return rows, after

    def _shuffled(self, rows: list[list[Slot]], window: int) -> list[list[Slot]]:
        order = shuffle.hash64(self._seed, _ROWS, window, np.arange(len(rows)))
        rows = [rows[i] for i in np.argsort(order, kind="stable")]
        for number, row in enumerate(rows):
            keys = shuffle.hash64(self._seed, _PLACE, window, number, np.arange(len(row)))
            row[:] = [row[i] for i in np.argsort(keys, kind="stable")]
        return rows


def _mean_length(source: Source, length: int, too_long: str) -> float:
    """Mean positions a document fills, dropped ones none; ValueError if no row can hold any."""
    if not source.weight > 0:
        raise ValueError(
            f"{source.name} has weight {source.weight}; give it a positive one or leave it out"
        )
    positions_N = source.lengths_N - 1
    if source.splits:
        return float(positions_N.mean())
    fits_N = positions_N <= length
    if not fits_N.any():
        raise ValueError(
            f"a row of {length} is too short for any document of {source.name}; "
            f"the shortest takes {positions_N.min()}"
        )
    if too_long == "error" and not fits_N.all():
        worst = int(positions_N.argmax())
        raise ValueError(
            f"document {worst} of {source.name} takes {positions_N[worst]} positions, "
            f"a row has {length}; lengthen the row or set too_long to 'drop'"
        )
    return float(np.where(fits_N, positions_N, 0).mean())


def _next_counts(taken: tuple[int, ...], rates: np.ndarray, documents: int) -> np.ndarray:
    """Of the next `documents`, how many are each source's; its j-th is due at (j + 1/2) / rate."""
    times = [(t + 0.5 + np.arange(documents)) / r for t, r in zip(taken, rates, strict=True)]
    owners = np.repeat(np.arange(len(rates)), documents)
    first = np.lexsort((owners, np.concatenate(times)))[:documents]
    return np.bincount(owners[first], minlength=len(rates))


def _choose(
    number: int, source: Source, start: int, count: int, length: int
) -> tuple[list[Slot], int]:
    """Slots of the next `count` documents of a source from `start` on, and how many do not fit."""
    size = len(source.lengths_N)
    epoch_W, place_W = np.divmod(start + np.arange(count), size)
    index_W = shuffle.permute(place_W, size, shuffle.hash64(source.seed, epoch_W))
    drop_W = shuffle.uniform(source.seed, _DROP, epoch_W, index_W) < source.dropout
    lengths_W = source.lengths_N[index_W] - np.where(drop_W, source.caption_lengths_N[index_W], 0)
    slots, dropped = [], 0
    for index, drop, positions in zip(
        index_W.tolist(), drop_W.tolist(), (lengths_W - 1).tolist(), strict=True
    ):
        if positions > length and not source.splits:
            dropped += 1
            continue
        for begin in range(0, positions, length):
            slots.append(Slot((number, index, drop), begin, min(length, positions - begin)))
    return slots, dropped


def _best_fit(slots: list[Slot], length: int) -> list[list[Slot]]:
    """Longest first, each into the row with the least room that is enough, else into a new row."""
    rows: list[list[Slot]] = []
    rooms: list[int] = []  # sorted distinct amounts of room left
    by_room: dict[int, list[int]] = {}
    for slot in sorted(slots, key=lambda s: -s.count):
        at = bisect.bisect_left(rooms, slot.count)
        if at == len(rooms):
            rows.append([])
            row, room = len(rows) - 1, length
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        rows[row].append(slot)
        left = room - slot.count
        if left:
            if left not in by_room:
                bisect.insort(rooms, left)
                by_room[left] = []
            by_room[left].append(row)
    return rows
