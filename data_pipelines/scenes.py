"""Pieces of a video that no cut crosses.

Emu3 cuts videos with PySceneDetect's ContentDetector and ThresholdDetector. The rules here are of
that kind: a cut is where a frame differs from the one before by more than a threshold, and black
frames belong to no scene, so that a fade to black ends one. Dissolves are not found.

Frames are compared one after the other, so memory does not grow with a video's length, and at a
size where a pan changes little and a cut as much as ever. They are compared in luma and chroma:
hue and saturation, which the detector named compares, are noise where a picture is grey or dark.

Legend: H rows, W columns, C colours of pixels.
"""

import math
import pathlib
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np
import PIL.Image

from data_pipelines import video_folder

# Cuts between ten photographs and in a film gave 47 and more; that film's motion at 24 frames a
# second at most 21, pans over the photographs in a second a width at most 31.
THRESHOLD = 36.0
BLACK = 12.0  # mean luma, of 0 to 255
SIDE = 16  # pixels, the longer side of what is compared


def clips(
    file: pathlib.Path | BinaryIO,
    fps: float,
    least: float,
    most: float,
    threshold: float = THRESHOLD,
) -> list[tuple[float, float]]:
    """(start, seconds) of pieces of least to most seconds, in order, that no cut crosses.

    They are whole frames at `fps` frames a second (0: the file's rate) from the video's start, so
    that reading a piece at that rate gives the very frames that were compared. Longer scenes are
    divided evenly, shorter ones left out; who wants to count those calls `find` and `divide`.

    Raises BadVideo; ValueError for a threshold of 0 and for lengths between which no frame lies.
    """
    fps = fps or video_folder.info(file)[1]
    # Lengths such as 0.3 s are a little more or less than a whole number of frames.
    least_frames = max(1, math.ceil(least * fps - video_folder.TOLERANCE))
    most_frames = math.floor(most * fps + video_folder.TOLERANCE)
    if not 0 <= least <= most or most_frames < least_frames:
        raise ValueError(
            f"clips of {least:g} to {most:g} s at {fps:g} frames a second: no number of frames "
            "lies between; lower least or raise most"
        )
    scenes = find(video_folder.read_frames(file, fps), threshold)
    pieces = [piece for scene in scenes for piece in divide(scene, least_frames, most_frames)]
    return [(piece.start / fps, len(piece) / fps) for piece in pieces]


def find(frames: Iterable[np.ndarray], threshold: float = THRESHOLD) -> list[range]:
    """The numbers of the frames, uint8 x_HWC, of each scene, in order; ValueError for threshold 0.

    A cut is between two frames whose mean absolute differences in luma and in the two chromas, each
    of 0 to 255, have a sum above `threshold`. Black frames are in no scene.
    """
    if threshold <= 0:
        raise ValueError(f"threshold is {threshold:g}, so all is cut; take one around {THRESHOLD}")
    scenes, before_HWC = [], None
    for number, frame_HWC in enumerate(frames):
        small_HWC = _small(frame_HWC)
        if small_HWC[..., 0].mean() < BLACK:
            before_HWC = None
        elif before_HWC is None or _change(before_HWC, small_HWC) > threshold:
            scenes.append(range(number, number + 1))
            before_HWC = small_HWC
        else:
            scenes[-1] = range(scenes[-1].start, number + 1)
            before_HWC = small_HWC
    return scenes


def divide(scene: range, least: int, most: int) -> list[range]:
    """A scene in as few pieces of least to most frames as cover it, of even length.

    Where no number of pieces covers it (7 frames by 4 or 5) its end is left out, and all of it if
    it is shorter than `least`.
    """
    count = min(math.ceil(len(scene) / most), len(scene) // least)
    used = min(len(scene), count * most)
    return [scene[i * used // count : (i + 1) * used // count] for i in range(count)]


def _small(frame_HWC: np.ndarray) -> np.ndarray:
    """Luma and chromas of a frame at SIDE pixels, each the mean of those that it stands for."""
    image = PIL.Image.fromarray(frame_HWC)
    scale = max(1.0, max(image.size) / SIDE)
    size = tuple(max(1, round(side / scale)) for side in image.size)
    small = image.resize(size, PIL.Image.Resampling.BOX)
    return np.asarray(small.convert("YCbCr")).astype(np.float32)


def _change(before_HWC: np.ndarray, after_HWC: np.ndarray) -> float:
    return float(np.abs(after_HWC - before_HWC).mean(axis=(0, 1)).sum())
