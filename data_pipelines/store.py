"""The token store: what every source becomes and all that training reads.

    DIR/store.json                       schema, fingerprints, counts, source, licence
    DIR/part-00000-of-00032/part.json    counts, checksums, file sizes; makes the part count
    DIR/part-00000-of-00032/codes/ ...   one zarr3 array a column, see parts.COLUMNS

Parts are written independently and in any order; store.json follows when all are there. Many
documents are one read: documents read one by one come 25 times slower.

Legend: N documents, M of them, S shapes, P parts, E elements of a column.
"""

import collections
import concurrent.futures
import functools
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines import arrays, part_info
from data_pipelines import parts as store_parts

Document = store_parts.Document
Fingerprints = store_parts.Fingerprints
StoreError = store_parts.StoreError
TEXT, IMAGE, VIDEO = store_parts.TEXT, store_parts.IMAGE, store_parts.VIDEO


def part_path(directory: str, part: int, parts: int) -> pathlib.Path:
    """Where a part lies."""
    return pathlib.Path(directory) / store_parts.part_name(part, parts)


def finish(directory: str, parts: int, source: str, licence: str) -> bool:
    """Writes store.json once all parts are complete; returns whether they are."""
    infos = [store_parts.read_part(part_path(directory, p, parts)) for p in range(parts)]
    if any(info is None for info in infos):
        return False
    same = ("schema", "vocabulary", "tokenizer", "dtype", "video")
    counts = ("documents", "codes", "text_tokens", "conversations", "skipped")
    dropped = collections.Counter()
    for info in infos:
        dropped.update(info["dropped"])
    info = {
        **{name: infos[0][name] for name in same},
        **{name: sum(info[name] for info in infos) for name in counts},
        "dropped": dict(sorted(dropped.items())),
        "parts": parts,
        "read_from": source,
        "licence": licence,
    }
    store_parts.write_json(pathlib.Path(directory) / "store.json", info)
    return True


def read_info(directory: str | pathlib.Path) -> dict:
    """What store.json says; StoreError if there is none, or none that can be so."""
    path = pathlib.Path(directory)
    info = store_parts.read_json(path / "store.json")
    if info is None:
        raise StoreError(_why_no_store(path))
    store_parts.check_schema(f"store {directory}", info)
    try:
        part_info.check_store(info)
    except ValueError as error:
        raise StoreError(
            f"store {directory} is damaged: in store.json, {error}; remove it and run its encode "
            "job again"
        ) from None
    return info


class Store:
    """A complete store, opened for reading.

    text_length_N  text ids of each document, uint32
    shape_N        which of `shapes` each has
    shapes         (t, h, w, fps): the grid of codes, zeros for text, and the frame rate of videos
    counts_S       how many documents have each shape
    turn_count_N   how many pieces each conversation has, 0 for other documents, or None if there
                   are no conversations
    info           what store.json says
    """

    def __init__(self, directory: str, vocabulary: str = "", tokenizer: str = ""):
        """Opens `directory`; where fingerprints are given, the store's must be the same.

        Raises StoreError for a missing or empty store, a missing, truncated or damaged part,
        another vocabulary or tokenizer.
        """
        self.directory = str(directory)
        info = read_info(directory)
        Fingerprints(vocabulary, tokenizer).check(f"store {directory}", info)
        if not info["documents"]:
            raise StoreError(f"store {directory} holds no documents; encode a source that has some")
        self.info, self._known_starts = info, {}
        paths = [part_path(directory, part, info["parts"]) for part in range(info["parts"])]
        made_with = Fingerprints(info["vocabulary"], info["tokenizer"])
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            self._parts = list(pool.map(store_parts.Part, paths))
            for part in self._parts:
                made_with.check(str(part.path), part.info)
            self._first_P = np.cumsum([0] + [len(part) for part in self._parts])
            if len(self) != info["documents"]:
                raise StoreError(
                    f"store {directory} has {len(self)} documents, store.json says "
                    f"{info['documents']}; remove store.json and run its encode job again"
                )
            self._open_columns(pool)

    def _open_columns(self, pool: concurrent.futures.Executor) -> None:
        """What is known of every document without reading it, in few bytes each."""
        counts = collections.Counter()
        for part in self._parts:
            counts.update({tuple(shape): count for *shape, count in part.info["shapes"]})
        self.shapes = sorted(counts)
        self.counts_S = np.array([counts[shape] for shape in self.shapes])
        numbers = {shape: number for number, shape in enumerate(self.shapes)}
        self.text_length_N = np.empty(len(self), np.uint32)
        self.shape_N = np.empty(len(self), np.min_scalar_type(len(self.shapes)))
        talks = any(part.info["conversations"] for part in self._parts)
        self.turn_count_N = np.zeros(len(self), np.uint16) if talks else None

        def fill(number: int) -> None:
            part, here = self._parts[number], slice(*self._first_P[number : number + 2])
            self.text_length_N[here] = part.counted("text_length", "text_tokens")
            mine_S = np.array([numbers[tuple(shape)] for *shape, _ in part.info["shapes"]], int)
            self.shape_N[here] = mine_S.astype(self.shape_N.dtype)[part.shapes()]
            if part.info["conversations"]:
                self.turn_count_N[here] = part.counted("turn_count", "turns")

        list(pool.map(fill, range(len(self._parts))))

    def __len__(self) -> int:
        return int(self._first_P[-1])

    def lengths(self, name: str) -> Callable[[np.ndarray | slice], np.ndarray]:
        """How many elements of a column ("codes", "text", "turns") documents have, by index."""
        if name == "codes":
            areas_S = np.array([t * h * w for t, h, w, _ in self.shapes])
            return lambda index: areas_S[self.shape_N[index]]
        lengths_N = dict(text=self.text_length_N, turns=self.turn_count_N)[name]
        return lambda index: lengths_N[index]

    def start_read(
        self, name: str, index_M: np.ndarray, low_M: np.ndarray, high_M: np.ndarray
    ) -> Callable[[], np.ndarray]:
        """Begins to read elements low to high of a column of these documents.

        The result waits for them, and gives them end to end, in the order asked for: one read a
        part that has any of them. It raises StoreError for a damaged part.
        """
        index_M = np.asarray(index_M, np.int64)
        if len(index_M) and not 0 <= index_M.min() <= index_M.max() < len(self):
            raise IndexError(f"documents {index_M.min()} to {index_M.max()} of {len(self)}")
        part_M = np.searchsorted(self._first_P, index_M, side="right") - 1
        starts = self._starts(name)
        first_M = starts[index_M] - starts[self._first_P[:-1]][part_M]
        pending = []
        for p in np.unique(part_M):
            mine_M = part_M == p
            begins, ends = ((first_M + at_M)[mine_M] for at_M in (low_M, high_M))
            pending.append((mine_M, self._parts[p].gather(name, begins, ends)))
        if len(pending) == 1:
            return pending[0][1]
        lengths_M = np.asarray(high_M) - low_M

        def wait() -> np.ndarray:
            read_E = np.empty(lengths_M.sum(), store_parts.COLUMNS[name])
            for mine_M, part_wait in pending:
                read_E[np.repeat(mine_M, lengths_M)] = part_wait()
            return read_E

        return wait

    def _starts(self, name: str) -> arrays.Starts:
        if name not in self._known_starts:
            self._known_starts[name] = arrays.Starts(len(self), self.lengths(name))
        return self._known_starts[name]

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Document]:
        """The documents at `indices`, in that order, without their keys: `keys` has those.

        Raises StoreError for a damaged part.
        """
        index_M = np.asarray(indices, np.int64)
        names = ("codes", "text") if self.turn_count_N is None else ("codes", "text", "turns")
        lengths = {name: self.lengths(name)(index_M).astype(np.int64) for name in names}
        waits = [self.start_read(n, index_M, np.zeros_like(index_M), lengths[n]) for n in names]
        pieces = [np.split(wait(), np.cumsum(lengths[name]))[:-1] for name, wait in
                  zip(names, waits, strict=True)]  # fmt: skip
        pieces += [[()] * len(index_M)] * (3 - len(names))
        frames_M = self._frames_N[index_M]
        return [
            self._document(int(i), int(frames), *columns)
            for i, frames, *columns in zip(index_M, frames_M, *pieces, strict=True)
        ]

    def _document(self, index: int, frames: int, codes, text, turns) -> Document:
        t, h, w, fps = self.shapes[self.shape_N[index]]
        codes_thw = codes.reshape(t, h, w) if t else None
        return Document("", text, codes_thw, fps, frames, turns if len(turns) else None)

    @functools.cached_property
    def _frames_N(self) -> np.ndarray:
        return np.concatenate([part.column("frames") for part in self._parts])

    def keys(self) -> list[str]:
        """The source keys of all documents, in order."""
        return [key for part in self._parts for key in part.keys()]

    def verify(self) -> None:
        """Reads everything; StoreError for the first column that differs from its checksum."""
        for part in self._parts:
            part.verify()


def _why_no_store(path: pathlib.Path) -> str:
    if not path.is_dir():
        return f"store {path} does not exist; run its encode job first"
    parts = sorted(p.name for p in path.glob("part-*-of-*"))
    if not parts:
        return f"{path} is no token store: no store.json, no parts; run an encode job into it"
    done = sum((path / name / "part.json").exists() for name in parts)
    total = int(parts[0].rsplit("-", 1)[1])
    return (
        f"store {path} is incomplete: {done} of {total} parts are written; run its encode job again"
    )
