"""Which documents stand in which row: planned from lengths alone, window by window.

A window is about `window` rows. Its documents are the next ones of all sources, taken so that
each source's share of the tokens follows its weight; each source counts its documents through
epoch after epoch, each epoch a permutation. They are placed best-fit, longest first: into the
fullest row that still takes them. Then the rows of the window are shuffled, and the documents in
each row. Where a window starts is known from a few integers (`Cursor`), so a plan can begin
anywhere.

Legend: N documents of a source, W documents of a window, S slots (places of documents in rows),
R rows.
"""

import bisect
import collections
import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines import shuffle

_KEPT_WINDOWS, _KEPT_CURSORS = 4, 1024
_DROP, _PLACE, _ROWS, _LAST = 1, 2, 3, 4
_PIECE = 1 << 22
TOO_LONG = ("drop", "truncate", "error")


@dataclasses.dataclass
class Source:
    """What planning must know about one component of a mixture.

    lengths_N, caption_lengths_N   ids of each document from BOS to EOS, and how many of them a
                   document loses without its caption: arrays, or what is indexed like them
    dropout, last  the shares of documents whose caption is left out, or stands behind the image
    splits         whether a document that is too long goes on in another row
    seed           of the order of its documents
    """

    name: str
    lengths_N: Any
    caption_lengths_N: Any
    dropout: float = 0.0
    last: float = 0.0
    splits: bool = False
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Stage:
    """From `row` on, how the tokens are divided among the sources; 0 leaves one out."""

    row: int
    weights: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Taken:
    """Of a source, up to a place between windows: documents given, and given before the stage
    began; positions filled; documents too long, and cut."""

    taken: int = 0
    before: int = 0
    placed: int = 0
    dropped: int = 0
    truncated: int = 0


@dataclasses.dataclass(frozen=True)
class Cursor:
    """A place between windows: its number, its first row, the stage, and what each source gave.

    The stage is that of the window before; -1 begins a new one in any case.
    """

    window: int = 0
    row: int = 0
    stage: int = -1
    sources: tuple[Taken, ...] = ()


@dataclasses.dataclass
class Slots:
    """Places of documents in rows, in order.

    row_S, at_S     the row and the first position
    source_S, index_S, last_S   the document, and whether its caption stands behind
    begin_S, count_S   it gives its ids from `begin`, one more than the `count` positions
    segment_S       its number in the row, from 1
    """

    row_S: np.ndarray
    at_S: np.ndarray
    source_S: np.ndarray
    index_S: np.ndarray
    last_S: np.ndarray
    begin_S: np.ndarray
    count_S: np.ndarray
    segment_S: np.ndarray

    def __len__(self) -> int:
        return len(self.row_S)

    def __getitem__(self, where: Any) -> "Slots":
        """Some of them: by slice, mask or index array."""
        return Slots(*(column_S[where] for column_S in vars(self).values()))


class Plan:
    """Rows of documents, by index. Threads may share it."""

    def __init__(
        self, sources: Sequence[Source], stages: Sequence[Stage], length: int, window: int = 128,
        seed: int = 0, too_long: str = "drop", cursor: Cursor | None = None,
    ):  # fmt: skip
        """Raises ValueError for settings that give no rows; see Mixture for what they mean."""
        if too_long not in TOO_LONG:
            raise ValueError(f"too_long {too_long!r} is none of {', '.join(TOO_LONG)}")
        if length < 1 or window < 1:
            raise ValueError(
                f"rows of {length} tokens in windows of {window}; both must be at least 1"
            )
        _check_weights(sources, stages)
        self._sources, self._stages = list(sources), list(stages)
        self._length, self._seed, self._too_long = length, seed, too_long
        means = np.array([_mean_positions(source, length, too_long) for source in sources])
        # Documents a token of weight, and how many a window takes.
        self._rates = [np.array(stage.weights) / means for stage in stages]
        self._documents = [
            max(1, round(window * length * rates.sum() / (rates * means).sum()))
            for rates in self._rates
        ]
        self._cursors = [cursor or Cursor(sources=(Taken(),) * len(sources))]
        self._recent: collections.OrderedDict[int, tuple] = collections.OrderedDict()
        self._lock = threading.Lock()

    def rows(self, rows: Sequence[int]) -> Slots:
        """The slots of some rows, which they number in the order asked for."""
        found = []
        with self._lock:
            for number, row in enumerate(rows):
                cursor, slots, ends_R, _ = self._find(row)
                local = row - cursor.row
                mine = slots[ends_R[local] : ends_R[local + 1]]
                mine.row_S = np.full(len(mine), number)
                found.append(mine)
        columns = zip(*(vars(slots).values() for slots in found), strict=True)
        return Slots(*(np.concatenate(column) for column in columns))

    def cursor(self, row: int) -> Cursor:
        """The start of the window that holds `row`; planning from there gives the same rows."""
        with self._lock:
            return self._find(row)[0]

    def after(self, row: int) -> Cursor:
        """The end of the window that holds `row`."""
        with self._lock:
            return self._find(row)[3]

    def report(self, rows: int) -> dict[str, float]:
        """Over the windows of the first `rows` rows: `fill`, the share of positions in use, and
        by source `epochs/`, `share/` (of tokens), `dropped/` and `truncated/` (documents too
        long)."""
        end = self.after(max(0, rows - 1))
        total = sum(source.placed for source in end.sources)
        report = {"fill": total / (end.row * self._length)}
        for source, gave in zip(self._sources, end.sources, strict=True):
            report[f"epochs/{source.name}"] = gave.taken / len(source.lengths_N)
            report[f"share/{source.name}"] = gave.placed / total
            report[f"dropped/{source.name}"] = gave.dropped
            report[f"truncated/{source.name}"] = gave.truncated
        return report

    def _find(self, row: int) -> tuple[Cursor, Slots, np.ndarray, Cursor]:
        """The window that holds a row: its start, slots, where rows begin in them, its end."""
        first = self._cursors[0]
        if row < first.row:
            raise IndexError(f"row {row} lies before the cursor's row {first.row}")
        at = bisect.bisect_right(self._cursors, row, key=lambda c: c.row) - 1
        cursor = self._cursors[at]
        while True:
            found = self._window(cursor)
            after = found[-1]
            if row < after.row:
                return found
            if cursor is self._cursors[-1]:
                self._keep(after)
            cursor = after

    def _keep(self, cursor: Cursor) -> None:
        """Remembers where a window starts. Of many every other one: what lies between two that
        are kept is planned again if it is asked for, so memory does not grow with the run."""
        if len(self._cursors) == _KEPT_CURSORS:
            del self._cursors[1:-1:2]
        self._cursors.append(cursor)

    def _window(self, cursor: Cursor) -> tuple[Cursor, Slots, np.ndarray, Cursor]:
        if cursor.window in self._recent:
            self._recent.move_to_end(cursor.window)
        else:
            self._recent[cursor.window] = cursor, *self._pack(cursor)
            if len(self._recent) > _KEPT_WINDOWS:
                self._recent.popitem(last=False)
        return self._recent[cursor.window]

    def _pack(self, cursor: Cursor) -> tuple[Slots, np.ndarray, Cursor]:
        stage = bisect.bisect_right(self._stages, cursor.row, key=lambda s: s.row) - 1
        begins = stage != cursor.stage
        gave = [dataclasses.replace(t, before=t.taken) if begins else t for t in cursor.sources]
        counts = _next_counts(gave, self._rates[stage], self._documents[stage])
        chosen, after = [], []
        for number, (source, taken, count) in enumerate(
            zip(self._sources, gave, counts.tolist(), strict=True)
        ):
            columns, given = _choose(source, taken, count, self._length, self._too_long)
            chosen.append([np.full(len(columns[0]), number), *columns])
            after.append(given)
        columns = [np.concatenate(parts) for parts in zip(*chosen, strict=True)]
        row_S = _best_fit(columns[-1], self._length)
        slots, ends_R = self._shuffled(row_S, columns, cursor.window)
        row = cursor.row + len(ends_R) - 1
        return slots, ends_R, Cursor(cursor.window + 1, row, stage, tuple(after))

    def _shuffled(
        self, row_S: np.ndarray, columns: list[np.ndarray], window: int
    ) -> tuple[Slots, np.ndarray]:
        """Slots in rows, both in random order, and where each row begins (and the last ends)."""
        rows = int(row_S.max()) + 1 if len(row_S) else 0
        rank_R = np.argsort(shuffle.hash64(self._seed, _ROWS, window, np.arange(rows)))
        new_R = np.empty_like(rank_R)
        new_R[rank_R] = np.arange(rows)
        place_S = shuffle.hash64(self._seed, _PLACE, window, np.arange(len(row_S)))
        order_S = np.lexsort((place_S, new_R[row_S]))
        row_S = new_R[row_S][order_S]
        columns = [column_S[order_S] for column_S in columns]
        count_S = columns[-1]
        ends_R = np.searchsorted(row_S, np.arange(rows + 1))
        ends_S = np.cumsum(count_S)
        first_S = ends_R[row_S]  # the first slot of each one's row
        at_S = ends_S - count_S - (ends_S - count_S)[first_S]
        segment_S = np.arange(len(row_S)) - first_S + 1
        return Slots(row_S, at_S, *columns, segment_S), ends_R


def _check_weights(sources: Sequence[Source], stages: Sequence[Stage]) -> None:
    for number, source in enumerate(sources):
        weights = [stage.weights[number] for stage in stages]
        if min(weights) < 0 or not max(weights) > 0:
            worst = min(weights)
            raise ValueError(
                f"{source.name} has weight {worst}; give it a positive one or leave it out"
            )
    for stage in stages:
        if not sum(stage.weights) > 0:
            raise ValueError(f"from row {stage.row} on all weights are 0; let one be positive")


def _mean_positions(source: Source, length: int, too_long: str) -> float:
    """Mean positions a document fills, dropped ones none; ValueError if no row can hold any."""
    total, shortest, fits = 0.0, None, False
    without = source.dropout * (1 - source.last)
    size = len(source.lengths_N)
    for begin in range(0, size, _PIECE):
        here = slice(begin, min(size, begin + _PIECE))
        full_N = np.asarray(source.lengths_N[here])
        bare_N = full_N - source.caption_lengths_N[here]
        for ids_N, share in ((full_N, 1 - without), (bare_N, without)):
            if not share:
                continue
            positions_N = ids_N - 1
            over_N = positions_N > length
            if over_N.any() and too_long == "error" and not source.splits:
                worst = int(positions_N.argmax())
                raise ValueError(
                    f"document {begin + worst} of {source.name} takes {positions_N[worst]} "
                    f"positions, a row has {length}; lengthen the row or set too_long to 'drop' "
                    "or 'truncate'"
                )
            if not source.splits:
                cut_N = (bare_N - 1 <= length) if too_long == "truncate" else np.False_
                positions_N = np.where(over_N, np.where(cut_N, length, 0), positions_N)
            total += share * float(positions_N.sum())
            fits = fits or bool(positions_N.any())
            least = int(ids_N.min()) - 1
            shortest = least if shortest is None else min(shortest, least)
    if not fits:
        raise ValueError(
            f"a row of {length} is too short for any document of {source.name}; "
            f"the shortest takes {shortest}"
        )
    return total / size


def _next_counts(taken: list[Taken], rates: np.ndarray, documents: int) -> np.ndarray:
    """Of the next `documents`, how many are each source's; its j-th of a stage is due at
    (j + 1/2) / rate."""
    ahead = np.arange(documents)
    due = [
        (t.taken - t.before + 0.5 + ahead) / rate if rate else np.full(documents, np.inf)
        for t, rate in zip(taken, rates, strict=True)
    ]
    owners = np.repeat(np.arange(len(rates)), documents)
    first = np.lexsort((owners, np.concatenate(due)))[:documents]
    return np.bincount(owners[first], minlength=len(rates))


def _choose(
    source: Source, gave: Taken, count: int, length: int, too_long: str
) -> tuple[list[np.ndarray], Taken]:
    """(index_S, last_S, begin_S, count_S) of the next `count` documents of a source, and what it
    has given then."""
    size = len(source.lengths_N)
    epoch_W, place_W = np.divmod(gave.taken + np.arange(count), size)
    index_W = shuffle.permute(place_W, size, shuffle.hash64(source.seed, epoch_W))
    last_W = shuffle.uniform(source.seed, _LAST, epoch_W, index_W) < source.last
    drop_W = shuffle.uniform(source.seed, _DROP, epoch_W, index_W) < source.dropout
    caption_W = np.asarray(source.caption_lengths_N[index_W], np.int64)
    bare_W = np.asarray(source.lengths_N[index_W], np.int64) - caption_W - 1
    count_W = bare_W + np.where(drop_W & ~last_W, 0, caption_W)
    over_W, cut_W = count_W > length, np.zeros(count, bool)
    if source.splits:
        over_W, pieces_W = np.zeros(count, bool), -(-count_W // length)
    else:
        if too_long == "truncate":
            cut_W = over_W & (bare_W <= length)
            count_W = np.where(cut_W, length, count_W)
            over_W &= ~cut_W
        pieces_W = np.where(over_W, 0, 1)
    piece_S = np.arange(pieces_W.sum()) - np.repeat(np.cumsum(pieces_W) - pieces_W, pieces_W)
    begin_S = piece_S * length
    count_S = np.minimum(np.repeat(count_W, pieces_W) - begin_S, length)
    given = Taken(
        taken=gave.taken + count,
        before=gave.before,
        placed=gave.placed + int(count_S.sum()),
        dropped=gave.dropped + int(over_W.sum()),
        truncated=gave.truncated + int(cut_W.sum()),
    )
    return [np.repeat(index_W, pieces_W), np.repeat(last_W, pieces_W), begin_S, count_S], given


def _best_fit(count_S: np.ndarray, length: int) -> np.ndarray:
    """A row for each slot: longest first, each into the row with the least room that is enough,
    else into a new one."""
    row_S = np.empty(len(count_S), np.int64)
    rooms: list[int] = []  # sorted distinct amounts of room left
    by_room: dict[int, list[int]] = {}
    rows = 0
    order_S = np.argsort(-count_S, kind="stable")
    for slot, count in zip(order_S.tolist(), count_S[order_S].tolist(), strict=True):
        at = bisect.bisect_left(rooms, count)
        if at == len(rooms):
            row, room = rows, length
            rows += 1
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        row_S[slot] = row
        left = room - count
        if left:
            if left not in by_room:
                bisect.insort(rooms, left)
                by_room[left] = []
            by_room[left].append(row)
    return row_S
