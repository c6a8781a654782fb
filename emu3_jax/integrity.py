"""Is a checkpoint whole? It is read back once it is written, and looked at again before it is used.

STEP/about and STEP/state are Orbax's. When Orbax has committed them, process k of n reads its share
of the arrays back from storage, a chunk at a time, and leaves in STEP/verified/k-of-n.json what it
found: by array the sum over its chunks (fingerprint.partial), by file the size and CRC-32. The
checkpoint counts when all n are there and the sums are those that the devices had of their arrays
before anything was written, which are in STEP/about. What is wrong is told in one line that names
the file.
"""

import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Iterator

import numpy as np
import tensorstore

from emu3_jax import fingerprint, packages, untrusted

VERIFIED = "verified"
_ABOUT = pathlib.PurePath("about", "metadata")
_MARKER = re.compile(r"(\d{1,6})-of-(\d{1,6})\.json")
_FOUND = dict(files=untrusted.mapping, sums=untrusted.counts_by_name)
_BLOCK = 1 << 24  # bytes
_CACHE = 1 << 26  # bytes of the index of arrays, of which each chunk's place would be read anew


def read_about(path: pathlib.Path) -> dict:
    """What a checkpoint says of itself; ValueError names the file that does not."""
    mappings = dict.fromkeys(("config", "data", "packages", "types"), untrusted.mapping)
    numbers = dict(step=untrusted.count, fingerprints=untrusted.counts_by_name)
    return _read(path / _ABOUT, **numbers, **mappings)


def verify(path: pathlib.Path, index: int, count: int) -> None:
    """Reads back share `index` of `count` of a checkpoint and leaves what it found."""
    files = {name: _size_and_crc(path / name) for name in _files(path)[index::count]}
    sums = dict.fromkeys(read_about(path)["fingerprints"], 0)
    for number, (name, chunk, begins) in enumerate(_chunks(path, sums)):
        if number % count == index:
            read = fingerprint.partial(np.asarray(chunk.read().result()), begins)
            sums[name] = (sums[name] + read) % 2**32
    folder = path / VERIFIED
    text = json.dumps(dict(files=files, sums=sums))
    packages.write_whole(folder / f"{index}-of-{count}.json", text.encode())


def verified(path: pathlib.Path) -> bool:
    """Whether all shares of a checkpoint have been read back."""
    return bool(_markers(path))


def damage(path: pathlib.Path, share: tuple[int, int] | None = None) -> str:
    """What is wrong with a checkpoint that was read back; "" if nothing is.

    The sums and the sizes of all files are looked at, and the contents of those of a share (index,
    count), if given.
    """
    try:
        about = read_about(path)
        markers = [_read(marker, **_FOUND) for marker in _markers(path)]
        if not markers:
            raise ValueError(f"{path / VERIFIED} lacks what was read back")
        _check_sums(path, about["fingerprints"], markers)
        files = {name: found for marker in markers for name, found in marker["files"].items()}
        _check_sizes(path, files)
        for name in sorted(files)[slice(share[0], None, share[1])] if share else ():
            if _size_and_crc(path / name)[1] != files[name][1]:
                raise ValueError(f"{path / name} has other contents than when it was read back")
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def _read(path: pathlib.Path, **fields) -> dict:
    found = untrusted.read_object(path)
    try:
        untrusted.check(found, fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found


def _check_sums(path: pathlib.Path, wanted: dict[str, int], markers: list[dict]) -> None:
    for name, want in wanted.items():
        if sum(marker["sums"].get(name, 0) for marker in markers) % 2**32 != want:
            raise ValueError(f"{path}: {name} reads otherwise than it was on the devices")


def _check_sizes(path: pathlib.Path, files: dict) -> None:
    for name, found in files.items():
        file = untrusted.below(path, name)
        if not untrusted.counts(found) or len(found) != 2:
            raise ValueError(f"{path / VERIFIED}: {untrusted.short(found)} is no (size, CRC-32)")
        size = file.stat().st_size if file.is_file() else None
        if size != found[0]:
            says = "is missing" if size is None else f"has {size:,} bytes, not {found[0]:,}"
            raise ValueError(f"{file} {says}")


def _markers(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of all processes of a verification that is complete; [] if none is."""
    found: dict[int, dict[int, pathlib.Path]] = {}
    for marker in (path / VERIFIED).glob("*.json"):
        if match := _MARKER.fullmatch(marker.name):
            found.setdefault(int(match[2]), {})[int(match[1])] = marker
    complete = [markers for count, markers in found.items() if markers.keys() == set(range(count))]
    return list(complete[0].values()) if complete else []


def _files(path: pathlib.Path) -> list[str]:
    """The names of all files of a checkpoint but what `verify` leaves, in order."""
    found = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    return sorted(str(name) for name in found if name.parts[0] != VERIFIED)


def _size_and_crc(path: pathlib.Path) -> tuple[int, int]:
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return size, crc


def _chunks(path: pathlib.Path, names) -> Iterator[tuple[str, tensorstore.TensorStore, tuple]]:
    """Every chunk of every array, unread, with its first index along each dimension."""
    # A context of its own: what one read-back has cached is read from storage by the next.
    context = tensorstore.Context({"cache_pool#index": {"total_bytes_limit": _CACHE}})
    store = {"driver": "ocdbt", "base": f"file://{path.absolute()}/state/",
             "cache_pool": "cache_pool#index"}  # fmt: skip
    for name in sorted(names):
        array = tensorstore.open({"driver": "zarr", "kvstore": store, "path": name},
                                 open=True, read=True, context=context).result()  # fmt: skip
        sizes = array.chunk_layout.read_chunk.shape or ()  # None of a scalar
        steps = (range(0, length, size) for length, size in zip(array.shape, sizes, strict=True))
        for begins in itertools.product(*steps):
            piece = tuple(slice(begin, min(begin + size, length)) for begin, size, length
                          in zip(begins, sizes, array.shape, strict=True))  # fmt: skip
            yield name, array[piece], begins
