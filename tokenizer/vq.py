"""Emu3's vision tokenizer: pixels to codes and back, for images and for video.

An image is, by definition, a clip of `temporal_factor` equal frames, of which decoding keeps the
first. The 2-D layers treat every frame alone, so here an image passes them once, not four times:
only the 4-channel latent is repeated for the layers over time. Those look back only, so the first
decoded frame needs no later one. The results are the same.

There are two ways to encode a video. They give different codes, which decode the same way only:
    encode_video, encode_stream   the layers over time see the frames before, over any chunks
    encode_clips                  every `temporal_factor` frames alone, as Emu3's own script does
Both run the 2-D layers on `temporal_factor` frames of each video at a time. So memory does not grow
with length, and chunks differ from the whole by no more than what XLA rounds differently.

Legend: B batch, T frames, H height, W width, C channels; t h w the latent grid, E code dim,
N clips of `temporal_factor` frames, L groups of frames.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenizer import autoencoder, blocks, quantize
from tokenizer.config import VQConfig

Arrays = dict[str, jax.Array]
Tails = Sequence[jax.Array]
DTYPES = ("float32", "bfloat16")


class VQ(nnx.Module):
    """The whole tokenizer. Pixels are floats in [-1, 1], codes are int32.

    What takes pixels and gives codes, or the reverse, is compiled once per shape and uses the
    recorded batch statistics. `normal` gives the random numbers to start from, see `init`. The 2-D
    layers compute in `dtype`; norms, layers over time and distances to codes stay in float32.
    """

    def __init__(self, config: VQConfig, normal: blocks.Normal, dtype: str = "float32"):
        config.check()
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
        self.config = dataclasses.replace(config)
        self.encoder = autoencoder.Encoder(config, normal, dtype)
        self.decoder = autoencoder.Decoder(config, normal, dtype)
        self.quantize = Codebook(config, normal)
        self.quant_conv = blocks.CausalConv(config.latent_channels, 3, 1, normal, gain=1.0)
        self.post_quant_conv = blocks.CausalConv(config.code_dim, 3, 1, normal, gain=1.0)

    @nnx.jit
    def encode(self, x_BHWC: jax.Array) -> jax.Array:
        """Images to codes_Bhw. A height or width that is no multiple of `spatial_factor` floors."""
        return self.quantize.nearest(self.image_latents(x_BHWC))

    @nnx.jit
    def decode(self, codes_Bhw: jax.Array) -> jax.Array:
        """Codes to images x_BHWC, not clamped to [-1, 1]."""
        return self.image_pixels(self.quantize.lookup(codes_Bhw))

    def encode_video(self, x_BTHWC: jax.Array) -> jax.Array:
        """Videos to codes_Bthw, t = T // temporal_factor; frames beyond a multiple are dropped.

        Codes depend on where a video starts: two of 4 frames are not one of 8.
        """
        return self.encode_stream(self.whole_clips(x_BTHWC))[0]

    def decode_video(self, codes_Bthw: jax.Array) -> jax.Array:
        """Codes to videos x_BTHWC of T = t * temporal_factor frames, not clamped to [-1, 1]."""
        return self.decode_stream(codes_Bthw)[0]

    def encode_stream(
        self, x_BTHWC: jax.Array, past: Tails | None = None
    ) -> tuple[jax.Array, Tails]:
        """The next chunk of videos to (codes_Bthw, the `past` of the chunk after it).

        Any chunks of a multiple of `temporal_factor` frames give the codes of `encode_video`.

        Raises:
            ValueError: another number of frames, or `past` does not fit.
        """
        self.check_size(x_BTHWC)
        batch, frames, *size, _ = x_BTHWC.shape
        if not frames or frames % self.config.temporal_factor:
            raise ValueError(
                f"a chunk of {frames} frames is no multiple of temporal_factor "
                f"{self.config.temporal_factor}; pad_frames repeats the last frame"
            )
        h, w = (side // self.config.spatial_factor for side in size)
        return self.encode_next(x_BTHWC, self.tails(past, (batch, h, w), branches=1))

    def decode_stream(
        self, codes_Bthw: jax.Array, past: Tails | None = None
    ) -> tuple[jax.Array, Tails]:
        """The next codes of videos to (x_BTHWC, the `past` of the codes after them).

        Any chunks give the pixels of `decode_video`. ValueError if `past` does not fit.
        """
        batch, _, h, w = codes_Bthw.shape
        return self.decode_next(codes_Bthw, self.tails(past, (batch, h, w), branches=2))

    @nnx.jit
    def encode_clips(self, x_BTHWC: jax.Array) -> jax.Array:
        """As `encode_video`, but every `temporal_factor` frames alone."""
        z_BTHWC = self.frame_latents(self.whole_clips(x_BTHWC))
        z_NTHWC = z_BTHWC.reshape(-1, self.config.temporal_factor, *z_BTHWC.shape[2:])
        z_NthwE = self.quant_conv(self.encoder.time(z_NTHWC, train=False))
        return self.codes(z_NthwE.reshape(len(x_BTHWC), -1, *z_NthwE.shape[2:]))

    @nnx.jit
    def decode_clips(self, codes_Bthw: jax.Array) -> jax.Array:
        """As `decode_video`, for codes of `encode_clips`."""
        q_NhwE = self.quantize.lookup(codes_Bthw.reshape(-1, *codes_Bthw.shape[2:]))
        q_NthwE = q_NhwE[:, None]
        pair = self.decoder.time(self.post_quant_conv(q_NthwE), q_NthwE, train=False)
        batch = len(codes_Bthw)
        return self.frame_pixels(*(z.reshape(batch, -1, *z.shape[2:]) for z in pair))

    @nnx.jit
    def encode_next(self, x_BTHWC: jax.Array, tails: Tails) -> tuple[jax.Array, Tails]:
        past = blocks.Past(tails)
        return self.codes(self.video_latents(x_BTHWC, past=past)), past.new_tails

    @nnx.jit
    def decode_next(self, codes_Bthw: jax.Array, tails: Tails) -> tuple[jax.Array, Tails]:
        past = blocks.Past(tails)
        return self.video_pixels(self.quantize.lookup(codes_Bthw), past=past), past.new_tails

    def tails(self, past: Tails | None, shape_Bhw: tuple[int, ...], branches: int) -> Tails:
        """`past` if it fits, and for None that of a video which starts: zeros.

        The convolutions over time see `branches` times the batch, other than the one at the codes.
        """
        batch, h, w = shape_Bhw
        layers = self.config.temporal_factor.bit_length() - 1 + 2 * self.config.res_blocks
        shapes = [
            (rows, blocks.FRONT, h, w, self.config.code_dim)
            for rows in [batch] + [batch * branches] * layers
        ]
        if past is None:
            return [jnp.zeros(shape) for shape in shapes]
        have = [tail.shape for tail in past]
        if have != shapes:
            raise ValueError(
                f"past ends with an array of shape {have[-1]}, this chunk needs {shapes[-1]}; "
                "give what the chunk before it returned, or None at the start of a video"
            )
        return past

    def image_latents(self, x_BHWC: jax.Array, train: bool = False) -> jax.Array:
        """Images to the vectors z_BhwE that the quantizer sees."""
        self.check_size(x_BHWC)
        z_BhwC = self.encoder.frames(x_BHWC)
        z_BTHWC = jnp.repeat(z_BhwC[:, None], self.config.temporal_factor, axis=1)
        return self.quant_conv(self.encoder.time(z_BTHWC, train))[:, 0]

    def video_latents(
        self, x_BTHWC: jax.Array, train: bool = False, past: blocks.Past | None = None
    ) -> jax.Array:
        """Videos to the vectors z_BthwE that the quantizer sees."""
        z_BTHWC = self.frame_latents(self.whole_clips(x_BTHWC))
        return self.quant_conv(self.encoder.time(z_BTHWC, train, past), past)

    def image_pixels(self, q_BhwE: jax.Array, train: bool = False) -> jax.Array:
        """Code vectors to images; the opposite of `image_latents`."""
        q_BTHWC = q_BhwE[:, None]
        z_BTHWC, zq_BTHWC = self.decoder.time(
            self.post_quant_conv(q_BTHWC), q_BTHWC, train, first_frame=True
        )
        return self.decoder.frames(z_BTHWC[:, 0], zq_BTHWC[:, 0])

    def video_pixels(
        self, q_BthwE: jax.Array, train: bool = False, past: blocks.Past | None = None
    ) -> jax.Array:
        """Code vectors to videos; the opposite of `video_latents`."""
        z_BthwE = self.post_quant_conv(q_BthwE, past)
        return self.frame_pixels(*self.decoder.time(z_BthwE, q_BthwE, train, past=past))

    def frame_latents(self, x_BTHWC: jax.Array) -> jax.Array:
        """The part of encoding that treats every frame alone."""
        self.check_size(x_BTHWC)
        return in_groups(self.encoder.frames, self.config.temporal_factor, x_BTHWC)

    def frame_pixels(self, z_BTHWC: jax.Array, zq_BTHWC: jax.Array) -> jax.Array:
        """The part of decoding that treats every frame alone."""
        return in_groups(self.decoder.frames, self.config.temporal_factor, z_BTHWC, zq_BTHWC)

    def codes(self, z_BthwE: jax.Array) -> jax.Array:
        """Vectors of videos to codes_Bthw; compares one latent frame at a time, to save memory."""
        return in_groups(self.quantize.nearest, 1, z_BthwE)

    def whole_clips(self, x_BTHWC: jax.Array) -> jax.Array:
        """`x` without the frames beyond a multiple of `temporal_factor`."""
        frames, factor = x_BTHWC.shape[1], self.config.temporal_factor
        if frames < factor:
            raise ValueError(
                f"a clip of {frames} frames is shorter than temporal_factor {factor}; repeat its "
                "last frame or encode images"
            )
        return x_BTHWC[:, : frames - frames % factor]

    def check_size(self, x_HWC: jax.Array):
        height, width = x_HWC.shape[-3:-1]
        if min(height, width) < self.config.spatial_factor:
            raise ValueError(
                f"an image of {height}x{width} pixels is smaller than one code, "
                f"{self.config.spatial_factor}x{self.config.spatial_factor}; enlarge it first"
            )


def pad_frames(x_THWC: jax.Array, factor: int) -> jax.Array:
    """A video, its last frame repeated up to a multiple of `factor` frames; NumPy stays NumPy.

    The caller keeps the true length, to drop the surplus after decoding.

    Raises:
        ValueError: there is no frame to repeat.
    """
    if not len(x_THWC):
        raise ValueError("a video of 0 frames has no last frame to repeat; skip it")
    frames = -(-len(x_THWC) // factor) * factor
    return x_THWC[np.minimum(np.arange(frames), len(x_THWC) - 1)]


@functools.partial(jax.jit, static_argnums=0)
def init(config: VQConfig, key: jax.Array) -> tuple[Arrays, Arrays]:
    """A new tokenizer as (params, batch statistics), see `split`."""
    # All numbers are drawn at once, and the barrier keeps it so: one draw a weight takes XLA 10 to
    # 20 s to compile.
    size = sum(value.size for value in shapes(config)[0].values())
    normal_N = jax.lax.optimization_barrier(jax.random.normal(key, (size,)))
    used = 0

    def normal(shape: tuple[int, ...]) -> jax.Array:
        nonlocal used
        used += math.prod(shape)
        return normal_N[used - math.prod(shape) : used].reshape(shape)

    return split(VQ(config, normal))


def split(vq: VQ) -> tuple[Arrays, Arrays]:
    """The trained arrays and the recorded batch statistics, each a flat dict by dotted name."""
    _, params, stats = nnx.split(vq, nnx.Param, nnx.BatchStat)
    return flat(params), flat(stats)


def merge(config: VQConfig, params: Arrays, stats: Arrays, dtype: str = "float32") -> VQ:
    """The opposite of `split`; cheap, and works on traced arrays.

    Args:
        dtype: what the 2-D layers compute in, float32 or bfloat16; the arrays stay as they are.
    """
    graph, state = structure(dataclasses.replace(config), dtype)
    arrays = params | stats
    paths = {dotted(path): path for path, _ in nnx.to_flat_state(state)}
    if arrays.keys() != paths.keys():
        odd = min(arrays.keys() ^ paths.keys())
        raise ValueError(f"{odd} is in only one of the arrays and the tokenizer of {config}")
    return nnx.merge(graph, nnx.from_flat_state([(paths[name], arrays[name]) for name in paths]))


def shapes(config: VQConfig) -> tuple[Arrays, Arrays]:
    """What `init` would make, as shapes and dtypes; allocates nothing."""
    _, state = structure(dataclasses.replace(config), "float32")
    return flat(nnx.filter_state(state, nnx.Param)), flat(nnx.filter_state(state, nnx.BatchStat))


@functools.lru_cache(maxsize=16)
def structure(config: VQConfig, dtype: str) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: VQ(config, jnp.zeros, dtype)))


def flat(state: nnx.State) -> Arrays:
    return {dotted(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def dotted(path: tuple) -> str:
    return ".".join(str(part) for part in path)


def in_groups(layers: Callable, frames: int, *clips_BTHWC: jax.Array) -> jax.Array:
    """As `per_frame`, for `frames` frames of each clip at a time."""
    batch, length = clips_BTHWC[0].shape[:2]
    clips_LBTHWC = [
        x_BTHWC.reshape(batch, length // frames, frames, *x_BTHWC.shape[2:]).swapaxes(0, 1)
        for x_BTHWC in clips_BTHWC
    ]
    y_LBTHWC = jax.lax.map(lambda group: per_frame(layers, *group), clips_LBTHWC)
    return y_LBTHWC.swapaxes(0, 1).reshape(batch, length, *y_LBTHWC.shape[3:])


def per_frame(layers: Callable, *clips_BTHWC: jax.Array) -> jax.Array:
    """Applies 2-D layers to clips, frames folded into the batch."""
    batch, frames = clips_BTHWC[0].shape[:2]
    y_BHWC = layers(*(x_BTHWC.reshape(-1, *x_BTHWC.shape[2:]) for x_BTHWC in clips_BTHWC))
    return y_BHWC.reshape(batch, frames, *y_BHWC.shape[1:])


class Codebook(nnx.Module):
    """The code vectors."""

    def __init__(self, config: VQConfig, normal: blocks.Normal):
        # Emu3's own start is uniform in +-1/codebook_size: so small a ball that the decoder's norms
        # amplify it a thousandfold. Loaded weights replace either, and so does training (train.py).
        self.embedding = nnx.Param(normal((config.codebook_size, config.code_dim)))

    def nearest(self, z_E: jax.Array) -> jax.Array:
        return quantize.nearest_code(z_E, self.embedding[...])

    def lookup(self, codes: jax.Array) -> jax.Array:
        return self.embedding[...][codes].astype(jnp.float32)
