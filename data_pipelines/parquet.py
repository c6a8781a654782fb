"""Parquet files with images in a column, as a source of records that are read by their number.

A row group is the least that is read, without its images where only keys and captions are asked
for. Those read last stay in memory, so small groups, or parts of few of them, are read but once.
"""

import collections
import concurrent.futures
import io
import pathlib
import threading
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from data_pipelines import entries, image_folder, sources
from emu3_jax import untrusted

LARGEST = 1 << 32  # bytes of a row group, unpacked
_HELD = 1 << 30  # bytes of row groups that are kept of images, and as many of everything else
_ROWS = 1024  # that are unpacked at once


class Parquet:
    """A random-access source: `data[i]` is a Record or a Video, or raises BadFile.

    Columns of numbers and strings that are neither caption nor key are an entry's columns.
    """

    def __init__(self, files: str, image: str = "image", caption: str = "caption", key: str = ""):
        """Args as sources.Parquet has them.

        Raises ValueError for no files, one that is damaged, a column that is not there or of
        another kind, or no rows.
        """
        paths = sources.match(files, ".parquet")
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            found = list(pool.map(_open, paths))
        self._image, self._caption, self._key = image, caption, key
        self._check_columns(paths, [schema for schema, _ in found])
        self._groups = [group for _, groups in found for group in groups]
        self._first = np.cumsum([0] + [group.rows for group in self._groups])
        if not len(self):
            raise ValueError(f"{files}: no rows in {len(paths)} files; give those with some")
        texts = [field.name for field in found[0][0] if _is_plain(field.type)]
        self._texts, self._images = _Held(self._groups, texts), _Held(self._groups, [image])
        self._columns = [name for name in texts if name not in (caption, key)]
        self.has_videos = bool(key) and any(_has_videos(path, key) for path in paths)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Any:
        return sources.read(self, index)

    def entry(self, index: int) -> sources.Entry:
        """Key, caption ("" for none) and columns of a row, those without a value left out."""
        group, row = self._find(index)
        table, place = self._texts[group], self._groups[group]
        key = _value(place, table, self._key, row) if self._key else None
        caption = _value(place, table, self._caption, row) if self._caption else None
        values = {name: _value(place, table, name, row) for name in self._columns}
        values = {name: value for name, value in values.items() if value is not None}
        return sources.Entry(key or f"{place.path.name}/{place.first + row}", caption or "", values)

    def file(self, index: int) -> BinaryIO:
        """The image or video of a row; BadFile if there is none or it cannot be read."""
        group, row = self._find(index)
        place = self._groups[group]
        name = f"{place.path}, row {place.first + row}"
        value = _value(place, self._images[group], self._image, row)
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            raise image_folder.BadFile(f"{name}: no bytes in column {self._image!r}")
        file = io.BytesIO(data)
        file.name = name
        return file

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        group = int(np.searchsorted(self._first, index, side="right")) - 1
        return group, index - int(self._first[group])

    def _check_columns(self, paths: list[pathlib.Path], schemas: list[pa.Schema]) -> None:
        for path, schema in zip(paths, schemas, strict=True):
            if schema != schemas[0]:
                raise ValueError(
                    f"{path} has columns {_names(schema)} of other kinds or names than {paths[0]} "
                    f"with {_names(schemas[0])}; give files of one sort"
                )
        wanted = {
            self._image: ("bytes or {bytes, path}", _is_image),
            self._caption: ("strings", _is_string),
            self._key: ("strings", _is_string),
        }
        for name, (kind, fits) in wanted.items():
            if name and name not in schemas[0].names:
                raise ValueError(f"{paths[0]} has no column {name!r}; it has {_names(schemas[0])}")
            if name and not fits(schemas[0].field(name).type):
                found = schemas[0].field(name).type
                raise ValueError(f"{paths[0]}: column {name!r} is of {found}; take one of {kind}")


class _Group(NamedTuple):
    """A row group: its file, number and first row there, and how many rows it has."""

    path: pathlib.Path
    number: int
    first: int
    rows: int


class _Held:
    """Columns of row groups, read when asked for; the last ones stay, up to _HELD bytes."""

    def __init__(self, groups: list[_Group], columns: list[str]):
        self._groups, self._columns, self._bytes = groups, columns, 0
        self._tables: collections.OrderedDict[int, pa.Table] = collections.OrderedDict()
        self._lock = threading.Lock()  # so that threads do not read a group twice

    def __getitem__(self, group: int) -> pa.Table:
        with self._lock:
            if group not in self._tables:
                self._tables[group] = self._read(self._groups[group])
                self._bytes += self._tables[group].nbytes
            self._tables.move_to_end(group)
            while len(self._tables) > 1 and self._bytes > _HELD:
                self._bytes -= self._tables.popitem(last=False)[1].nbytes
            return self._tables[group]

    def _read(self, group: _Group) -> pa.Table:
        batches, size = [], 0
        try:
            with pa.parquet.ParquetFile(group.path) as file:
                # Not as a whole: what its metadata says of its size need not be so.
                for batch in file.iter_batches(_ROWS, [group.number], self._columns):
                    batches.append(batch)
                    size += batch.nbytes
                    if size > LARGEST:
                        raise pa.ArrowInvalid(f"it has more than {LARGEST:,} bytes")
            rows = sum(batch.num_rows for batch in batches)
            if rows != group.rows:
                raise pa.ArrowInvalid(f"it has {rows} rows of {group.rows}")
            return pa.Table.from_batches(batches)
        except (pa.ArrowException, OSError) as error:
            said = untrusted.first_line(error)
            raise image_folder.BadFile(
                f"{group.path}: row group {group.number} cannot be read ({said})"
            ) from error


def _open(path: pathlib.Path) -> tuple[pa.Schema, list[_Group]]:
    try:
        with pa.parquet.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow.remove_metadata(), file.metadata
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    size = path.stat().st_size
    if min(rows, default=0) < 0 or sum(rows) > size:  # not even a byte for each image
        raise ValueError(f"{path} is damaged: {sum(rows)} rows in {size} bytes; get it anew")
    return schema, [_Group(path, n, sum(rows[:n]), count) for n, count in enumerate(rows)]


def _has_videos(path: pathlib.Path, key: str) -> bool:
    try:
        with pa.parquet.ParquetFile(path) as file:
            return any(
                entries.is_video(name or "")
                for batch in file.iter_batches(columns=[key])
                for name in batch.column(0).to_pylist()
            )
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: pathlib.Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is no Parquet file, or cut short ({untrusted.first_line(error)}); get it anew, or "
        "leave it out of files"
    )


def _value(group: _Group, table: pa.Table, column: str, row: int) -> Any:
    try:
        return table.column(column)[row].as_py()
    except UnicodeDecodeError as error:
        name = f"{group.path}, row {group.first + row}"
        raise image_folder.BadFile(f"{name}: column {column!r} is no UTF-8 ({error})") from error


def _names(schema: pa.Schema) -> str:
    return ", ".join(schema.names)


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_plain(kind: pa.DataType) -> bool:
    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return _is_string(kind) or any(fits(kind) for fits in numbers)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_image(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
