"""Records of a source as frames of one size, read ahead by threads.

Legend: T frames of a record (1 of an image), H rows, W columns, C colours of pixels.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import PIL.Image

READ_AHEAD = 32  # records


class Source(Protocol):
    """Records of images or of videos, by index."""

    def __len__(self) -> int:
        """How many records there are."""

    def __getitem__(self, index: int) -> Any:
        """A record: `key`, and `image_HWC` in uint8 or `frames(fps)`, an iterator over such.

        Raises ValueError for a bad one, which is skipped.
        """


class Opens(Protocol):
    """What a configuration holds of a source; a dataclass."""

    def open(self) -> Source:
        """Raises ValueError if there is no such source."""


@dataclasses.dataclass
class Item:
    """A record's frames, fitted."""

    key: str
    frames_THWC: np.ndarray


def read(
    source: Source, total: int, take: Callable[[Any], list[np.ndarray]], size: int
) -> Iterator[Item | ValueError]:
    """The first `total` records in order, or what is wrong with them, read ahead by threads."""

    def one(index: int) -> Item | ValueError:
        try:
            record = source[index]
            return Item(record.key, np.stack([fit(x_HWC, size) for x_HWC in take(record)]))
        except ValueError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        ahead = collections.deque()
        for index in range(total):
            ahead.append(pool.submit(one, index))
            if len(ahead) > READ_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def image_frame(record: Any) -> list[np.ndarray]:
    """An image as a clip of one frame."""
    return [record.image_HWC]


def first_frames(record: Any, count: int, fps: float) -> list[np.ndarray]:
    """A video's first `count` frames at `fps` a second; ValueError if it is too short."""
    frames = list(itertools.islice(record.frames(fps), count))
    if len(frames) < count:
        raise ValueError(f"{record.key}: {len(frames)} frames at {fps:g} a second, not {count}")
    return frames


def fit(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """The centre [size, size, C] of an 8-bit image whose shorter side is resized to `size`.

    PIL's bicubic filter, which widens when it shrinks; an image of that size already stays as it
    is.
    """
    height, width = image_HWC.shape[:2]
    if min(height, width) != size:
        scale = size / min(height, width)
        shape = tuple(max(size, round(side * scale)) for side in (width, height))
        image = PIL.Image.fromarray(image_HWC).resize(shape, PIL.Image.Resampling.BICUBIC)
        image_HWC = np.asarray(image)
    top, left = ((side - size) // 2 for side in image_HWC.shape[:2])
    return image_HWC[top : top + size, left : left + size]


def good(
    records: Iterator[Item | ValueError], kind: str, bad: list[str], max_bad: int
) -> Iterator[Item]:
    """Those that can be used; the others are named on stderr and added to `bad`."""
    for record in records:
        if isinstance(record, Item):
            yield record
            continue
        print(f"skipped: {record}", file=sys.stderr)
        bad.append(str(record))
        if len(bad) > max_bad:
            raise ValueError(
                f"{kind}: more than max_bad = {max_bad} cannot be used, the last: {record}; "
                "repair them or raise max_bad"
            )


def batches(items: Iterator[Item], count: int) -> Iterator[list[Item]]:
    """Lists of `count`, the last one of what is left."""
    waiting = []
    for item in items:
        waiting.append(item)
        if len(waiting) == count:
            yield waiting
            waiting = []
    if waiting:
        yield waiting
