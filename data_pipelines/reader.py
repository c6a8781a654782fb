"""The batches of a plan as pixels: decoded and resized by threads, ahead of who encodes them.

Legend: T frames, H rows, W columns, C colours of pixels.
"""

import collections
import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageOps

from data_pipelines import entries, image_folder, plan, sources, video_folder

_BICUBIC = PIL.Image.Resampling.BICUBIC
_AHEAD = 1 << 26  # pixels that are held beyond the next batch


@dataclasses.dataclass
class Frames:
    """A video: its frames and how many of them are shown in a second."""

    x_THWC: np.ndarray
    fps: float


@dataclasses.dataclass
class Reader:
    """Reads records of a source, images at the sizes of a plan.

    Videos are read at `fps` frames a second (0: their own), each frame resized as an image of its
    size would be.
    """

    source: sources.Source
    sizes: plan.Sizes
    fps: float

    def read(self, batches: list[plan.Batch]) -> Iterator[tuple[plan.Batch, list]]:
        """Each batch with its images x_HWC (or Frames, or BadFile) in the order of its members."""
        todo, ahead, held = collections.deque(batches), collections.deque(), 0
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            while todo or ahead:
                while todo and (len(ahead) < 2 or held < _AHEAD):
                    batch = todo.popleft()
                    held += self._pixels(batch)
                    jobs = [pool.submit(self._try, m, batch) for m in batch.members]
                    ahead.append((batch, jobs))
                batch, jobs = ahead.popleft()
                held -= self._pixels(batch)
                yield batch, [job.result() for job in jobs]

    def _pixels(self, batch: plan.Batch) -> int:
        if batch.size:
            return len(batch.members) * batch.size[0] * batch.size[1]
        frames = (self.fps or 30) * (batch.seconds or 60)  # a guess where nothing bounds it
        return round(frames * self.sizes.max_pixels)

    def _try(self, member: int, batch: plan.Batch) -> np.ndarray | Frames | image_folder.BadFile:
        try:
            file = self.source.file(member)
            return self._image(file, batch.size) if batch.size else self._video(file, batch)
        except image_folder.BadFile as error:
            return error

    def _image(self, file: pathlib.Path | BinaryIO, size: tuple[int, int]) -> np.ndarray:
        image_HWC = image_folder.read_image(file)
        if self.sizes.target(*image_HWC.shape[:2]) != size:
            name = entries.file_name(file)
            raise image_folder.BadImage(f"{name}: its header tells another size than its pixels")
        return self._resize(image_HWC, size)

    def _video(self, file: pathlib.Path | BinaryIO, batch: plan.Batch) -> Frames:
        fps = self.fps or video_folder.info(file)[1]
        frames, size = [], None
        for x_HWC in video_folder.read_frames(file, self.fps, batch.start, batch.seconds):
            size = size or self._target(file, x_HWC)
            frames.append(self._resize(x_HWC, size))
        return Frames(np.stack(frames), fps)

    def _target(self, file: pathlib.Path | BinaryIO, x_HWC: np.ndarray) -> tuple[int, int]:
        try:
            return self.sizes.target(*x_HWC.shape[:2])
        except ValueError as error:
            raise video_folder.BadVideo(f"{entries.file_name(file)}: {error}") from error

    def _resize(self, x_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        if self.sizes.aspects and x_HWC.shape[:2] != size:
            height, width = size
            fitted = PIL.ImageOps.fit(PIL.Image.fromarray(x_HWC), (width, height), _BICUBIC)
            return np.asarray(fitted)
        return _resize(_resize(x_HWC, self.sizes.first(*x_HWC.shape[:2])), size)


def _resize(x_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if x_HWC.shape[:2] == size:
        return x_HWC
    height, width = size
    return np.asarray(PIL.Image.fromarray(x_HWC).resize((width, height), _BICUBIC))
