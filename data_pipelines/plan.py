"""Which images are encoded together: those of one size, as many as a budget of tokens holds.

Sizes are read from the files' headers, so planning decodes nothing. A plan follows from the list,
the files and the settings alone: whoever encodes a part again gets the same batches, and so the
same codes.
"""

import collections
import concurrent.futures
import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence

import PIL.ExifTags
import PIL.Image

from data_pipelines import image_folder
from tokenizer import pixels

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes that images are brought to, multiples of `factor`.

    With `aspects` 0 an image is resized as Emu3 resizes it: its shape is kept, so there are as many
    sizes as images have shapes, and each is compiled. Otherwise the sizes are few: `aspects` ratios
    of height to width, evenly spaced on a logarithmic scale from 1:5 to 5:1 (an odd number has the
    square), at `min_pixels` and its doublings up to `max_pixels`. An image goes to the ratio
    nearest to its own, where it loses what stands out at its sides, and to the largest area for
    which it has the pixels, or the smallest one.
    """

    min_pixels: int
    max_pixels: int
    factor: int
    aspects: int = 0

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to bring an image to; ValueError as pixels.smart_resize raises it."""
        exact = pixels.smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
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
    """Members of a list, by index, that become one `size` (height, width); without it, a video."""

    members: tuple[int, ...]
    size: tuple[int, int] | None


def make(
    folder: image_folder.ImageFolder,
    members: Sequence[int],
    sizes: Sizes,
    images_at_once: Callable[[int, int], int],
) -> tuple[list[Batch], list[image_folder.BadImage]]:
    """The batches of these members, in the order of their first images, and what cannot be used.

    A batch has `images_at_once(height, width)` images, the last one of a size fewer. Videos, known
    by the names of their files, are alone.
    """

    def size(member: int) -> tuple[int, int] | None | image_folder.BadImage:
        path = path_of(folder, member)
        try:
            return None if is_video(path.name) else sizes.target(*read_size(path))
        except image_folder.BadImage as error:
            return error
        except ValueError as error:
            return image_folder.BadImage(f"{path}: {error}")

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(zip(members, pool.map(size, members), strict=True))
    groups = collections.defaultdict(list)
    for member, where in found:
        if isinstance(where, tuple):
            groups[where].append(member)
    batches = [Batch((member,), None) for member, where in found if where is None]
    for where, group in groups.items():
        most = images_at_once(*where)
        batches += [Batch(tuple(group[i : i + most]), where) for i in range(0, len(group), most)]
    bad = [where for _, where in found if isinstance(where, image_folder.BadImage)]
    return sorted(batches, key=lambda batch: batch.members[0]), bad


def path_of(folder: image_folder.ImageFolder, member: int) -> pathlib.Path:
    """The file of a member of a list."""
    return folder.directory / folder.entries[member]["file"]


def is_video(name: str) -> bool:
    """Whether a file is one, by its name."""
    return name.lower().endswith(VIDEOS)


def read_size(path: pathlib.Path) -> tuple[int, int]:
    """Height and width of an image as image_folder.read_image gives it, from its header.

    Raises BadImage if it cannot be used.
    """
    try:
        with PIL.Image.open(path) as image:
            width, height = image.size
            # The class's method: a PNG's own decodes the file to look for EXIF behind the pixels.
            turned = PIL.Image.Image.getexif(image).get(PIL.ExifTags.Base.Orientation)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError):
        return image_folder.read_image(path).shape[:2]  # says what is wrong
    if turned in _SIDEWAYS:
        height, width = width, height
    if problem := image_folder.size_problem(height, width):
        raise image_folder.BadImage(f"{path}: {problem}")
    return height, width
