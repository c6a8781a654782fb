"""Tar files as WebDataset has them, as a source of records that are read by their number.

Files of one name up to its first dot, which follow each other, are a record: an image or a video
(the first, if there are more), and its caption in .txt or as "caption" in .json, whose other
numbers and strings are columns. Where they begin is read off the tar's headers, once, when the
source is opened.

A tar that is damaged or cut short is an error then, since what is missing would shift the numbers
of all records behind it. A record without an image or with .json that is none is bad by itself.

Legend: N records of a tar, F files of a record (media, txt, json), 2 first byte and length.
"""

import concurrent.futures
import dataclasses
import io
import os
import pathlib
import re
import tarfile
from typing import Any, BinaryIO

import numpy as np

from data_pipelines import entries, image_folder, sources
from emu3_jax import tar, untrusted

_FILES = ("media", "txt", "json")
_NAME = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<ending>[^/]+)")


class WebDataset:
    """A random-access source: `data[i]` is a Record or a Video, or raises BadFile.

    Keys are TAR/NAME, the name with the ending of its image or video.
    """

    def __init__(self, shards: str):
        """`shards` as sources.match takes it.

        Raises ValueError for no tar files, for one that is damaged or none, for no records.
        """
        paths = sources.match(shards, ".tar")
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            self._shards = list(pool.map(_read_headers, paths))
        self._first = np.cumsum([0] + [len(shard.names) for shard in self._shards])
        if not len(self):
            raise ValueError(f"{shards}: no record in {len(paths)} tar files; give those with some")
        self.has_videos = any(entries.is_video(name) for s in self._shards for name in s.names)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Any:
        return sources.read(self, index)

    def entry(self, index: int) -> sources.Entry:
        """Key, caption and columns of a record; BadFile for .json that is none."""
        shard, row = self._find(index)
        columns = _columns(shard, row)
        caption, text = columns.pop("caption", ""), shard.read(row, "txt")
        if text is not None:
            caption = text.decode("utf-8", "replace").strip()
        return sources.Entry(f"{shard.path.name}/{shard.names[row]}", str(caption), columns)

    def file(self, index: int) -> BinaryIO:
        """The image or video of a record, where it lies in its tar."""
        shard, row = self._find(index)
        place = shard.place(row, "media")
        if place is None:
            raise image_folder.BadFile(f"{shard.file_name(row)}: no image or video of this name")
        return io.BufferedReader(_Section(shard.path, shard.file_name(row), *place))

    def _find(self, index: int) -> tuple["_Shard", int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._shards[number], index - int(self._first[number])


@dataclasses.dataclass
class _Shard:
    """A tar's records: their names, and where their files begin (-1: no such file)."""

    path: pathlib.Path
    names: list[str]
    place_NF2: np.ndarray

    def file_name(self, row: int) -> str:
        """What errors call a record."""
        return f"{self.path}/{self.names[row]}"

    def place(self, row: int, kind: str) -> tuple[int, int] | None:
        """First byte and length of a file of a record."""
        start, length = self.place_NF2[row, _FILES.index(kind)].tolist()
        return None if start < 0 else (start, length)

    def read(self, row: int, kind: str) -> bytes | None:
        """A file of a record as a whole; BadFile if it is too long."""
        place = self.place(row, kind)
        if place and place[1] > entries.LONGEST:
            name = f"{self.file_name(row)}: its .{kind}"
            raise image_folder.BadFile(f"{name} has {place[1]} bytes, more than {entries.LONGEST}")
        return place and _Section(self.path, self.file_name(row), *place).readall()


class _Section(io.RawIOBase):
    """A stretch of a file as a file. It closes with the last reference to it."""

    def __init__(self, path: pathlib.Path, name: str, start: int, length: int):
        self.name, self._start, self._length, self._at = name, start, length, 0
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(wanted)
        self._at += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _read_headers(path: pathlib.Path) -> _Shard:
    names, places, last = [], [], None
    for name, start, length in _files(path):
        found = _NAME.fullmatch(name)
        if not found:
            continue
        key, ending = found["key"], f".{found['ending'].lower()}"
        if key != last:
            last = key
            names.append(key)
            places.append([(-1, 0)] * len(_FILES))
        kind = "media" if ending in entries.IMAGES + entries.VIDEOS else ending[1:]
        if kind not in _FILES or (kind == "media" and places[-1][0][0] >= 0):
            continue
        places[-1][_FILES.index(kind)] = start, length
        if kind == "media":
            names[-1] = name
    return _Shard(path, names, np.array(places, np.int64).reshape(-1, len(_FILES), 2))


def _files(path: pathlib.Path) -> list[tuple[str, int, int]]:
    """Name, first byte and length of all files in a tar; ValueError if it is none or not whole."""
    advice = "get it anew, or leave it out of shards"
    try:
        with path.open("rb") as file:
            return list(tar.files(file))
    except tarfile.ReadError as error:
        raise ValueError(f"{path} is {error}; {advice}") from error


def _columns(shard: _Shard, row: int) -> dict[str, Any]:
    """The numbers and strings of a record's .json."""
    text = shard.read(row, "json")
    try:
        values = untrusted.parse(text or b"{}")
    except ValueError as error:
        raise image_folder.BadFile(f"{shard.file_name(row)}: its .json is none ({error})") from None
    if not isinstance(values, dict):
        raise image_folder.BadFile(f"{shard.file_name(row)}: its .json is no object")
    return {name: v for name, v in values.items() if isinstance(v, str | int | float)}
