"""Encoding without a trained tokenizer, and pictures to encode: what the tests of sources use."""

import io
import pathlib

import numpy as np
import PIL.Image

from data_pipelines import encode, store, video_folder
from emu3_jax import vocab as vocabulary

VOCAB = vocabulary.Vocab({bytes([i]): i for i in range(256)}, codes=64)
CAPTIONS = ["a dog", "", "两只猫", "a bird\nin a tree", "fish"]


class FakeTokenizer:
    """Codes are the mean red of each 8x8 block, over 4; remembers the shapes it saw."""

    def __init__(self):
        self.shapes = []

    def batch(self, height, width):
        assert height % 8 == width % 8 == 0
        return 4

    def images(self, x_BHWC):
        self.shapes.append(x_BHWC.shape)
        batch, height, width, _ = x_BHWC.shape
        assert x_BHWC.dtype == np.uint8 and batch <= 4
        blocks = x_BHWC[..., 0].reshape(batch, 1, height // 8, 8, width // 8, 8)
        return lambda: np.round(blocks.mean((3, 5)) / 4).astype(np.int32)

    def video(self, x_THWC):
        codes_Tthw = self.images(x_THWC[:4])()
        return lambda: codes_Tthw[:, 0][None]


def picture(i: int) -> bytes:
    """A file: a JPEG of noise in one of two shapes."""
    rng, file = np.random.default_rng(i), io.BytesIO()
    image_HWC = rng.integers(0, 256, (40, 40 + 16 * (i % 2), 3), np.uint8)
    PIL.Image.fromarray(image_HWC).save(file, "JPEG")
    return file.getvalue()


def film(path: pathlib.Path, levels: list[int], fps: float = 10) -> bytes:
    """A video file whose frames are grey, with these levels; its bytes."""
    frames = [np.full((16, 24, 3), level, np.uint8) for level in levels]
    video_folder.write_video(path, frames, fps)
    return path.read_bytes()


def documents(source, directory: pathlib.Path, **options) -> list[tuple]:
    """What encoding makes of a source: (key, caption, codes, fps, frames) of each document."""
    settings = {"min_pixels": 64, "max_pixels": 1024, "parts": 2} | options
    job = encode.Encode(source=source, directory=str(directory), **settings)
    assert encode.encode(job, FakeTokenizer(), "t" * 64, VOCAB)
    opened = store.Store(str(directory))
    return [
        (key, VOCAB.decode(d.text), d.codes_thw.tolist(), d.fps, d.frames)
        for key, d in zip(opened.keys(), opened.read(range(len(opened))), strict=True)
    ]


def folder(directory: pathlib.Path, names: list[str]) -> pathlib.Path:
    """A directory of `picture`s with CAPTIONS in sidecars, none for an empty one."""
    for i, (name, caption) in enumerate(zip(names, CAPTIONS, strict=True)):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
        if caption:
            path.with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")
    return directory
