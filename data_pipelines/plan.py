"""Which images are encoded together: those of one size, as many as a budget of tokens holds.

Sizes are read from the files' headers, so planning decodes no image (to find the scenes of videos
it must decode those). What filters leave out is told apart here. A plan follows from the source and
the settings alone: whoever encodes a part again gets the same batches, and so the same codes.
"""

import collections
import concurrent.futures
import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import BinaryIO

import PIL.ExifTags
import PIL.Image

from data_pipelines import entries, image_folder, sources, video_folder
from data_pipelines.filters import Filters
from tokenizer import pixels

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes that images are brought to, multiples of `factor`.

    With `aspects` 0 an image is resized as Emu3 resizes it: its shape is kept, so there are as many
    sizes as images have shapes, and each is compiled. With an `area` it is first brought to about
    so many pixels, as Emu3's preparation of data for fine-tuning does it with 720 x 720.

    Otherwise the sizes are few: `aspects` ratios of height to width, evenly spaced on a logarithmic
    scale from 1:5 to 5:1 (an odd number has the square), at `min_pixels` and its doublings up to
    `max_pixels`. An image goes to the ratio nearest to its own, where it loses what stands out at
    its sides, and to the largest area for which it has the pixels, or the smallest one.
    """

    min_pixels: int
    max_pixels: int
    factor: int
    aspects: int = 0
    area: int = 0

    def check(self) -> None:
        """ValueError for settings that exclude each other."""
        if self.area and self.aspects:
            raise ValueError(
                f"area {self.area} keeps each image's shape, aspects {self.aspects} does not; set "
                "one of them to 0"
            )

    def first(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to bring an image to before it comes to its target: those of `area`."""
        if not self.area:
            return height, width
        scale = (self.area / (height * width)) ** 0.5
        return round(height * scale), round(width * scale)

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to bring an image to; ValueError as pixels.smart_resize raises it."""
        exact = pixels.smart_resize(
            *self.first(height, width), self.factor, self.min_pixels, self.max_pixels
        )
        if not self.aspects:
            return exact
        widest = math.log(image_folder.WIDEST)
        place = (math.log(height / width) / widest + 1) / 2 * self.aspects
        place = min(int(place), self.aspects - 1)
        aspect = math.exp(widest * (2 * (place + 0.5) / self.aspects - 1))
        area = self.min_pixels
        while 2 * area <= min(height * width, self.max_pixels):
            area *= 2
        sides = math.sqrt(area * aspect), math.sqrt(area / aspect)
        return tuple(max(1, round(side / self.factor)) * self.factor for side in sides)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Records of a source, by number, that become one `size` (height, width).

    Without it, one video: `seconds` (0: all) of it from `start` on.
    """

    members: tuple[int, ...]
    size: tuple[int, int] | None
    start: float = 0.0
    seconds: float = 0.0


@dataclasses.dataclass
class Plan:
    """The batches of some records in the order of their first ones, what cannot be used and how
    many were left out, by reason."""

    batches: list[Batch]
    bad: list[image_folder.BadFile]
    dropped: dict[str, int]

    @property
    def count(self) -> int:
        """How many images and pieces of videos the batches have."""
        return sum(len(batch.members) for batch in self.batches)


@dataclasses.dataclass
class Planner:
    """Plans the records of a source.

    A batch has `images_at_once(height, width)` images, the last one of a size fewer. Videos, known
    by their keys, are alone: `pieces` gives (start, seconds) of what is taken of one.
    """

    source: sources.Source
    sizes: Sizes
    images_at_once: Callable[[int, int], int]
    pieces: Callable[[pathlib.Path | BinaryIO], list[tuple[float, float]]] = lambda _: [(0.0, 0.0)]
    filters: Filters = dataclasses.field(default_factory=Filters)

    def plan(self, members: Sequence[int]) -> Plan:
        """The plan of these records."""
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            found = list(zip(members, pool.map(self._look, members), strict=True))
        groups, batches = collections.defaultdict(list), []
        for member, what in found:
            if isinstance(what, tuple):
                groups[what].append(member)
            elif isinstance(what, list):
                batches += [Batch((member,), None, *piece) for piece in what]
        for size, group in groups.items():
            most = self.images_at_once(*size)
            batches += [Batch(tuple(group[i : i + most]), size) for i in range(0, len(group), most)]
        return Plan(
            batches=sorted(batches, key=lambda batch: (batch.members[0], batch.start)),
            bad=[what for _, what in found if isinstance(what, image_folder.BadFile)],
            dropped=dict(collections.Counter(what for _, what in found if isinstance(what, str))),
        )

    def _look(self, member: int) -> tuple[int, int] | list | str | image_folder.BadFile:
        """An image's size, a video's pieces, why a record is left out, or what is bad about it."""
        try:
            entry, file = self.source.entry(member), self.source.file(member)
            return (self._video if entries.is_video(entry.key) else self._image)(entry, file)
        except image_folder.BadFile as error:
            return error

    def _image(self, entry: sources.Entry, file: pathlib.Path | BinaryIO) -> tuple[int, int] | str:
        height, width = read_size(file)
        if reason := self.filters.reason(entry, height, width):
            return reason
        try:
            if problem := image_folder.size_problem(height, width):
                raise ValueError(problem)
            return self.sizes.target(height, width)
        except ValueError as error:
            raise image_folder.BadImage(f"{entries.file_name(file)}: {error}") from error

    def _video(self, entry: sources.Entry, file: pathlib.Path | BinaryIO) -> list | str:
        # Without filters nobody asks for a video's size, so it need not be opened for that.
        if self.filters != Filters():
            _, _, height, width = video_folder.info(file)
            if reason := self.filters.reason(entry, height, width):
                return reason
        return self.pieces(file) or "scene"


def read_size(file: pathlib.Path | BinaryIO) -> tuple[int, int]:
    """Height and width of an image as image_folder.read_image gives it, from its header.

    Raises BadImage if it is none.
    """
    try:
        with image_folder.open_image(file) as image:
            width, height = image.size
            # The class's method: a PNG's own decodes the file to look for EXIF behind the pixels.
            turned = PIL.Image.Image.getexif(image).get(PIL.ExifTags.Base.Orientation)
    except Exception:
        return image_folder.read_image(file).shape[:2]  # says what is wrong
    return (width, height) if turned in _SIDEWAYS else (height, width)
