"""One-dimensional arrays on disk: zarr3 with the sharding codec, through TensorStore.

A shard is written whole in one call: row by row it would be rewritten for each row. Inner chunks
carry a crc32c, so damage is found on reading; they are not compressed, as nothing general makes
codes smaller. E elements, N ranges.
"""

import pathlib

import numpy as np
import tensorstore

_SHARD = 1 << 22
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC32C = {"name": "crc32c"}
_CONTEXT = tensorstore.Context({"cache_pool": {"total_bytes_limit": 1 << 28}})


def write(path: pathlib.Path, values_E: np.ndarray, inner: int) -> None:
    """Writes an array in shards of about 4 Mi elements, made of inner chunks of `inner`."""
    single = values_E.dtype.itemsize == 1
    sharding = {
        "chunk_shape": [inner],
        "codecs": [{"name": "bytes"} if single else _BYTES, _CRC32C],
        "index_codecs": [_BYTES, _CRC32C],
    }
    shard = min(_SHARD, -(-max(1, len(values_E)) // inner) * inner)
    metadata = {
        "shape": [len(values_E)],
        "data_type": values_E.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    spec = _spec(path) | {"metadata": metadata}
    array = tensorstore.open(spec, create=True, delete_existing=True).result()
    array.write(values_E).result()


def open_read(path: pathlib.Path) -> tensorstore.TensorStore:
    """Opens an array for reading; ValueError if it is not there."""
    return tensorstore.open(
        _spec(path), read=True, open=True, context=_CONTEXT, recheck_cached_data=False
    ).result()


def gather(
    array: tensorstore.TensorStore, begins_N: np.ndarray, ends_N: np.ndarray
) -> tensorstore.Future:
    """A future of the elements of all ranges [begin, end), end to end, in one read."""
    lengths_N = ends_N - begins_N
    firsts_N = np.cumsum(lengths_N) - lengths_N
    index_E = np.arange(lengths_N.sum()) + np.repeat(begins_N - firsts_N, lengths_N)
    return array[index_E].read()


def _spec(path: pathlib.Path) -> dict:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path.absolute()}/"}}
