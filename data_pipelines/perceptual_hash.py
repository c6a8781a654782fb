"""Perceptual hashes of images, and which of many are near each other.

A hash tells a picture by its coarse shapes of light and dark: it hardly changes when the picture is
scaled, compressed anew or brightened, and entirely when it is mirrored or turned. It is blind to
colour, and pictures with nothing in them, or only bars, are all alike to it.

Legend: N images, P pairs of images, H rows, W columns, C colours of pixels, F frequencies.
"""

from collections.abc import Iterator

import numpy as np
import PIL.Image

_SIDE = 32  # pixels
_PAIRS = 1 << 20  # that are compared at once; they stay in the cache
_COSINES_FH = np.cos(np.pi / _SIDE * np.outer(np.arange(1, 9), np.arange(_SIDE) + 0.5))


def hash_image(image_HWC: np.ndarray) -> np.uint64:
    """The DCT hash of a picture, uint8: 64 bits.

    Luma is reduced to 32 x 32 pixels; of its cosine transform the frequencies 1 to 8 of either
    direction are taken; a bit tells whether one is above their median (C. Zauner, Implementation
    and Benchmarking of Perceptual Image Hash Functions, 2010, section 3.2.1).
    """
    image = PIL.Image.fromarray(image_HWC).convert("L")
    luma_HW = np.asarray(image.resize((_SIDE, _SIDE), PIL.Image.Resampling.BOX), np.float64)
    # Rounded, so that what is 0 does not have the sign of an error.
    low_FF = (_COSINES_FH @ luma_HW @ _COSINES_FH.T).round(3)
    bits_F = (low_FF > np.median(low_FF)).ravel()
    return np.packbits(bits_F).view(">u8").astype(np.uint64)[0]


def nearest_earlier(hash_N: np.ndarray, distance: int) -> np.ndarray:
    """For each image, by number, the one that it is left out for; itself where it stays.

    In order: an image goes if it is within `distance` bits of one before it that stays, the first
    of these. So those who stay are all farther from each other.
    """
    unique_N, first_N, same_N = np.unique(hash_N, return_index=True, return_inverse=True)
    numbers = [first_N[pair_2P] for pair_2P in near(unique_N, distance)]
    pair_2P = np.sort(np.concatenate([np.zeros((2, 0), np.int64), *numbers], axis=1), axis=0)
    # Pairs come in several quarters: once each, in order of the later image, then of the earlier.
    later_P, earlier_P = np.unique(pair_2P[::-1], axis=1)
    stays_for_N = np.arange(len(hash_N))
    for later, earlier in zip(later_P.tolist(), earlier_P.tolist(), strict=True):
        if stays_for_N[later] == later and stays_for_N[earlier] == earlier:
            stays_for_N[later] = earlier
    return stays_for_N[first_N][same_N]


def near(hash_N: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    """Numbers [2, P] of all pairs within `distance` bits, some more than once, in pieces.

    Not all are compared with all. If two hashes differ in d bits, one of their four quarters
    differs in d // 4 or fewer: so those are compared that lie in the same bucket of a quarter, or
    in one so many bits away (M. Norouzi et al., Fast Search in Hamming Space with Multi-Index
    Hashing, 2012).
    """
    masks = [mask for mask in range(1 << 16) if mask.bit_count() <= distance // 4]
    for quarter in range(4):
        bucket_N = (hash_N >> np.uint64(16 * quarter)).astype(np.uint16)
        order_N = np.argsort(bucket_N, kind="stable")
        bucket_N, sorted_N = bucket_N[order_N], hash_N[order_N]
        begins = np.searchsorted(bucket_N, np.arange((1 << 16) + 1))
        for mask in masks:
            other_N = bucket_N ^ np.uint16(mask)
            end_N = begins[other_N.astype(np.int64) + 1]
            begin_N = begins[other_N] if mask else np.arange(len(hash_N)) + 1
            count_N = np.where(other_N >= bucket_N, end_N - begin_N, 0)  # a pair once
            for pair_2P in _within(sorted_N, begin_N, count_N, distance):
                yield order_N[pair_2P]


def _within(
    hash_N: np.ndarray, begin_N: np.ndarray, count_N: np.ndarray, distance: int
) -> Iterator[np.ndarray]:
    """Pairs within `distance` of each hash with the `count` ones from `begin` on."""
    total_N = np.cumsum(count_N)
    start = 0
    while start < len(hash_N):
        done = total_N[start] - count_N[start]
        stop = max(start + 1, int(np.searchsorted(total_N, done + _PAIRS, side="right")))
        count = count_N[start:stop]
        shift = begin_N[start:stop] - (total_N[start:stop] - count - done)
        second_P = np.arange(count.sum()) + np.repeat(shift, count)
        differ_P = np.bitwise_count(np.repeat(hash_N[start:stop], count) ^ hash_N[second_P])
        found_P = np.flatnonzero(differ_P <= distance)
        first_P = start + np.searchsorted(np.cumsum(count), found_P, side="right")
        yield np.stack([first_P, second_P[found_P]])
        start = stop
