"""Safetensors directories, read and written in pieces of bounded size, in one or many shards.

A tensor here is a promise: name, shape and type, and a way to go through its rows. So a checkpoint
of any size passes from one directory to another in memory that does not grow with it. (The
safetensors package reads slices but writes only what is in memory whole.)
"""

import dataclasses
import json
import pathlib
import struct
from collections.abc import Callable, Iterable, Iterator

import ml_dtypes
import numpy as np
import safetensors

from emu3_jax import untrusted

CHUNK_BYTES = 64 * 2**20
SHARD_BYTES = 5_000_000_000
_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclasses.dataclass
class Tensor:
    """A tensor to come: `chunks()` yields its rows in order, some at a time (a scalar whole)."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """All of it, in memory."""
        pieces = [chunk.reshape(-1) for chunk in self.chunks()]
        return np.concatenate([np.empty(0, self.dtype), *pieces]).reshape(self.shape)

    @classmethod
    def of(cls, name: str, array: np.ndarray) -> "Tensor":
        """An array that is already in memory."""
        array = np.asarray(array)
        return cls(name, array.shape, array.dtype, lambda: iter([array]))


def row_ranges(shape: tuple[int, ...], itemsize: int) -> Iterator[slice]:
    """Yields slices of the first axis that cover it, each of at most CHUNK_BYTES (or one row)."""
    row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * itemsize
    rows = max(1, CHUNK_BYTES // max(1, row_bytes))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def is_there(path: pathlib.Path) -> bool:
    """Whether `path` holds any safetensors file."""
    return path.is_dir() and any(path.glob("*.safetensors"))


def read(path: pathlib.Path, prefix: str = "") -> dict[str, Tensor]:
    """Returns the tensors of a directory by name; nothing is read yet but the headers.

    None but those whose names begin with `prefix`. With an index, exactly the files it names for
    them are read. ValueError for a missing or broken file, one that the index looks for elsewhere,
    or a tensor that it misplaces.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        place = {name: file for name, file in _weight_map(index).items() if name.startswith(prefix)}
        files = sorted(set(place.values()))
    else:
        place, files = None, sorted(file.name for file in path.glob("*.safetensors"))
    tensors = {}
    for file in files:
        if not (path / file).is_file():
            raise ValueError(f"{index} names {file}, which is not there; copy all shards")
        tensors |= _headers(path / file)
    lost = [name for name in place or {} if name not in tensors]
    if lost:
        raise ValueError(f"{index} names tensor {lost[0]}, which is in none of its shards")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def write(tensors: Iterable[Tensor], path: pathlib.Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes tensors in order into shards of at most `shard_bytes` (or one tensor), with an index.

    One shard is called model.safetensors and has no index, as Hugging Face has it.
    """
    shards, size = [[]], 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        _write_file(shards[0], path / "model.safetensors")
        return
    place = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(shard, path / file)
        place |= {tensor.name: file for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = dict(metadata=dict(total_size=total), weight_map=dict(sorted(place.items())))
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def remove(path: pathlib.Path) -> None:
    """Deletes the shards and the index that an earlier `write` left in `path`."""
    for pattern in ("model*.safetensors", "model.safetensors.index.json"):
        for file in path.glob(pattern):
            file.unlink()


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    """Which file beside `index` has which tensor."""
    place = untrusted.read_object(index).get("weight_map")
    if not isinstance(place, dict):
        raise ValueError(f"{index} has no weight_map; get it anew")
    for file in place.values():
        try:
            untrusted.below(index.parent, file)
        except ValueError as error:
            raise ValueError(f"{index}: {error}") from None
    return place


def _headers(file: pathlib.Path) -> dict[str, Tensor]:
    tensors = {}
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                stored = opened.get_slice(name)
                code, shape = stored.get_dtype(), tuple(stored.get_shape())
                if code not in _DTYPES:
                    raise ValueError(
                        f"{file}: tensor {name} is stored as {code}; "
                        f"this project reads {', '.join(_DTYPES)}"
                    )
                tensors[name] = Tensor(name, shape, _DTYPES[code], _reader(file, name))
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no readable safetensors file: {error}") from None
    return tensors


def _reader(file: pathlib.Path, name: str) -> Callable[[], Iterator[np.ndarray]]:
    def chunks():
        with safetensors.safe_open(file, framework="numpy") as opened:
            stored = opened.get_slice(name)
            shape = stored.get_shape()
            if not shape:
                yield opened.get_tensor(name)
                return
            for rows in row_ranges(shape, _DTYPES[stored.get_dtype()].itemsize):
                yield stored[rows]

    return chunks


def _write_file(tensors: list[Tensor], file: pathlib.Path) -> None:
    """The format: header length (8 bytes), JSON header, then the tensors' bytes end to end."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = dict(
            dtype=_CODES[tensor.dtype], shape=list(tensor.shape), data_offsets=[start, end]
        )
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # readers want the data aligned
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            before = out.tell()
            for chunk in tensor.chunks():
                assert chunk.dtype == tensor.dtype, (tensor.name, chunk.dtype, tensor.dtype)
                out.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
            assert out.tell() - before == tensor.nbytes, tensor.name
