"""Files that the jobs read and write: prompts, images and videos.

T frames, H rows and W columns of pixels, C colours
"""

import collections
import io
import pathlib
import tempfile

import numpy as np
import PIL.Image
import PIL.PngImagePlugin

from data_pipelines import image_folder, video_folder
from emu3_jax import untrusted


def lines(path: str) -> list[str]:
    """The lines of a text file that are not blank; ValueError if it cannot be read."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({untrusted.first_line(error)})") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def image(path: str, height: int, width: int) -> np.ndarray:
    """uint8 image_HWC of a file, its middle, in so many pixels; ValueError for a bad one."""
    return fitted(image_folder.read_image(pathlib.Path(path)), height, width)


def last_frames(path: str, count: int, fps: float, size: tuple[int, int]) -> np.ndarray:
    """uint8 x_THWC: the last frames of a video, their middles, in (height, width) pixels."""
    if not path or not pathlib.Path(path).is_file():
        raise ValueError(f"video {path!r}: no such file")
    frames = collections.deque(video_folder.read_frames(pathlib.Path(path), fps), count)
    if len(frames) < count:
        raise ValueError(f"{path} has {len(frames)} frames at {fps:g} a second, {count} are needed")
    return np.stack([fitted(x_HWC, *size) for x_HWC in frames])


def fitted(x_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """The largest middle of that shape, resized by PIL's bicubic filter."""
    H, W, _ = x_HWC.shape
    scale = min(H / height, W / width)
    left, top = (W - width * scale) / 2, (H - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    resized = PIL.Image.fromarray(x_HWC).resize((width, height), PIL.Image.BICUBIC, box=box)
    return np.asarray(resized)


def png(image_HWC: np.ndarray, about: dict[str, str]) -> bytes:
    """A PNG with some texts by name."""
    texts = PIL.PngImagePlugin.PngInfo()
    for name, text in about.items():
        texts.add_text(name, text)
    file = io.BytesIO()
    PIL.Image.fromarray(image_HWC).save(file, "png", pnginfo=texts)
    return file.getvalue()


def mp4(video_THWC: np.ndarray, fps: float) -> bytes:
    """A video as write_video has it, which is then written like all else."""
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch, "video.mp4")
        video_folder.write_video(path, video_THWC, fps)
        return path.read_bytes()


def grid(paths: list[pathlib.Path], columns: int) -> bytes:
    """A PNG of images of one size side by side, so many in a row."""
    images = [image_folder.read_image(path) for path in paths]
    H, W = (max(x_HWC.shape[axis] for x_HWC in images) for axis in (0, 1))
    sheet = np.full((-(-len(images) // columns) * H, columns * W, 3), 255, np.uint8)
    for index, x_HWC in enumerate(images):
        top, left = index // columns * H, index % columns * W
        sheet[top : top + x_HWC.shape[0], left : left + x_HWC.shape[1]] = x_HWC
    return png(sheet, {})
