"""A directory of images with a list of captions, as a source of records and as rows for the
tokenizer.

The list is JSON lines or CSV with the columns `file` and `caption` (and any others); files are
relative to the directory. Legend: H rows, W columns, C colours of pixels.
"""

import csv
import dataclasses
import json
import pathlib
import sys
import threading
from collections.abc import Sequence

import grain
import numpy as np
import PIL.Image
import PIL.ImageOps

from data_pipelines import shuffle

SMALLEST = 8
WIDEST = 5


class BadImage(ValueError):
    """An image that is corrupt, too small or too long; the message names it."""


@dataclasses.dataclass
class Record:
    """One image with its caption; `key` names it within its source."""

    key: str
    image_HWC: np.ndarray
    caption: str


class ImageFolder:
    """A random-access source: `folder[i]` is a Record (uint8 RGB on white) or raises BadImage.

    `entries` are the list's lines as dictionaries.
    """

    def __init__(self, directory: str, list: str = "captions.jsonl"):
        """Raises ValueError for a missing directory or list, an empty one or one without `file`."""
        self.directory = pathlib.Path(directory)
        self.entries = read_list(self.directory / list)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Record:
        entry = self.entries[index]
        image_HWC = read_image(self.directory / entry["file"])
        return Record(entry["file"], image_HWC, entry["caption"] if "caption" in entry else "")


def read_list(path: pathlib.Path) -> list[dict]:
    """The entries of a .jsonl or .csv list; ValueError names what is wrong with it."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; write a list with the columns file and caption")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        entries = list(csv.DictReader(text.splitlines()))
    else:
        entries = [_parse(path, i, line) for i, line in enumerate(text.splitlines()) if line]
    if not entries:
        raise ValueError(f"{path} lists no images; write one image a line")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or "file" not in entry:
            raise ValueError(f"{path}, entry {i + 1} has no column 'file'; it reads {entry}")
    return entries


def _parse(path: pathlib.Path, index: int, line: str) -> dict:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {index + 1} is no JSON: {error}") from error


def read_image(path: pathlib.Path) -> np.ndarray:
    """An image file as uint8 [H, W, 3] on white, turned as its EXIF says; BadImage if unusable."""
    try:
        with PIL.Image.open(path) as image:
            image = PIL.ImageOps.exif_transpose(image)
            if image.mode != "RGB":
                image = image.convert("RGBA")
                white = PIL.Image.new("RGBA", image.size, "white")
                image = PIL.Image.alpha_composite(white, image).convert("RGB")
            image_HWC = np.asarray(image, np.uint8)
    except FileNotFoundError:
        raise BadImage(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise BadImage(f"{path}: corrupt image ({_one_line(error)})") from error
    height, width, _ = image_HWC.shape
    if min(height, width) < SMALLEST:
        raise BadImage(f"{path}: {width}x{height} px, smaller than {SMALLEST} px")
    if max(height, width) > WIDEST * min(height, width):
        raise BadImage(f"{path}: {width}x{height} px, aspect ratio above {WIDEST}")
    return image_HWC


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclasses.dataclass
class ImageRows:
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
        return grain.MapDataset.source(_Rows(self))


class _Rows:
    def __init__(self, config: ImageRows):
        self._config = config
        self._folder = ImageFolder(config.directory, config.list)
        self._lock = threading.Lock()
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        config, count = self._config, len(self._folder)
        epoch, place = divmod(int(row), count)
        index = int(shuffle.permute(place, count, shuffle.hash64(config.seed, epoch))[0])
        for attempt in range(config.max_bad + 1):
            image = self._read(index)
            if image is not None:
                return {
                    "image": _cut(image, config, shuffle.uniform(config.seed, row, range(4)))
                }
            index = int(shuffle.hash64(config.seed, row, attempt)[0] % np.uint64(count))
        raise ValueError(
            f"{config.directory}: no usable image in {config.max_bad} tries for row {row}"
        )

    def _read(self, index: int) -> np.ndarray | None:
        if index in self.bad:
            return None
        try:
            return self._folder[index].image_HWC
        except BadImage as error:
            with self._lock:
                if index not in self.bad:
                    print(f"skipped: {error}", file=sys.stderr)
                self.bad[index] = str(error)
        if len(self.bad) > self._config.max_bad:
            raise ValueError(
                too_many_bad(self._config.directory, list(self.bad.values()), self._config.max_bad)
            )
        return None


def too_many_bad(source: str, messages: Sequence[str], limit: int) -> str:
    """The line that ends a job whose source has more bad images than allowed."""
    return (
        f"{source} has more than max_bad = {limit} bad images, the last: {messages[-1]}; "
        "repair it or raise max_bad"
    )


def _cut(image_HWC: np.ndarray, config: ImageRows, random_4: np.ndarray) -> np.ndarray:
    height, width, _ = image_HWC.shape
    size = config.size
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
    if config.augment_flip and random_4[2] < 0.5:
        image_HWC = image_HWC[:, ::-1]
    return _shift(image_HWC, config.augment_shift, random_4[3])


def _shift(image_HWC: np.ndarray, most: int, random: float) -> np.ndarray:
    if not most:
        return np.ascontiguousarray(image_HWC)
    height, width, _ = image_HWC.shape
    down, right = divmod(int(random * (2 * most + 1) ** 2), 2 * most + 1)
    padded = np.pad(image_HWC, ((most, most), (most, most), (0, 0)), constant_values=255)
    return np.ascontiguousarray(padded[down : down + height, right : right + width])
