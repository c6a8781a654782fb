"""One part of a token store: a directory of arrays that counts once its part.json is there.

Vision codes and text ids lie end to end. What must be known of each document before it is read is
little, as there may be 100 million: how many text ids it has, and which of the part's few shapes.
Codes are raw: the document layout is applied when reading, so a template can change without
encoding again.

Legend: N documents, S shapes, E elements of a column, t latent frames, h rows, w columns of codes.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from data_pipelines import arrays, checksum, part_info
from emu3_jax import untrusted

SCHEMA = 3
TEXT, IMAGE, VIDEO = 0, 1, 2
COLUMNS = {
    "codes": "uint16",
    "text": "uint32",
    "turns": "uint32",  # lengths of a conversation's pieces, end to end
    "text_length": "uint32",
    "turn_count": "uint16",
    "shape": "uint32",  # which of part.json's shapes (t, h, w, fps)
    "frames": "int32",
    "keys": "uint8",  # UTF-8, each key ended by a newline
}
# Elements of an inner chunk, the least that is read: about one image, or a column at a time.
_INNER = {name: 4096 if name in ("codes", "text", "turns") else 1 << 16 for name in COLUMNS}
_PAGES = dict(codes=4096, text=512, turns=512)
_SUMS = dict(codes="codes", text="text_tokens", turns="turns")  # of columns by end-to-end ranges
_NO_CODES = np.zeros(0, np.uint16)


class StoreError(ValueError):
    """A store that is missing, incomplete, damaged or made for something else."""


@dataclasses.dataclass
class Document:
    """One stored document: text ids, and codes where it has an image (t = 1) or a video.

    Of a video, `fps` is the frame rate in pixel frames a second and `frames` how many it has,
    before its last one was repeated to fill up the latent ones; 0 for anything else. Of a
    conversation, `turns` are the lengths of the text's pieces: what stands before the image, then
    question and answer by turns.
    """

    key: str
    text: np.ndarray
    codes_thw: np.ndarray | None = None
    fps: float = 0.0
    frames: int = 0
    turns: np.ndarray | None = None

    @property
    def kind(self) -> int:
        """TEXT, IMAGE or VIDEO."""
        if self.codes_thw is None:
            return TEXT
        return VIDEO if self.fps else IMAGE


@dataclasses.dataclass(frozen=True)
class Fingerprints:
    """What a part was made with; "" where it does not matter.

    The first three are hashes: `tokenizer` is "" for a store without images, `source` tells what
    was read and how. `dtype` is what the tokenizer computed in, `video` one of encoder.MODES.
    """

    vocabulary: str = ""
    tokenizer: str = ""
    source: str = ""
    dtype: str = ""
    video: str = ""

    def check(self, name: str, info: dict) -> None:
        """Raises StoreError if the part.json or store.json `info` of `name` has others."""
        for what, wanted in dataclasses.asdict(self).items():
            found = info[what] if what in info else ""
            if wanted and found and found != wanted:
                raise StoreError(
                    f"{name} was made with {what} {found[:12]}, this run has {what} {wanted[:12]}; "
                    f"use that {what}, remove the store or take another directory"
                )


def part_name(part: int, parts: int) -> str:
    """The directory of a part: part-00000-of-00032."""
    return f"part-{part:05}-of-{parts:05}"


def mine(parts: int, worker: int, workers: int) -> range:
    """The parts that this process writes: worker, worker + workers, ...

    With `workers` 0, those are its number in a run of several processes and their count. Raises
    ValueError for a worker that is none of them.
    """
    if worker == workers == 0:
        return range(jax.process_index(), parts, jax.process_count())
    if not 0 <= worker < workers:
        raise ValueError(f"worker {worker} of workers {workers}; they are counted from 0")
    return range(worker, parts, workers)


def members(count: int, part: int, parts: int) -> range:
    """The records of a part: a contiguous stretch of `count`."""
    return range(part * count // parts, (part + 1) * count // parts)


def is_complete(path: pathlib.Path, made_with: Fingerprints) -> bool:
    """Whether the part is written; StoreError if it is, but otherwise than this run would."""
    info = read_part(path)
    if info is not None:
        made_with.check(str(path), info)
    return info is not None


def check_schema(name: str, info: dict) -> None:
    """Raises StoreError if a part or store is of another version of this code."""
    schema = info.get("schema")
    if schema != SCHEMA:
        raise StoreError(
            f"{name} has schema {untrusted.short(schema)}, this code reads {SCHEMA}; remove it and "
            "encode it again"
        )


def read_part(path: pathlib.Path) -> dict | None:
    """What part.json says, None if there is none; StoreError if it cannot be so.

    Nothing that follows from it takes more memory than a few times the part's files.
    """
    info = read_json(path / "part.json")
    if info is None:
        return None
    check_schema(str(path), info)
    try:
        part_info.check_part(path, info, COLUMNS)
    except ValueError as error:
        raise damaged(path, f"in part.json, {error}") from None
    return info


def damaged(path: pathlib.Path, reason: str) -> StoreError:
    """The error of a part that is to be made anew."""
    return StoreError(f"{path} is damaged: {reason}; remove it and run its encode job again")


def write(
    path: pathlib.Path,
    documents: Iterable[Document],
    made_with: Fingerprints,
    skipped: int = 0,
    dropped: dict[str, int] | None = None,
) -> None:
    """Writes a part (in memory until then, one write an array), part.json last.

    What an interrupted writer left is removed first. `skipped` counts bad records of the source,
    `dropped` those left out on purpose, by reason.
    Raises ValueError for codes above 65,535 and for keys with newlines.
    """
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    columns, shapes = _columns(list(documents))
    stored = {
        name: arrays.pages(values_E, _PAGES[name]) if name in _PAGES else values_E
        for name, values_E in columns.items()
    }
    for name, values in stored.items():
        arrays.write(path / name, values, _INNER[name])
    files = sorted(p for p in path.rglob("*") if p.is_file())
    info = {
        "schema": SCHEMA,
        "documents": len(columns["shape"]),
        "codes": len(columns["codes"]),
        "text_tokens": len(columns["text"]),
        "turns": len(columns["turns"]),
        "conversations": int((columns["turn_count"] > 0).sum()),
        "skipped": skipped,
        "dropped": dropped or {},
        **dataclasses.asdict(made_with),
        "shapes": shapes,
        "crc32c": {name: f"{checksum.crc32c(values):08x}" for name, values in stored.items()},
        "files": {str(p.relative_to(path)): p.stat().st_size for p in files},
    }
    write_json(path / "part.json", info)


class Part:
    """A complete part, opened for reading."""

    def __init__(self, path: pathlib.Path):
        """Raises StoreError for a part that is missing or truncated."""
        self.path, self._arrays = path, {}
        self.info = read_part(path)
        if self.info is None:
            raise StoreError(f"store {path.parent} lacks {path.name}; run its encode job again")
        for name, size in self.info["files"].items():
            found = (path / name).stat().st_size if (path / name).exists() else 0
            if found != size:
                raise damaged(path, f"{name} has {found} bytes of {size}")

    def __len__(self) -> int:
        return self.info["documents"]

    def column(self, name: str) -> np.ndarray:
        """A whole column; StoreError if it is damaged."""
        values_E = self._stored(name).reshape(-1)
        return values_E[: self.info[_SUMS[name]]] if name in _SUMS else values_E

    def counted(self, name: str, total: str) -> np.ndarray:
        """A column of lengths; StoreError unless it adds up to part.json's `total`."""
        lengths_N = self.column(name)
        if int(lengths_N.sum(dtype=np.int64)) != self.info[total]:
            raise damaged(self.path, f"{name} does not add up to {total} {self.info[total]}")
        return lengths_N

    def shapes(self) -> np.ndarray:
        """Which of part.json's shapes each document has; StoreError unless it is as it says."""
        shape_N, counts = self.column("shape"), [count for *_, count in self.info["shapes"]]
        known = shape_N.max(initial=0) < max(1, len(counts))
        if not known or np.bincount(shape_N, minlength=len(counts)).tolist() != counts:
            raise damaged(self.path, "shape does not count what part.json counts")
        return shape_N

    def _stored(self, name: str) -> np.ndarray:
        return self._wait(self._open(name).read().result)

    def _open(self, name: str) -> arrays.Array:
        return self._wait(lambda: open_column(self.path, self.info, name))

    def gather(self, name: str, begins_N: np.ndarray, ends_N: np.ndarray) -> Callable:
        """Begins to read these ranges of a column; the result waits for them, end to end.

        It raises StoreError if they are damaged.
        """
        if name not in self._arrays:
            self._arrays[name] = self._open(name)
        wait = arrays.gather(self._arrays[name], begins_N, ends_N)
        return lambda: self._wait(wait)

    def keys(self) -> list[str]:
        """The source keys of all documents, in order; StoreError if they are damaged."""
        text = self._wait(lambda: self.column("keys").tobytes().decode())
        if text.count("\n") != len(self):
            raise damaged(self.path, f"it has keys of {text.count(chr(10))} documents")
        return text.split("\n")[:-1]

    def verify(self) -> None:
        """Reads everything; StoreError for the first column that differs from its checksum."""
        for name, wanted in self.info["crc32c"].items():
            found = f"{checksum.crc32c(self._stored(name)):08x}"
            if found != wanted:
                raise damaged(self.path, f"{name} has crc32c {found}, part.json says {wanted}")

    def _wait(self, wait: Callable) -> Any:
        try:
            return wait()
        except StoreError:
            raise
        except ValueError as error:
            raise damaged(self.path, first_line(error)) from error


def open_column(path: pathlib.Path, info: dict, name: str) -> arrays.Array:
    """A column of a part, of which part.json says `info`, opened for reading.

    Raises ValueError if it is not there, is none that `write` writes or not as long as it must be.
    """
    row = (_PAGES[name],) if name in _PAGES else ()
    array = arrays.open_read(path / name, row, COLUMNS[name], _INNER[name])
    count = -(-info[_SUMS[name]] // row[0]) if row else info["documents"]
    if name != "keys" and array.shape[0] != count:
        raise ValueError(f"{name} has {array.shape[0]} rows, part.json wants {count}")
    size = array.size * array.dtype.numpy_dtype.itemsize
    if (row or name == "keys") and size > part_info.column_bytes(info, name):
        raise ValueError(f"{name} is of {size} bytes, more than its files")
    return array


def read_json(path: pathlib.Path) -> dict | None:
    """The object in a JSON file, None if there is no file; StoreError if it is no JSON."""
    if not path.exists():
        return None
    try:
        return untrusted.read_object(path)
    except ValueError as error:
        raise StoreError(f"{error}; remove {path.parent} and encode it again") from error


def write_json(path: pathlib.Path, value: dict) -> None:
    """Writes an object as `write_text` does."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces the file in one move, so that it is there whole or not at all.

    Several processes may write the same text at once. What killed ones left is removed.
    """
    data = text.encode()
    while not (path.exists() and path.read_bytes() == data):
        # Not the process id: those of two containers may be the same.
        written = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        written.write_bytes(data)
        with contextlib.suppress(FileNotFoundError):  # removed by another that was done first
            os.replace(written, path)
    for left in path.parent.glob(f"{path.name}.*.tmp"):
        left.unlink(missing_ok=True)


def _columns(documents: list[Document]) -> tuple[dict[str, np.ndarray], list[list]]:
    """All columns by name, and the shapes with their counts."""
    for document in documents:
        if "\n" in document.key:
            raise ValueError(f"key {document.key!r} has a newline; give the document another key")
        if document.codes_thw is not None and int(document.codes_thw.max()) >= 1 << 16:
            raise ValueError(
                f"{document.key}: code {document.codes_thw.max()} does not fit the store's uint16"
            )
        if document.turns is not None and document.turns.sum() != len(document.text):
            raise ValueError(
                f"{document.key}: turns of {document.turns.sum()} ids in a text of "
                f"{len(document.text)}"
            )
    codes = [_NO_CODES if d.codes_thw is None else d.codes_thw.ravel() for d in documents]
    grids = [(0, 0, 0) if d.codes_thw is None else d.codes_thw.shape for d in documents]
    turns = [d.turns for d in documents if d.turns is not None]
    found = [(*grid, float(d.fps)) for grid, d in zip(grids, documents, strict=True)]
    counts = collections.Counter(found)
    numbers = {shape: number for number, shape in enumerate(sorted(counts))}
    values = {
        "codes": np.concatenate([_NO_CODES, *codes]),
        "text": np.concatenate([np.zeros(0, np.uint32), *(d.text for d in documents)]),
        "turns": np.concatenate([np.zeros(0, np.uint32), *turns]),
        "text_length": np.array([len(d.text) for d in documents]),
        "turn_count": np.array([0 if d.turns is None else len(d.turns) for d in documents]),
        "shape": np.array([numbers[shape] for shape in found]),
        "frames": np.array([d.frames for d in documents]),
        "keys": np.frombuffer("".join(d.key + "\n" for d in documents).encode(), np.uint8),
    }
    columns = {name: values[name].astype(dtype) for name, dtype in COLUMNS.items()}
    return columns, [[*shape, counts[shape]] for shape in numbers]


def first_line(error: Exception) -> str:
    """What a message of TensorStore or TFDS begins with."""
    return untrusted.first_line(error)[:200]
