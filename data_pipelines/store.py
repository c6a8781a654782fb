"""The token store: what every source becomes and all that training reads.

    DIR/store.json                       schema, fingerprints, counts, source, licence
    DIR/part-00000-of-00032/part.json    counts, checksums, file sizes; makes the part count
    DIR/part-00000-of-00032/codes/ ...   one zarr3 array a column, see parts.COLUMNS

Parts are written independently and in any order; store.json follows when all are there. Many
documents are one read: documents read one by one come 25 times slower.

Legend: N documents, P parts.
"""

import concurrent.futures
import pathlib
from collections.abc import Sequence

import numpy as np

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
    infos = [
        store_parts.read_json(part_path(directory, p, parts) / "part.json") for p in range(parts)
    ]
    if any(info is None for info in infos):
        return False
    same = ("schema", "vocabulary", "tokenizer", "dtype", "video")
    counts = ("documents", "codes", "text_tokens", "skipped")
    info = {
        **{name: infos[0][name] for name in same},
        **{name: sum(info[name] for info in infos) for name in counts},
        "parts": parts,
        "read_from": source,
        "licence": licence,
    }
    store_parts.write_json(pathlib.Path(directory) / "store.json", info)
    return True


class Store:
    """A complete store, opened for reading.

    grid_N3        t, h, w of each document's codes, zeros for text
    text_length_N  text ids of each document
    fps_N, kind_N  as written
    info           what store.json says
    """

    def __init__(self, directory: str, vocabulary: str = "", tokenizer: str = ""):
        """Opens `directory`; where fingerprints are given, the store's must be the same.

        Raises StoreError for a missing or empty store, a missing, truncated or damaged part,
        another vocabulary or tokenizer.
        """
        self.directory = str(directory)
        info = store_parts.read_json(pathlib.Path(directory) / "store.json")
        if info is None:
            raise StoreError(_why_no_store(pathlib.Path(directory)))
        store_parts.check_schema(f"store {directory}", info)
        Fingerprints(vocabulary, tokenizer).check(f"store {directory}", info)
        if not info["documents"]:
            raise StoreError(f"store {directory} holds no documents; encode a source that has some")
        self.info = info
        paths = [part_path(directory, part, info["parts"]) for part in range(info["parts"])]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            self._parts = list(pool.map(store_parts.Part, paths))
        made_with = Fingerprints(info["vocabulary"], info["tokenizer"])
        for part in self._parts:
            made_with.check(str(part.path), part.info)
        self._first_P = np.cumsum([0] + [len(part.kind_N) for part in self._parts])
        self.kind_N = np.concatenate([part.kind_N for part in self._parts])
        self.grid_N3 = np.concatenate([part.grid_N3 for part in self._parts])
        self.fps_N = np.concatenate([part.fps_N for part in self._parts])
        self.text_length_N = np.concatenate([np.diff(part.text_offsets) for part in self._parts])

    def __len__(self) -> int:
        return int(self._first_P[-1])

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Document]:
        """The documents at `indices`, in that order, in two reads a part that has any of them.

        Their keys are left out (""): `keys` has those. Raises StoreError for a damaged part.
        """
        index_N = np.asarray(indices, np.int64)
        if len(index_N) and not 0 <= index_N.min() <= index_N.max() < len(self):
            raise IndexError(f"documents {index_N.min()} to {index_N.max()} of {len(self)}")
        part_N = np.searchsorted(self._first_P, index_N, side="right") - 1
        pending = []
        for p in np.unique(part_N):
            where_N = np.flatnonzero(part_N == p)
            local_N = index_N[where_N] - self._first_P[p]
            pending.append((self._parts[p], where_N, local_N, self._parts[p].start_read(local_N)))
        found = {}
        for part, where_N, local_N, reads in pending:
            found |= zip(where_N.tolist(), part.finish_read(local_N, reads), strict=True)
        return [found[i] for i in range(len(index_N))]

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
