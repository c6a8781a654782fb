"""The batches of a plan as pixels: decoded and resized by threads, ahead of who encodes them.

Legend: T frames, H rows, W columns, C colours of pixels.
"""

import collections
import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Iterator

import numpy as np
import PIL.Image
import PIL.ImageOps

from data_pipelines import image_folder, plan, video_folder

_AHEAD = 1 << 26  # pixels that are held beyond the next batch


@dataclasses.dataclass
class Frames:
    """A video: its frames and how many of them are shown in a second."""

    x_THWC: np.ndarray
    fps: float


@dataclasses.dataclass
class Reader:
    """Reads members of a list, images at the sizes of a plan.

    Videos are read at `fps` frames a second (0: their own) for `seconds` (0: to the end), each
    frame resized as an image of its size would be.
    """

    folder: image_folder.ImageFolder
    sizes: plan.Sizes
    fps: float
    seconds: float

    def read(self, batches: list[plan.Batch]) -> Iterator[tuple[plan.Batch, list]]:
        """Each batch with its images x_HWC (or Frames, or BadFile) in the order of its members."""
        todo, ahead, held = collections.deque(batches), collections.deque(), 0
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            while todo or ahead:
                while todo and (len(ahead) < 2 or held < _AHEAD):
                    batch = todo.popleft()
                    held += self._pixels(batch)
                    jobs = [pool.submit(self._try, m, batch.size) for m in batch.members]
                    ahead.append((batch, jobs))
                batch, jobs = ahead.popleft()
                held -= self._pixels(batch)
                yield batch, [job.result() for job in jobs]

    def _pixels(self, batch: plan.Batch) -> int:
        if batch.size:
            return len(batch.members) * batch.size[0] * batch.size[1]
        frames = (self.fps or 30) * (self.seconds or 60)  # a guess where nothing bounds it
        return round(frames * self.sizes.max_pixels)

    def _try(self, member: int, size: tuple[int, int] | None):
        path = plan.path_of(self.folder, member)
        try:
            return self._image(path, size) if size else self._video(path)
        except image_folder.BadFile as error:
            return error

    def _image(self, path: pathlib.Path, size: tuple[int, int]) -> np.ndarray:
        image_HWC = image_folder.read_image(path)
        if self.sizes.target(*image_HWC.shape[:2]) != size:
            raise image_folder.BadImage(f"{path}: its header tells another size than its pixels")
        return self._resize(image_HWC, size)

    def _video(self, path: pathlib.Path) -> Frames:
        fps = self.fps or video_folder.info(path)[1]
        frames, size = [], None
        for x_HWC in video_folder.read_frames(path, self.fps, seconds=self.seconds):
            size = size or self._target(path, x_HWC)
            frames.append(self._resize(x_HWC, size))
        return Frames(np.stack(frames), fps)

    def _target(self, path: pathlib.Path, x_HWC: np.ndarray) -> tuple[int, int]:
        try:
            return self.sizes.target(*x_HWC.shape[:2])
        except ValueError as error:
            raise video_folder.BadVideo(f"{path}: {error}") from error

    def _resize(self, x_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        if x_HWC.shape[:2] == size:
            return x_HWC
        image, (height, width) = PIL.Image.fromarray(x_HWC), size
        bicubic = PIL.Image.Resampling.BICUBIC
        if self.sizes.aspects:
            return np.asarray(PIL.ImageOps.fit(image, (width, height), bicubic))
        return np.asarray(image.resize((width, height), bicubic))
