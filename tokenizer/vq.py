"""Emu3's vision tokenizer: pixels to codes and back, for images and for video.

An image is, by definition, a clip of `temporal_factor` equal frames, of which decoding keeps the
first. The 2-D layers treat every frame alone, so here an image passes them once, not four times:
only the 4-channel latent is repeated for the layers over time. Those look back only, so the first
decoded frame needs no later one. The results are the same.

Legend: B batch, T frames, H height, W width, C channels; t h w the latent grid, E code dim.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from tokenizer import autoencoder, blocks, quantize
from tokenizer.config import VQConfig

Arrays = dict[str, jax.Array]


class VQ(nnx.Module):
    """The whole tokenizer. Pixels are floats in [-1, 1], codes are int32.

    encode, encode_video, decode and decode_video are compiled once per shape and use the recorded
    batch statistics. `normal` gives the random numbers to start from, see `init`.
    """

    def __init__(self, config: VQConfig, normal: blocks.Normal):
        config.check()
        self.config = dataclasses.replace(config)
        self.encoder = autoencoder.Encoder(config, normal)
        self.decoder = autoencoder.Decoder(config, normal)
        self.quantize = Codebook(config, normal)
        self.quant_conv = blocks.CausalConv(config.latent_channels, 3, 1, normal, gain=1.0)
        self.post_quant_conv = blocks.CausalConv(config.code_dim, 3, 1, normal, gain=1.0)

    @nnx.jit
    def encode(self, x_BHWC: jax.Array) -> jax.Array:
        """Images to codes_Bhw. A height or width that is no multiple of `spatial_factor` floors."""
        return self.quantize.nearest(self.image_latents(x_BHWC))

    @nnx.jit
    def encode_video(self, x_BTHWC: jax.Array) -> jax.Array:
        """Clips to codes_Bthw, t = T // temporal_factor; frames beyond a multiple are dropped.

        Codes depend on where a clip starts: two clips of 4 frames are not one clip of 8.
        """
        return self.quantize.nearest(self.video_latents(x_BTHWC))

    @nnx.jit
    def decode(self, codes_Bhw: jax.Array) -> jax.Array:
        """Codes to images x_BHWC, not clamped to [-1, 1]."""
        return self.image_pixels(self.quantize.lookup(codes_Bhw))

    @nnx.jit
    def decode_video(self, codes_Bthw: jax.Array) -> jax.Array:
        """Codes to clips x_BTHWC of T = t * temporal_factor frames, not clamped to [-1, 1]."""
        return self.video_pixels(self.quantize.lookup(codes_Bthw))

    def image_latents(self, x_BHWC: jax.Array, train: bool = False) -> jax.Array:
        """Images to the vectors z_BhwE that the quantizer sees."""
        self.check_size(x_BHWC)
        z_BhwC = self.encoder.frames(x_BHWC)
        z_BTHWC = jnp.repeat(z_BhwC[:, None], self.config.temporal_factor, axis=1)
        return self.quant_conv(self.encoder.time(z_BTHWC, train))[:, 0]

    def video_latents(self, x_BTHWC: jax.Array, train: bool = False) -> jax.Array:
        """Clips to the vectors z_BthwE that the quantizer sees."""
        self.check_size(x_BTHWC)
        if x_BTHWC.shape[1] < self.config.temporal_factor:
            raise ValueError(
                f"a clip of {x_BTHWC.shape[1]} frames is shorter than temporal_factor "
                f"{self.config.temporal_factor}; repeat its last frame or encode images"
            )
        z_BTHWC = per_frame(self.encoder.frames, x_BTHWC)
        return self.quant_conv(self.encoder.time(z_BTHWC, train))

    def image_pixels(self, q_BhwE: jax.Array, train: bool = False) -> jax.Array:
        """Code vectors to images; the opposite of `image_latents`."""
        q_BTHWC = q_BhwE[:, None]
        z_BTHWC, zq_BTHWC = self.decoder.time(
            self.post_quant_conv(q_BTHWC), q_BTHWC, train, first_frame=True
        )
        return self.decoder.frames(z_BTHWC[:, 0], zq_BTHWC[:, 0])

    def video_pixels(self, q_BthwE: jax.Array, train: bool = False) -> jax.Array:
        """Code vectors to clips; the opposite of `video_latents`."""
        z_BTHWC, zq_BTHWC = self.decoder.time(self.post_quant_conv(q_BthwE), q_BthwE, train)
        return per_frame(self.decoder.frames, z_BTHWC, zq_BTHWC)

    def check_size(self, x_HWC: jax.Array):
        height, width = x_HWC.shape[-3:-1]
        if min(height, width) < self.config.spatial_factor:
            raise ValueError(
                f"an image of {height}x{width} pixels is smaller than one code, "
                f"{self.config.spatial_factor}x{self.config.spatial_factor}; enlarge it first"
            )


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


def merge(config: VQConfig, params: Arrays, stats: Arrays) -> VQ:
    """The opposite of `split`; cheap, and works on traced arrays."""
    graph, state = structure(dataclasses.replace(config))
    arrays = params | stats
    paths = {dotted(path): path for path, _ in nnx.to_flat_state(state)}
    if arrays.keys() != paths.keys():
        odd = min(arrays.keys() ^ paths.keys())
        raise ValueError(f"{odd} is in only one of the arrays and the tokenizer of {config}")
    return nnx.merge(graph, nnx.from_flat_state([(paths[name], arrays[name]) for name in paths]))


def shapes(config: VQConfig) -> tuple[Arrays, Arrays]:
    """What `init` would make, as shapes and dtypes; allocates nothing."""
    _, state = structure(dataclasses.replace(config))
    return flat(nnx.filter_state(state, nnx.Param)), flat(nnx.filter_state(state, nnx.BatchStat))


@functools.lru_cache(maxsize=16)
def structure(config: VQConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: VQ(config, jnp.zeros)))


def flat(state: nnx.State) -> Arrays:
    return {dotted(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def dotted(path: tuple) -> str:
    return ".".join(str(part) for part in path)


def per_frame(layers, *clips_BTHWC: jax.Array) -> jax.Array:
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
