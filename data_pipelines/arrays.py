"""Columns on disk: zarr3 with the sharding codec, through TensorStore.

A shard is written whole in one call: row by row it would be rewritten for each row. Inner chunks
carry a crc32c, so damage is found on reading; they are not compressed, as nothing general makes
codes smaller. E elements, N ranges, M of them.
"""

import math
import pathlib
from collections.abc import Callable

import numpy as np
import tensorstore

Array = tensorstore.TensorStore
_SHARD = 1 << 22
_EVERY, _PIECE = 64, 1 << 22
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC32C = {"name": "crc32c"}
_CONTEXT = tensorstore.Context({"cache_pool": {"total_bytes_limit": 1 << 28}})


def pages(values_E: np.ndarray, page: int) -> np.ndarray:
    """An array as rows of `page` elements, the last one filled up with zeros.

    TensorStore reads many whole rows from anywhere much faster than as many ranges.
    """
    return np.pad(values_E, (0, -len(values_E) % page)).reshape(-1, page)


def write(path: pathlib.Path, values: np.ndarray, inner: int) -> None:
    """Writes an array, perhaps of pages, in shards of about 4 Mi elements, made of inner chunks of
    `inner`."""
    spec = _spec(path) | {
        "metadata": _metadata(values.shape, values.dtype.name, inner),
        # Pages of zeros too, so that no array of pages is larger than its files.
        "store_data_equal_to_fill_value": values.ndim == 2,
    }
    array = tensorstore.open(spec, create=True, delete_existing=True).result()
    array.write(values).result()


def open_read(path: pathlib.Path, row: tuple[int, ...], dtype: str, inner: int) -> Array:
    """Opens an array of any length for reading, of pages if `row` is (page,), else ().

    Raises ValueError if it is not there, or is laid out otherwise than by `write`: compressed, a
    little would become much.
    """
    array = tensorstore.open(
        _spec(path), read=True, open=True, context=_CONTEXT, recheck_cached_data=False
    ).result()
    found = array.spec().to_json()["metadata"]
    if array.shape != (*array.shape[:1], *row) or not array.shape or found != found | _metadata(
        array.shape, dtype, inner
    ):
        raise ValueError(f"{path.name}/zarr.json is none that this code writes")
    return array


def _metadata(shape: tuple[int, ...], dtype: str, inner: int) -> dict:
    row = list(shape[1:])
    inner, most = (count // math.prod(row) for count in (inner, _SHARD))
    sharding = {
        "chunk_shape": [inner, *row],
        "codecs": [{"name": "bytes"} if dtype == "uint8" else _BYTES, _CRC32C],
        "index_codecs": [_BYTES, _CRC32C],
        "index_location": "end",
    }
    shard = min(most, -(-max(1, shape[0]) // inner) * inner)
    return {
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard, *row]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def gather(
    array: Array, begins_N: np.ndarray, ends_N: np.ndarray
) -> Callable[[], np.ndarray]:
    """Begins to read the ranges [begin, end) of an array in pages; the result waits for them, end
    to end."""
    page = array.shape[1]
    some_N = ends_N > begins_N
    begins_M, ends_M = begins_N[some_N], ends_N[some_N]
    first_M = begins_M // page
    count_M = (ends_M - 1) // page - first_M + 1
    before_M = np.cumsum(count_M) - count_M
    pages_E = np.repeat(first_M - before_M, count_M) + np.arange(count_M.sum())
    unique, place_E = np.unique(pages_E, return_inverse=True)
    future = array[unique].read()
    # The pages of a range follow one another, so they do where each is read but once.
    at_M = place_E[before_M] * page + begins_M % page

    def wait() -> np.ndarray:
        read_E = np.asarray(future.result()).reshape(-1)
        sizes_M = ends_M - begins_M
        pieces = [read_E[a : a + n] for a, n in zip(at_M.tolist(), sizes_M.tolist(), strict=True)]
        return np.concatenate([read_E[:0], *pieces])

    return wait


class Starts:
    """Where the i-th of N ranges begins, when they lie end to end: `starts[i_M]` is int64 [M].

    Of every 64th range the start is kept; from there lengths are added. So 100 million ranges cost
    12 MB beside their lengths, `lengths(index)`.
    """

    def __init__(self, count: int, lengths: Callable[[np.ndarray | slice], np.ndarray]):
        self._count, self._lengths = count, lengths
        sums = [
            np.add.reduceat(piece, np.arange(0, len(piece), _EVERY))
            for begin in range(0, count, _PIECE)
            for piece in [lengths(slice(begin, begin + _PIECE)).astype(np.int64)]
        ]
        self._kept = np.cumsum(np.concatenate([np.zeros(1, np.int64), *sums]))

    def __getitem__(self, index_M: np.ndarray) -> np.ndarray:
        block_M, within_M = np.divmod(index_M, _EVERY)
        near_Mk = block_M[:, None] * _EVERY + np.arange(_EVERY)
        lengths_Mk = self._lengths(np.minimum(near_Mk, self._count - 1)).astype(np.int64)
        before_Mk = np.arange(_EVERY) < within_M[:, None]
        return self._kept[block_M] + np.where(before_Mk, lengths_Mk, 0).sum(axis=1)


def _spec(path: pathlib.Path) -> dict:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path.absolute()}/"}}
