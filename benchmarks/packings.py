"""Three packed rows that attention is measured on, the same for every kernel and machine.

T position in a row
"""

import numpy as np

IMAGE = 64 * (64 + 1)  # visual tokens of 512 x 512 pixels, and an end of line after each row
FRAMES = 24  # of latent video in the longest documents, each as long as an image


def packing(name: str, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(segments_T, positions_T) of a row of `length` tokens, int32; the same at every call.

    Documents stand one after the other from segment 1 and position 0. The last one of "images" and
    "long" is as long as what is left; where none fits there is padding, segment 0.

    "images": stage 1. Images of 4,160 tokens with captions of 40 to 400 before them; what is left
        of the row takes captions alone. A row of 5,120 holds one image, and most of its pairs.
    "short": documents of 1,100 tokens, a page of text. The most blocks on a diagonal or on an
        edge between documents, so the most masks and the most that must not be touched.
    "long": stage 2. One video of 24 latent frames (99,840 tokens), one of 4 (16,640), then
        captioned images and texts of 100 to 2,000 tokens, in a random order. A row of 131,072
        has all of them; the long video has most of the pairs. What does not fit is left out.

    Raises ValueError for another name.
    """
    random = np.random.default_rng(seed)
    if name not in _LENGTHS:
        raise ValueError(f"packing {name!r} is none of {', '.join(_LENGTHS)}")
    lengths = _LENGTHS[name](random, length)
    segments_T, positions_T = np.zeros(length, np.int32), np.zeros(length, np.int32)
    start = 0
    for segment, count in enumerate(lengths, 1):
        segments_T[start : start + count] = segment
        positions_T[start : start + count] = np.arange(count)
        start += count
    return segments_T, positions_T


def _images(random, length: int) -> list[int]:
    lengths = []
    while length >= 40:
        count = _caption(random)
        if count + IMAGE <= length:
            count += IMAGE
        lengths.append(min(count, length))
        length -= lengths[-1]
    return lengths


def _short(random, length: int) -> list[int]:
    return [1100] * (length // 1100)


def _long(random, length: int) -> list[int]:
    lengths = []
    for frames in (FRAMES, 4):
        if frames * IMAGE + 400 <= length:
            lengths.append(_caption(random) + frames * IMAGE)
            length -= lengths[-1]
    while length >= 100:
        count = int(random.integers(100, 2001))
        if random.random() < 0.5 and count + IMAGE <= length:
            count = _caption(random) + IMAGE
        lengths.append(min(count, length))
        length -= lengths[-1]
    return [lengths[i] for i in random.permutation(len(lengths))]


def _caption(random) -> int:
    return int(random.integers(40, 401))


_LENGTHS = {"images": _images, "short": _short, "long": _long}
