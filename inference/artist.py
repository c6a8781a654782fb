"""A trained model at work: images and video for captions, videos gone on with, answers in text.

B images or videos  T pixel frames, H rows, W columns, C colours  t latent frames, h rows, w columns
of codes
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import chat
from emu3_jax import convert, generate, jacobi
from emu3_jax import vocab as vocabulary
from emu3_jax.mesh import Mesh
from emu3_jax.sampling import PRESETS, Sampling
from tokenizer import convert as tokenizer_convert
from tokenizer import pixels


@dataclasses.dataclass
class Model:
    """The models of a job: runs of ours, or published weights in one of their layouts.

    `suffix` is put behind each caption, and `negative` is the caption of guidance's other branch.
    `cache_dtype` "int8" halves the memory of keys and values. With a `window` so many tokens of an
    image are guessed at once (see jacobi.py), which may pay for one image at a time. Several hosts
    work apart, each on the `mesh` of its own devices.
    """

    tokenizer: str = ""
    decoder: str = ""
    vocab: str = ""
    suffix: str = ""
    negative: str = ""
    cache_dtype: str = ""
    window: int = 0
    mesh: Mesh = dataclasses.field(default_factory=lambda: Mesh(data=-1, fsdp=1))

    @contextlib.contextmanager
    def load(self) -> Iterator["Artist"]:
        """The models, with their mesh as the current one; ValueError if one is not named."""
        for name in ("tokenizer", "decoder", "vocab"):
            if not getattr(self, name):
                raise ValueError(f"no {name} is named; give --config.model.{name}=PATH")
        with jax.set_mesh(self.mesh.make(jax.local_devices())):
            yield Artist(self)


@dataclasses.dataclass
class Canvas:
    """An image of a ratio "w:h" and about `area` pixels; with `fps` a video of some `seconds`."""

    ratio: str = "1:1"
    area: int = 720 * 720
    seconds: float = 5.0
    fps: float = 0.0

    def picture(self, artist: "Artist", caption: str, copy: int = 0) -> "Picture":
        """What an artist is told; raises ValueError for a canvas without a code."""
        grid = grid_of(self.ratio, self.area, artist.factor)
        if not self.fps:
            return Picture(caption, grid, copy=copy)
        frames = round(self.seconds * self.fps / artist.temporal)
        if frames < 1:
            raise ValueError(
                f"{self.seconds:g} s at {self.fps:g} frames a second are no {artist.temporal} "
                "frames, which make one latent frame"
            )
        return Picture(caption, grid, frames, self.fps, copy=copy)


class Picture(NamedTuple):
    """What to draw: an image of a `grid` (h, w), or with `fps` a video of `frames` latent frames.

    `given_thw` are the codes of its first frames. Equal ones differ by their `copy`.
    """

    caption: str
    grid: tuple[int, int]
    frames: int = 1
    fps: float = 0.0
    given_thw: np.ndarray | None = None
    copy: int = 0


class Artist:
    """Tokenizer, decoder and vocabulary; the decoder lies on the current mesh (jax.set_mesh).

    Raises ValueError if they do not fit.
    """

    def __init__(self, model: Model):
        self.vq = tokenizer_convert.load(model.tokenizer)
        self.factor, self.temporal = self.vq.config.spatial_factor, self.vq.config.temporal_factor
        decoder, params = convert.load(model.decoder)
        self.vocab = vocabulary.Vocab.load(model.vocab, self.vq.config.codebook_size)
        if self.vocab.size != decoder.vocab:
            raise ValueError(
                f"{model.vocab} with {self.vocab.codes} codes gives {self.vocab.size} ids, "
                f"the decoder has {decoder.vocab}; use the vocabulary it was trained with"
            )
        self._suffix, self._negative = model.suffix, model.negative
        weights = decoder, params, self.vocab.ids, self.vocab.text_size, model.cache_dtype
        self.generator = generate.Generator(*weights)
        if model.window:
            self.generator = jacobi.Speculative(*weights, window=model.window)

    def codes(self, image_BHWC: np.ndarray) -> np.ndarray:
        """uint8 pixels to codes_Bhw."""
        return np.asarray(self.vq.encode(pixels.to_float(jnp.asarray(image_BHWC))))

    def pixels(self, codes_Bhw: np.ndarray) -> np.ndarray:
        """Codes to uint8 pixels [B, H, W, 3]."""
        return np.asarray(pixels.to_uint8(self.vq.decode(jnp.asarray(codes_Bhw))))

    def video_codes(self, x_BTHWC: np.ndarray) -> np.ndarray:
        """uint8 frames to codes_Bthw, as stores have them: every latent frame by itself."""
        return np.asarray(self.vq.encode_clips(pixels.to_float(jnp.asarray(x_BTHWC))))

    def video_pixels(self, codes_Bthw: np.ndarray) -> np.ndarray:
        """Codes of videos to uint8 frames [B, T, H, W, 3]."""
        return np.asarray(pixels.to_uint8(self.vq.decode_clips(jnp.asarray(codes_Bthw))))

    def draw(
        self, pictures: Sequence[Picture], sampling: Sampling, watch: Callable | None = None
    ) -> list[np.ndarray]:
        """The codes of each that are not given, int32 codes_thw; `watch` as in Generator.codes."""
        return self.generator.codes([self._request(p) for p in pictures], sampling, watch)

    def shown(self, picture: Picture, codes_thw: np.ndarray) -> np.ndarray:
        """The pixels of a drawn picture: uint8 [H, W, C] of an image, [T, H, W, C] of a video."""
        if picture.fps:
            return self.video_pixels(codes_thw[None])[0]
        return self.pixels(codes_thw)[0]

    def go_on(
        self, picture: Picture, times: int, sampling: Sampling, watch: Callable | None = None
    ) -> np.ndarray:
        """A video that begins with the given frames and goes on -> all of its codes_thw.

        Each time as many frames as were given follow, out of those before: `picture.frames` counts
        both.
        """
        drawn = [picture.given_thw]
        for number in range(times):
            step = picture._replace(given_thw=drawn[-1], copy=picture.copy + number)
            drawn += self.draw([step], sampling, watch)
        return np.concatenate(drawn)

    def describe(self, blocks: Sequence[np.ndarray], length: int) -> list[str]:
        """The likeliest text behind each image or video block, as in documents that a caption ends.

        At most `length` ids of it.
        """
        prompts = [[self.vocab.bos, *block.tolist()] for block in blocks]
        return self.texts(prompts, length, PRESETS["greedy"])

    def answer(
        self, block: np.ndarray | None, turns: Sequence[tuple[str, str]], length: int,
        sampling: Sampling, watch: Callable | None = None,
    ) -> str:  # fmt: skip
        """The answer to the last of some questions (whose own answer is empty), about an image or
        video block or about nothing."""
        prompt = chat.prompt(turns, self.vocab, block)
        return self.texts([prompt], length, sampling, watch)[0].strip()

    def texts(
        self, prompts: Sequence[Sequence[int]], length: int, sampling: Sampling,
        watch: Callable | None = None,
    ) -> list[str]:  # fmt: skip
        """What follows each prompt, up to EOS."""
        drawn = self.generator.text(prompts, length, sampling, watch=watch)
        return [self.vocab.decode(ids) for ids in drawn]

    def _request(self, picture: Picture) -> generate.Request:
        words, (h, w) = self.vocab, picture.grid
        head, given = words.image_head(h, w), 0
        if picture.fps:
            head = words.video_head(picture.frames, h, w, picture.fps, self.temporal)
        if picture.given_thw is not None:
            head, given = [*head, *words.frames(picture.given_thw).tolist()], len(picture.given_thw)
        prompt, null = ([words.bos, *words.encode(text), *head]
                        for text in (picture.caption + self._suffix, self._negative))  # fmt: skip
        return generate.Request(prompt, null, (picture.frames, h, w), given, picture.copy)


def grid_of(ratio: str, area: int, factor: int) -> tuple[int, int]:
    """Rows and columns of codes of an image of so many pixels and a ratio "w:h", as Emu3 has it.

    Raises ValueError if that is no ratio, or the image would have no code.
    """
    sides = ratio.split(":")
    if len(sides) != 2 or not all(s.isdecimal() and int(s) for s in sides) or len(ratio) > 12:
        raise ValueError(f"ratio {ratio!r}: want width:height, as in 16:9")
    w, h = map(int, sides)
    side = math.sqrt(area / (w * h)) / factor
    grid = round(h * side), round(w * side)
    if min(grid) < 1:
        raise ValueError(f"an image of {area} pixels and {ratio} has no code along a side")
    return grid
