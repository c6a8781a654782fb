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
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tokenizer import blocks, quantize

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(unsafe_hash=True)
class VQConfig:
    """The defaults are Emu3's released tokenizer (270,740,287 parameters, 8x8 pixels a code).

    Height and width shrink by 2 at every level but the last. `attention_levels` are indices of
    `multipliers`. The PyTorch implementations fix 32 norm groups, so only such a tokenizer exports.
    """

    codebook_size: int = 32768
    code_dim: int = 4
    latent_channels: int = 4
    width: int = 256
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    res_blocks: int = 2
    attention_levels: tuple[int, ...] = (3,)
    temporal_factor: int = 4
    norm_groups: int = 32

    def __post_init__(self):
        self.multipliers = tuple(self.multipliers)
        self.attention_levels = tuple(self.attention_levels)

    @property
    def spatial_factor(self) -> int:
        """Pixels per code, along height and along width."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of every level, finest first."""
        return [self.width * multiplier for multiplier in self.multipliers]

    def check(self):
        """Raises ValueError on a combination that no tokenizer can have."""
        if self.code_dim != self.latent_channels:
            raise ValueError(
                f"code_dim {self.code_dim} differs from latent_channels {self.latent_channels}; "
                "set them equal, the decoder runs both through the same layers"
            )
        for channels in [self.width, *self.widths]:
            if channels % self.norm_groups:
                raise ValueError(
                    f"{channels} channels do not split into norm_groups {self.norm_groups}; "
                    f"change width {self.width} or multipliers {self.multipliers}"
                )
        for level in self.attention_levels:
            if not 0 <= level < len(self.multipliers):
                raise ValueError(
                    f"attention_levels {self.attention_levels} names level {level}, but "
                    f"multipliers {self.multipliers} has levels 0 to {len(self.multipliers) - 1}"
                )
        if self.temporal_factor < 1 or self.temporal_factor & (self.temporal_factor - 1):
            raise ValueError(
                f"temporal_factor {self.temporal_factor} is not a power of two; use 1, 2, 4, ..."
            )


class VQ(nnx.Module):
    """The whole tokenizer. Pixels are floats in [-1, 1], codes are int32.

    encode, encode_video, decode and decode_video are compiled once per shape and use the recorded
    batch statistics. `normal` gives the random numbers to start from, see `init`.
    """

    def __init__(self, config: VQConfig, normal: blocks.Normal):
        config.check()
        self.config = dataclasses.replace(config)
        self.encoder = Encoder(config, normal)
        self.decoder = Decoder(config, normal)
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


class Encoder(nnx.Module):
    """Frames to 4-channel latents in 2-D, then fewer frames."""

    def __init__(self, config: VQConfig, normal: blocks.Normal):
        norm = functools.partial(blocks.GroupNorm, groups=config.norm_groups)
        widths = config.widths
        self.conv_in = blocks.Conv(3, config.width, normal)
        self.down = nnx.List(
            [
                Level(
                    [channels_in] + [channels] * (config.res_blocks - 1),
                    channels,
                    level in config.attention_levels,
                    blocks.Downsample if level < len(widths) - 1 else None,
                    norm,
                    normal,
                )
                for level, (channels_in, channels) in enumerate(
                    zip([config.width, *widths], widths, strict=False)
                )
            ]
        )
        self.mid = Middle(widths[-1], norm, normal)
        self.norm_out = norm(widths[-1])
        self.conv_out = blocks.Conv(widths[-1], config.latent_channels, normal)
        self.time_conv, self.time_res_stack = time_layers(config, frames=4, stride=2, normal=normal)

    def frames(self, x_BHWC: jax.Array) -> jax.Array:
        x_BHWC = self.conv_in(x_BHWC)
        for level in self.down:
            x_BHWC = level(x_BHWC)
        x_BHWC = self.norm_out(self.mid(x_BHWC))
        return self.conv_out(jax.nn.silu(x_BHWC))

    def time(self, z_BTHWC: jax.Array, train: bool) -> jax.Array:
        for layer in self.time_conv:
            z_BTHWC = jax.nn.silu(layer(z_BTHWC))
        for block in self.time_res_stack:
            z_BTHWC = block(z_BTHWC, train)
        return z_BTHWC


class Decoder(nnx.Module):
    """More frames of 4-channel latents, then pixels in 2-D, with norms steered by the codes."""

    def __init__(self, config: VQConfig, normal: blocks.Normal):
        norm = functools.partial(
            blocks.SpatialNorm, groups=config.norm_groups, code_dim=config.code_dim, normal=normal
        )
        widths = config.widths
        self.time_conv, self.time_res_stack = time_layers(config, frames=3, stride=1, normal=normal)
        self.conv_in = blocks.Conv(config.latent_channels, widths[-1], normal)
        self.mid = Middle(widths[-1], norm, normal)
        self.up = nnx.List(
            [
                Level(
                    [channels_in] + [channels] * config.res_blocks,
                    channels,
                    level in config.attention_levels,
                    blocks.Upsample if level > 0 else None,
                    norm,
                    normal,
                )
                for level, (channels_in, channels) in enumerate(
                    zip([*widths[1:], widths[-1]], widths, strict=True)
                )
            ]
        )
        self.norm_out = norm(widths[0])
        self.conv_out = blocks.Conv(widths[0], 3, normal)

    def time(
        self, z_BTHWC: jax.Array, q_BTHWC: jax.Array, train: bool, first_frame: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Both through the same layers as one batch; with `first_frame` only that one is made."""
        both_BTHWC = jnp.concatenate([z_BTHWC, q_BTHWC])
        for block in self.time_res_stack:
            both_BTHWC = block(both_BTHWC, train)
        if first_frame:
            both_BTHWC = both_BTHWC[:, :1]
        for layer in self.time_conv:
            if not first_frame:
                both_BTHWC = jnp.repeat(both_BTHWC, 2, axis=1)
            both_BTHWC = jax.nn.silu(layer(both_BTHWC))
        return tuple(jnp.split(both_BTHWC, 2))

    def frames(self, z_BhwC: jax.Array, zq_BhwE: jax.Array) -> jax.Array:
        x_BHWC = self.mid(self.conv_in(z_BhwC), zq_BhwE)
        for level in reversed(self.up):
            x_BHWC = level(x_BHWC, zq_BhwE)
        return self.conv_out(jax.nn.silu(self.norm_out(x_BHWC, zq_BhwE)))


class Level(nnx.Module):
    """Residual blocks at one resolution, attention after each if asked for, then a resize."""

    def __init__(
        self,
        channels_in: list[int],
        channels: int,
        attention: bool,
        resize: type | None,
        norm: Callable,
        normal: blocks.Normal,
    ):
        self.block = nnx.List(
            [blocks.ResBlock(width, channels, norm, normal) for width in channels_in]
        )
        self.attn = nnx.List(
            [blocks.AttentionBlock(channels, norm, normal) for _ in channels_in if attention]
        )
        if resize is blocks.Downsample:
            self.downsample = resize(channels, normal)
        elif resize is blocks.Upsample:
            self.upsample = resize(channels, normal)

    def __call__(self, x_BHWC: jax.Array, *zq_BhwE: jax.Array) -> jax.Array:
        for i, block in enumerate(self.block):
            x_BHWC = block(x_BHWC, *zq_BhwE)
            if self.attn:
                x_BHWC = self.attn[i](x_BHWC, *zq_BhwE)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x_BHWC = getattr(self, name)(x_BHWC)
        return x_BHWC


class Middle(nnx.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, norm, normal: blocks.Normal):
        self.block_1 = blocks.ResBlock(channels, channels, norm, normal)
        self.attn_1 = blocks.AttentionBlock(channels, norm, normal)
        self.block_2 = blocks.ResBlock(channels, channels, norm, normal)

    def __call__(self, x_BHWC: jax.Array, *zq_BhwE: jax.Array) -> jax.Array:
        x_BHWC = self.attn_1(self.block_1(x_BHWC, *zq_BhwE), *zq_BhwE)
        return self.block_2(x_BHWC, *zq_BhwE)


class Codebook(nnx.Module):
    """The code vectors."""

    def __init__(self, config: VQConfig, normal: blocks.Normal):
        size = config.codebook_size
        # As wide as Emu3's own start: all codes in one tiny ball. Training places them (train.py).
        self.embedding = nnx.Param(normal((size, config.code_dim)) / (3**0.5 * size))

    def nearest(self, z_E: jax.Array) -> jax.Array:
        return quantize.nearest_code(z_E, self.embedding[...])

    def lookup(self, codes: jax.Array) -> jax.Array:
        return self.embedding[...][codes].astype(jnp.float32)


def time_layers(config: VQConfig, frames: int, stride: int, normal: blocks.Normal):
    """The convolutions that halve (or follow a doubling of) time, and the residual blocks."""
    channels = config.latent_channels
    convs = [
        blocks.CausalConv(channels, frames, 3, normal, stride=stride, gain=2.0)
        for _ in range(config.temporal_factor.bit_length() - 1)
    ]
    res_stack = [blocks.TemporalResBlock(channels, normal) for _ in range(config.res_blocks)]
    return nnx.List(convs), nnx.List(res_stack)
