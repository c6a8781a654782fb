"""What others wrote, read in bounded time and memory: JSON, the paths in it, NumPy archives.

Whatever is wrong with it is a ValueError in one line. Nothing here runs or unpickles anything.
"""

import json
import math
import pathlib
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

LARGEST_JSON = 2**26  # bytes of a file of JSON: as Python objects it may take twenty times as much
LARGEST_ARRAYS = 2**30  # bytes of all arrays of an archive, unpacked
DEEPEST = 64  # levels of objects and arrays: nothing that later goes through them can recurse far


def parse(text: str | bytes) -> Any:
    """The value of a JSON text (of bytes: UTF-8, 16 or 32); ValueError says why it is none."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    brackets = "[{" if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, brackets)) > DEEPEST:  # else it cannot be deep: most records are done
        check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """ValueError for lists and dictionaries within each other in more than DEEPEST levels."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            child
            for node in level
            if isinstance(node, list | dict)
            for child in (node if isinstance(node, list) else node.values())
        ]
        if not level:
            return
    raise ValueError("nested too deeply")


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError names a file that holds none or cannot be read."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"more than {LARGEST_JSON:,} bytes")
        value = parse(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {short(value)}, no JSON object")
    return value


def check(record: dict, fields: dict[str, Callable[[Any], bool]]) -> None:
    """ValueError unless each field is there and its predicate (below) holds."""
    for name, fits in fields.items():
        if name not in record:
            raise ValueError(f"{name} is missing")
        if not fits(record[name]):
            kind = fits.__name__.replace("_", " ")
            raise ValueError(f"{name} is {short(record[name])}, want {kind}")


def count(value: Any) -> bool:
    """A whole number that an index can be: 0 or more, below 2**63."""
    return type(value) is int and 0 <= value < 2**63


def size(value: Any) -> bool:
    """A whole number that a dimension of an array can be: 1 or more, below 2**31."""
    return type(value) is int and 0 < value < 2**31


def sizes(value: Any) -> bool:
    """A list of a few sizes."""
    return isinstance(value, list) and len(value) <= DEEPEST and all(map(size, value))


def counts(value: Any) -> bool:
    """A list of a few counts."""
    return isinstance(value, list) and len(value) <= DEEPEST and all(map(count, value))


def mapping(value: Any) -> bool:
    """An object of JSON."""
    return isinstance(value, dict)


def counts_by_name(value: Any) -> bool:
    """An object whose values are counts."""
    return isinstance(value, dict) and all(map(count, value.values()))


def number(value: Any) -> bool:
    """A finite number, whole or not."""
    return type(value) in (int, float) and abs(value) < 1e300


def text(value: Any) -> bool:
    """A string that can be written as UTF-8."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:  # half a character, a surrogate: JSON can spell it
        return False


def below(root: pathlib.Path, name: Any) -> pathlib.Path:
    """The path of a file that is named relative to `root`; ValueError if it would lie elsewhere."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{short(name)} is no name of a file")
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"{short(name)} leads out of {root}")
    return root / name


def short(value: Any) -> str:
    """A value as a message shows it: its beginning."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz; ValueError for no such file, objects, or too large or broken ones.

    Headers are compared with the archive's own sizes before anything is allocated.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > LARGEST_ARRAYS:
                raise ValueError(f"more than {LARGEST_ARRAYS:,} bytes")
            return {
                info.filename.removesuffix(".npy"): _read_array(archive, info)
                for info in archive.infolist()
            }
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no readable archive of arrays: {error}") from None


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{info.filename} is of format {version}")
        read = np.lib.format.read_array_header_1_0
        read = read if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
            raise ValueError(f"{info.filename} holds something else than {dtype} {shape}")
        data = file.read(info.file_size)
    return np.ndarray(shape, dtype, data, order="F" if fortran else "C")
