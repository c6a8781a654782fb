"""Text files as a source of records: plain text, JSON lines and Parquet, read as streams.

All files of a source, one after the other, are cut into parts of equally many bytes. A record
belongs to the part in which it begins: a line by its first byte, a row of Parquet by its row
group's, a file that is one document or is compressed (.gz) by its own. Documents between blank
lines belong to the part where the blank line before them begins. So a part follows from the files'
names and sizes, is read without any other, and a file of hundreds of GB is in many parts.
"""

import bisect
import dataclasses
import gzip
import itertools
import os
import pathlib
import sys
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from data_pipelines import chat
from emu3_jax import untrusted

DOCUMENTS = ("file", "blank", "line")
_LONGEST = 1 << 26  # bytes of a record; a longer one is bad, so that memory is bounded
_ROWS = 256  # of Parquet that are decoded at once
_BOM = b"\xef\xbb\xbf"


class BadText(ValueError):
    """A record that cannot be used; the message names its place."""


@dataclasses.dataclass
class Record:
    """A text, or the turns of a conversation as chat.read gives them; `key` names it.

    `size` counts the units of its source, bytes or records, that were read to come to it.
    """

    key: str
    value: str | list[tuple[str, str]]
    size: float


@dataclasses.dataclass(frozen=True)
class Piece:
    """Bytes from `begin` to `end` of a file of `size`; `name` tells it within its directory."""

    path: pathlib.Path
    name: str
    size: int
    begin: int
    end: int


class TextFiles:
    """The files of a directory that match a pattern, in the order of their names.

    Names that end with .jsonl or .parquet, and of them also .jsonl.gz, are read as that, each line
    or row being a record whose `field` holds a text or a conversation. Any others are plain text
    (also .gz), whose `documents` are whole files, between blank lines or lines.
    """

    unit = "bytes"

    def __init__(self, directory: str, files: str, field: str, documents: str):
        """Raises ValueError for a directory without such files or an unknown `documents`."""
        if documents not in DOCUMENTS:
            raise ValueError(f"documents {documents!r} is none of {', '.join(DOCUMENTS)}")
        self.name, self._field, self._documents = str(directory), field, documents
        root = pathlib.Path(directory)
        found = {p.relative_to(root).as_posix(): p for p in root.glob(files) if p.is_file()}
        if not found:
            raise ValueError(f"no file in {directory} matches {files!r}; change texts or files")
        self._files = [(found[name], name, found[name].stat().st_size) for name in sorted(found)]
        # One more for each file: an empty one has a place, and so is not passed over in silence.
        self._first = [0, *itertools.accumulate(size + 1 for _, _, size in self._files)]

    def pieces(self, part: int, parts: int) -> list[Piece]:
        """What a part has of the files."""
        total = self._first[-1]
        begin, end = part * total // parts, (part + 1) * total // parts
        pieces = []
        for number in range(bisect.bisect_right(self._first, begin) - 1, len(self._files)):
            path, name, size = self._files[number]
            first = self._first[number]
            if first >= end:
                break
            piece = Piece(path, name, size, max(0, begin - first), min(size + 1, end - first))
            if piece.begin < piece.end:
                pieces.append(piece)
        return pieces

    def size(self, part: int, parts: int) -> int:
        """How many bytes a part has."""
        return sum(piece.end - piece.begin for piece in self.pieces(part, parts))

    def made_of(self, part: int, parts: int) -> Any:
        """What the records of a part follow from, as JSON values: not the contents of the files."""
        pieces = [[p.name, p.size, p.begin, p.end] for p in self.pieces(part, parts)]
        return [self._field, self._documents, pieces]

    def read(self, part: int, parts: int) -> Iterator[Record | BadText]:
        """The records of a part, in order. Raises ValueError for Parquet without the field."""
        for piece in self.pieces(part, parts):
            try:
                yield from self._parquet(piece) if _is(piece, ".parquet") else self._raw(piece)
            except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
                reason = untrusted.first_line(error)
                yield BadText(f"{piece.path}: cannot be read on ({reason})")

    def _raw(self, piece: Piece) -> Iterator[Record | BadText]:
        """Records of a file of lines or plain text."""
        json_lines = _is(piece, ".jsonl") or _is(piece, ".jsonl.gz")
        documents = "line" if json_lines else self._documents
        whole = documents == "file" or piece.name.endswith(".gz")
        if whole and piece.begin:
            return
        piece = dataclasses.replace(piece, end=sys.maxsize) if whole else piece
        lines, done = _Lines(piece), piece.begin
        with piece.path.open("rb") as file:
            opened = gzip.open(file) if piece.name.endswith(".gz") else file
            for offset, content in _SPLITS[documents](opened, piece):
                try:
                    value = self._value(content, json_lines)
                except ValueError as error:
                    yield BadText(f"{piece.path}, line {lines.number(offset)}: {error}")
                else:
                    key = piece.name if documents == "file" else f"{piece.name}@{offset}"
                    yield Record(key, value, file.tell() - done)
                    done = file.tell()

    def _value(self, content: bytes | None, json_lines: bool) -> Any:
        if content is None:
            raise ValueError(f"longer than {_LONGEST} bytes")
        try:
            text = content.removeprefix(_BOM).rstrip(b"\r\n").decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"no UTF-8 ({error.reason} at its byte {error.start})") from None
        if not json_lines:
            return usable(text)
        try:
            entry = untrusted.parse(text)
        except ValueError as error:
            raise ValueError(f"no JSON ({error})") from None
        if not isinstance(entry, dict) or self._field not in entry:
            has = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
            raise ValueError(f"no field {self._field!r}; it has {has}")
        return usable(entry[self._field])

    def _parquet(self, piece: Piece) -> Iterator[Record | BadText]:
        with pyarrow.parquet.ParquetFile(piece.path) as file:
            if self._field not in file.schema_arrow.names:
                raise ValueError(
                    f"{piece.path} has no column {self._field!r}; "
                    f"it has {', '.join(file.schema_arrow.names)}"
                )
            row = 0
            for number in range(file.num_row_groups):
                first, size = _extent(file.metadata.row_group(number))
                rows = file.metadata.row_group(number).num_rows
                if piece.begin <= first < piece.end:
                    batches = file.iter_batches(_ROWS, [number], [self._field])
                    cells = (cell for batch in batches for cell in batch.column(0))
                    for index, cell in enumerate(cells, start=row):
                        try:
                            value = usable(cell.as_py())
                        except ValueError as error:
                            yield BadText(f"{piece.path}, row {index}: {error}")
                        else:
                            yield Record(f"{piece.name}@{index}", value, size / rows)
                row += rows


def usable(value: Any) -> str | list[tuple[str, str]]:
    """A record's value: a text, or a conversation's turns; ValueError says why it is none."""
    if chat.is_conversation(value):
        turns = chat.read(value)
        for text in itertools.chain(*turns):
            text.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
        return turns
    if not isinstance(value, str | None):
        raise ValueError(f"of type {type(value).__name__}, neither text nor a list of turns")
    if not value or value.isspace():
        raise ValueError("empty")
    value.encode()
    return value


class _Lines:
    """Numbers of a file's lines, counted when they are asked for: parts know bytes alone."""

    def __init__(self, piece: Piece):
        self._piece, self._at, self._number = piece, 0, 1

    def number(self, offset: int) -> int:
        """Of the line at `offset`, counted from 1; offsets must not fall."""
        opens = gzip.open if self._piece.name.endswith(".gz") else open
        with opens(self._piece.path, "rb") as file:
            file.seek(self._at)
            while self._at < offset:
                block = file.read(min(1 << 20, offset - self._at))
                self._number += block.count(b"\n")
                self._at += len(block)
        return self._number


def _is(piece: Piece, suffix: str) -> bool:
    return piece.name.lower().endswith(suffix)


def _extent(group: Any) -> tuple[int, int]:
    """Where a row group begins in its file, and how many bytes it has there."""
    columns = [group.column(i) for i in range(group.num_columns)]
    begins = [c.dictionary_page_offset or c.data_page_offset for c in columns]
    return min(begins), sum(c.total_compressed_size for c in columns)


def _whole(file: BinaryIO, piece: Piece) -> Iterator[tuple[int, bytes | None]]:
    content = file.read(_LONGEST + 1)
    yield 0, content if len(content) <= _LONGEST else None


def _by_line(file: BinaryIO, piece: Piece) -> Iterator[tuple[int, bytes | None]]:
    """The lines that begin in a piece and are not blank."""
    for offset, line in _lines(file, piece.begin):
        if offset >= piece.end:
            return
        if line is None or line.strip():
            yield offset, line


def _by_blank(file: BinaryIO, piece: Piece) -> Iterator[tuple[int, bytes | None]]:
    """What stands between blank lines, each by the one before it; the file begins after one."""
    inside, begin, held, size = piece.begin == 0, 0, [], 0
    for offset, line in itertools.chain(_lines(file, piece.begin), [(piece.end, b"")]):
        blank = line is not None and not line.strip()
        if inside and not blank:
            begin = begin if size else offset
            size += len(line) if line is not None else _LONGEST + 1
            held = held if size <= _LONGEST else []
            held.append(line)
        elif size and inside:
            yield begin, b"".join(held) if size <= _LONGEST else None
            held, size = [], 0
        if offset >= piece.end and (blank or not inside):
            return
        inside = inside or blank


def _lines(file: BinaryIO, begin: int) -> Iterable[tuple[int, bytes | None]]:
    """All lines from `begin` on with where they begin; None for one that is too long."""
    at = max(0, begin - 1)
    file.seek(at, os.SEEK_SET)
    if begin:
        at += sum(map(len, _rest(file)))
    while line := file.readline(_LONGEST + 1):
        if len(line) > _LONGEST and not line.endswith(b"\n"):
            yield at, None
            at += len(line) + sum(map(len, _rest(file)))
        else:
            yield at, line
            at += len(line)


def _rest(file: BinaryIO) -> Iterator[bytes]:
    """What is left of a line, in pieces."""
    while piece := file.readline(1 << 20):
        yield piece
        if piece.endswith(b"\n"):
            return


_SPLITS = {"file": _whole, "line": _by_line, "blank": _by_blank}
