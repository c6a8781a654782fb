"""One part of a token store: a directory of arrays that counts once its part.json is there.

Vision codes and text ids lie end to end, each with offsets; the other columns have one entry a
document. Codes are raw: the document layout is applied when reading, so a template can change
without encoding again.

Legend: N documents, E elements of a column, t latent frames, h rows, w columns of codes.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterable

import numpy as np

from data_pipelines import arrays, checksum

SCHEMA = 2
TEXT, IMAGE, VIDEO = 0, 1, 2
COLUMNS = {
    "codes": "uint16",
    "code_offsets": "int64",
    "text": "uint32",
    "text_offsets": "int64",
    "kind": "uint8",
    "grid": "int32",  # t, h, w of each document, one after the other
    "fps": "float32",
    "frames": "int32",
    "keys": "uint8",  # UTF-8, each key ended by a newline
}
# Elements of an inner chunk, the least that is read: about one image, or a column at a time.
_INNER = {name: 4096 if name in ("codes", "text") else 1 << 16 for name in COLUMNS}
_NO_CODES = np.zeros(0, np.uint16)


class StoreError(ValueError):
    """A store that is missing, incomplete, damaged or made for something else."""


@dataclasses.dataclass
class Document:
    """One stored document: text ids, and codes where it has an image (t = 1) or a video.

    Of a video, `fps` is the frame rate in pixel frames a second and `frames` how many it has,
    before its last one was repeated to fill up the latent ones; 0 for anything else.
    """

    key: str
    text: np.ndarray
    codes_thw: np.ndarray | None = None
    fps: float = 0.0
    frames: int = 0

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


def is_complete(path: pathlib.Path, made_with: Fingerprints) -> bool:
    """Whether the part is written; StoreError if it is, but otherwise than this run would."""
    info = read_json(path / "part.json")
    if info is not None:
        check_schema(str(path), info)
        made_with.check(str(path), info)
    return info is not None


def check_schema(name: str, info: dict) -> None:
    """Raises StoreError if a part or store is of another version of this code."""
    if info["schema"] != SCHEMA:
        raise StoreError(
            f"{name} has schema {info['schema']}, this code reads {SCHEMA}; remove it and encode "
            "it again"
        )


def write(
    path: pathlib.Path, documents: Iterable[Document], made_with: Fingerprints, skipped: int = 0
) -> None:
    """Writes a part (in memory until then, one write an array), part.json last.

    What an interrupted writer left is removed first. `skipped` counts bad records of the source.
    Raises ValueError for codes above 65,535 and for keys with newlines.
    """
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    columns = _columns(list(documents))
    for name, values_E in columns.items():
        arrays.write(path / name, values_E, _INNER[name])
    files = sorted(p for p in path.rglob("*") if p.is_file())
    info = {
        "schema": SCHEMA,
        "documents": len(columns["kind"]),
        "codes": len(columns["codes"]),
        "text_tokens": len(columns["text"]),
        "skipped": skipped,
        **dataclasses.asdict(made_with),
        "crc32c": {name: f"{checksum.crc32c(v_E):08x}" for name, v_E in columns.items()},
        "files": {str(p.relative_to(path)): p.stat().st_size for p in files},
    }
    write_json(path / "part.json", info)


class Part:
    """A complete part, opened for reading; columns with one entry a document are in memory."""

    def __init__(self, path: pathlib.Path):
        """Raises StoreError for a part that is missing, truncated or damaged."""
        self.path = path
        self.info = read_json(path / "part.json")
        if self.info is None:
            raise StoreError(f"store {path.parent} lacks {path.name}; run its encode job again")
        for name, size in self.info["files"].items():
            found = (path / name).stat().st_size if (path / name).exists() else 0
            if found != size:
                raise self._damaged(f"{name} has {found} bytes of {size}")
        self.kind_N = self._column("kind")
        self.fps_N = self._column("fps")
        self.frames_N = self._column("frames")
        self.grid_N3 = self._column("grid").reshape(-1, 3)
        self.text_offsets = self._column("text_offsets")
        self.code_offsets = self._column("code_offsets")
        self._arrays = {name: arrays.open_read(path / name) for name in ("codes", "text")}

    def start_read(self, local_N: np.ndarray) -> list:
        """Futures of the codes and the text of these documents, end to end."""
        offsets = {"codes": self.code_offsets, "text": self.text_offsets}
        return [
            arrays.gather(self._arrays[n], o[local_N], o[local_N + 1]) for n, o in offsets.items()
        ]

    def finish_read(self, local_N: np.ndarray, reads: list) -> list[Document]:
        """The documents whose `start_read` gave `reads`, without keys."""
        try:
            codes_E, text_E = (np.asarray(read.result()) for read in reads)
        except ValueError as error:
            raise self._damaged(_first_line(error)) from error
        code_ends = np.cumsum(self.code_offsets[local_N + 1] - self.code_offsets[local_N])[:-1]
        text_ends = np.cumsum(self.text_offsets[local_N + 1] - self.text_offsets[local_N])[:-1]
        pieces = zip(
            local_N, np.split(codes_E, code_ends), np.split(text_E, text_ends), strict=True
        )
        return [
            Document(
                key="",
                text=text,
                codes_thw=None if self.kind_N[i] == TEXT else codes.reshape(self.grid_N3[i]),
                fps=float(self.fps_N[i]),
                frames=int(self.frames_N[i]),
            )
            for i, codes, text in pieces
        ]

    def keys(self) -> list[str]:
        """The source keys of all documents, in order."""
        return self._column("keys").tobytes().decode().split("\n")[:-1]

    def verify(self) -> None:
        """Reads everything; StoreError for the first column that differs from its checksum."""
        for name, wanted in self.info["crc32c"].items():
            found = f"{checksum.crc32c(self._column(name)):08x}"
            if found != wanted:
                raise self._damaged(f"{name} has crc32c {found}, part.json says {wanted}")

    def _column(self, name: str) -> np.ndarray:
        try:
            return np.asarray(arrays.open_read(self.path / name).read().result())
        except ValueError as error:
            raise self._damaged(_first_line(error)) from error

    def _damaged(self, reason: str) -> StoreError:
        return StoreError(
            f"{self.path} is damaged: {reason}; remove it and run its encode job again"
        )


def read_json(path: pathlib.Path) -> dict | None:
    """The object in a JSON file, None if there is no file; StoreError if it is no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise StoreError(
            f"{path} is no JSON ({error}); remove {path.parent} and encode it again"
        ) from error


def write_json(path: pathlib.Path, value: dict) -> None:
    """Replaces the file in one move, so that it is there whole or not at all.

    Several processes may write the same value at once. What killed ones left is removed.
    """
    text = json.dumps(value, indent=1) + "\n"
    while not (path.exists() and path.read_text() == text):
        # Not the process id: those of two containers may be the same.
        written = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        written.write_text(text)
        with contextlib.suppress(FileNotFoundError):  # removed by another that was done first
            os.replace(written, path)
    for left in path.parent.glob(f"{path.name}.*.tmp"):
        left.unlink(missing_ok=True)


def _columns(documents: list[Document]) -> dict[str, np.ndarray]:
    for document in documents:
        if "\n" in document.key:
            raise ValueError(f"key {document.key!r} has a newline; give the document another key")
        if document.codes_thw is not None and int(document.codes_thw.max()) >= 1 << 16:
            raise ValueError(
                f"{document.key}: code {document.codes_thw.max()} does not fit the store's uint16"
            )
    codes = [_NO_CODES if d.codes_thw is None else d.codes_thw.ravel() for d in documents]
    grids = [(0, 0, 0) if d.codes_thw is None else d.codes_thw.shape for d in documents]
    values = {
        "codes": np.concatenate([_NO_CODES, *codes]),
        "code_offsets": np.cumsum([0] + [len(c) for c in codes]),
        "text": np.concatenate([np.zeros(0, np.uint32), *(d.text for d in documents)]),
        "text_offsets": np.cumsum([0] + [len(d.text) for d in documents]),
        "kind": np.array([d.kind for d in documents]),
        "grid": np.array(grids).ravel(),
        "fps": np.array([d.fps for d in documents]),
        "frames": np.array([d.frames for d in documents]),
        "keys": np.frombuffer("".join(d.key + "\n" for d in documents).encode(), np.uint8),
    }
    return {name: values[name].astype(dtype) for name, dtype in COLUMNS.items()}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
