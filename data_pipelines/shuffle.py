"""Random numbers and permutations that are pure functions of integers, so any row can be asked
for alone.

Everything is computed with wrapping 64-bit integers: the same on every host, NumPy version and
processor. N one entry an item.
"""

import numpy as np

_U64 = np.uint64


def hash64(*values: int | np.ndarray) -> np.ndarray:
    """Mixes integers (scalars or arrays that broadcast) to uniform uint64 of the broadcast shape.

    The mixer is the finaliser of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable
    pseudorandom number generators").
    """
    state = np.zeros(1, _U64)
    for value in values:
        x = np.atleast_1d(np.asarray(value)).astype(_U64) ^ state
        x = (x + _U64(0x9E3779B97F4A7C15)).astype(_U64)
        x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
        state = x ^ (x >> _U64(31))
    return state


def uniform(*values: int | np.ndarray) -> np.ndarray:
    """Floats in [0, 1) with 53 random bits, a function of the integers given."""
    return (hash64(*values) >> _U64(11)).astype(np.float64) * 2.0**-53


def permute(index_N: np.ndarray, size: int, key_N: int | np.ndarray) -> np.ndarray:
    """Where a random permutation of range(size), chosen by key, sends each index.

    A four-round Feistel network over the next even power of two, walked until it lands inside: no
    table, so a permutation of 100 million documents costs nothing to open.
    """
    index_N = np.atleast_1d(np.asarray(index_N)).astype(_U64)
    key_N = np.broadcast_to(np.asarray(key_N).astype(_U64), index_N.shape)
    half = _U64(max(1, (int(size - 1).bit_length() + 1) // 2))
    result_N, todo = index_N.copy(), np.arange(len(index_N))
    while len(todo):
        result_N[todo] = _feistel(result_N[todo], half, key_N[todo])
        todo = todo[result_N[todo] >= size]
    return result_N.astype(np.int64)


def _feistel(x_N: np.ndarray, half: np.uint64, key_N: np.ndarray) -> np.ndarray:
    mask = (_U64(1) << half) - _U64(1)
    left_N, right_N = x_N >> half, x_N & mask
    for turn in range(4):
        left_N, right_N = right_N, left_N ^ (hash64(key_N, turn, right_N) & mask)
    return (left_N << half) | right_N
