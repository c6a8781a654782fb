"""A directory of images with captions, as a source of records and as rows for the tokenizer.

Legend: H rows, W columns, C colours of pixels.
"""

import dataclasses
import pathlib
import sys
import threading
from collections.abc import Callable, Sequence
from typing import IO, BinaryIO

import grain
import numpy as np
import PIL.Image
import PIL.ImageOps

from data_pipelines import entries, shuffle
from emu3_jax import data, untrusted

SMALLEST = 8
WIDEST = 5
MOST_PIXELS = 2**26  # 8192 x 8192: as RGB 0.2 GB, with its alpha several times that
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # Pillow has others, one of which runs programs
BadFile = entries.BadFile


class BadImage(BadFile):
    """An image that is corrupt, too small, too large or too long; the message names it."""


@dataclasses.dataclass
class Record:
    """One image with its caption; `key` names it within its source."""

    key: str
    image_HWC: np.ndarray
    caption: str


class ImageFolder(entries.Folder):
    """A random-access source: `folder[i]` is a Record (uint8 RGB on white) or raises BadImage."""

    def __init__(self, directory: str, list: str = "captions.jsonl"):
        """Raises ValueError for a missing directory or list, an empty one or one without `file`."""
        super().__init__(directory, list, "image")

    def __getitem__(self, index: int) -> Record:
        entry = self.entry(index)
        return Record(entry.key, read_image(self.file(index)), entry.caption)


def read_image(file: pathlib.Path | BinaryIO) -> np.ndarray:
    """An image file as uint8 [H, W, 3] on white, turned as its EXIF says; BadImage if unusable.

    An open file, which has a `name` for errors, is closed.
    """
    name = entries.file_name(file)
    try:
        with open(file, "rb") if isinstance(file, pathlib.Path) else file as opened:
            return decode_image(name, opened)
    except FileNotFoundError:
        raise BadImage(f"{name}: no such file") from None
    except OSError as error:
        raise BadImage(f"{name}: {untrusted.first_line(error)}") from None


def decode_image(name: str, file: IO[bytes]) -> np.ndarray:
    """`read_image` of an open file that errors call `name`."""
    try:
        with open_image(file) as image:
            if problem := size_problem(image.height, image.width):
                raise BadImage(f"{name}: {problem}")
            image = PIL.ImageOps.exif_transpose(image)
            if image.mode != "RGB":
                image = image.convert("RGBA")
                white = PIL.Image.new("RGBA", image.size, "white")
                image = PIL.Image.alpha_composite(white, image).convert("RGB")
            image_HWC = np.asarray(image, np.uint8)
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they come across
        raise BadImage(f"{name}: corrupt image ({untrusted.first_line(error)})") from error
    return image_HWC


def open_image(file: IO[bytes]) -> PIL.Image.Image:
    """An image of which the header is read, in one of FORMATS."""
    return PIL.Image.open(file, formats=FORMATS)


def size_problem(height: int, width: int) -> str:
    """Why pictures of this size are not used, or nothing."""
    if min(height, width) < SMALLEST:
        return f"{width}x{height} px, smaller than {SMALLEST} px"
    if height * width > MOST_PIXELS:
        return f"{width}x{height} px, more than {MOST_PIXELS} pixels"
    if max(height, width) > WIDEST * min(height, width):
        return f"{width}x{height} px, aspect ratio above {WIDEST}"
    return ""


@dataclasses.dataclass
class ImageRows(data.Data):
    """The tokenizer's data: rows {"image": uint8 [size, size, 3]} without end, shuffled anew
    each epoch.

    An image is reduced or enlarged until its shorter side is `size`, then cut to a square at a
    random place; with size 0 it stays as it is and all must have one size. Row i is a function of
    the files, this configuration and i. `augment_flip` mirrors half of the rows; `augment_shift`
    moves each by up to so many pixels either way, over white. A row whose image is bad takes
    another image instead; each bad one is named once on stderr and counted in `bad`.
    """

    directory: str = "runs/images"
    list: str = "captions.jsonl"
    size: int = 0
    seed: int = 0
    augment_flip: bool = False
    augment_shift: int = 0
    max_bad: int = 100

    def rows(self) -> grain.MapDataset:
        """The rows; ValueError for a missing or unusable list."""
        folder = ImageFolder(self.directory, self.list)

        def read(index: int, row: int) -> dict[str, np.ndarray]:
            random_4 = shuffle.uniform(self.seed, row, range(4))
            options = self.size, self.augment_flip, self.augment_shift
            return {"image": cut(folder[index].image_HWC, random_4, *options)}

        return grain.MapDataset.source(
            Rows(self.directory, len(folder), read, self.seed, self.max_bad)
        )


class Rows:
    """Rows without end: each takes an item of a source, all of them once an epoch, in an order
    that is new each epoch.

    `read(index, row)` makes a row of an item. Where it raises BadFile, the row takes another item;
    each bad one is named once on stderr and kept in `bad`, at most `max_bad` of them.
    """

    def __init__(
        self,
        source: str,
        count: int,
        read: Callable[[int, int], dict[str, np.ndarray]],
        seed: int,
        max_bad: int,
        kind: str = "image",
    ):
        self._source, self._count, self._read = source, count, read
        self._seed, self._max_bad, self._kind = seed, max_bad, kind
        self._lock = threading.Lock()
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(int(row), self._count)
        key = shuffle.hash64(self._seed, epoch)
        index = int(shuffle.permute(place, self._count, key)[0])
        for attempt in range(self._max_bad + 1):
            made = self._try(index, int(row))
            if made is not None:
                return made
            index = int(shuffle.hash64(self._seed, row, attempt)[0] % np.uint64(self._count))
        raise ValueError(
            f"{self._source}: no usable {self._kind} in {self._max_bad} tries for row {row}"
        )

    def _try(self, index: int, row: int) -> dict[str, np.ndarray] | None:
        # Known bad ones are tried again: a video may be bad in places, and a row is no history.
        try:
            return self._read(index, row)
        except BadFile as error:
            with self._lock:
                if index not in self.bad:
                    print(f"skipped: {error}", file=sys.stderr)
                self.bad[index] = str(error)
        if len(self.bad) > self._max_bad:
            messages = list(self.bad.values())
            raise ValueError(too_many_bad(self._source, messages, self._max_bad, self._kind))
        return None


def too_many_bad(source: str, messages: Sequence[str], limit: int, kind: str = "image") -> str:
    """The line that ends a job whose source has more bad images than allowed."""
    return (
        f"{source} has more than max_bad = {limit} bad {kind}s, the last: {messages[-1]}; "
        "repair it or raise max_bad"
    )


def cut(
    image_HWC: np.ndarray, random_4: np.ndarray, size: int, flip: bool = False, shift: int = 0
) -> np.ndarray:
    """A square of a picture, as ImageRows says it; the numbers in [0, 1) decide where."""
    height, width, _ = image_HWC.shape
    if size and min(height, width) != size:
        scale = size / min(height, width)
        shape = (max(size, round(width * scale)), max(size, round(height * scale)))
        image = PIL.Image.fromarray(image_HWC).resize(shape, PIL.Image.Resampling.BICUBIC)
        image_HWC = np.asarray(image)
    if size:
        top, left = (
            int(u * (n - size + 1)) for u, n in zip(random_4, image_HWC.shape[:2], strict=False)
        )
        image_HWC = image_HWC[top : top + size, left : left + size]
    if flip and random_4[2] < 0.5:
        image_HWC = image_HWC[:, ::-1]
    return _shift(image_HWC, shift, random_4[3])


def _shift(image_HWC: np.ndarray, most: int, random: float) -> np.ndarray:
    if not most:
        return np.ascontiguousarray(image_HWC)
    height, width, _ = image_HWC.shape
    down, right = divmod(int(random * (2 * most + 1) ** 2), 2 * most + 1)
    padded = np.pad(image_HWC, ((most, most), (most, most), (0, 0)), constant_values=255)
    return np.ascontiguousarray(padded[down : down + height, right : right + width])
