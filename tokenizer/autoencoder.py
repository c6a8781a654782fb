"""The encoder and the decoder around the codes: deep in 2-D, thin over time.

Legend: B batch (frames count as batch in 2-D layers), T frames, H height, W width, C channels;
h w the latent grid, E code dim.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tokenizer import blocks
from tokenizer.config import VQConfig


class Encoder(nnx.Module):
    """Frames to 4-channel latents in 2-D, then fewer frames.

    The 2-D layers compute in `dtype` up to the last block. What follows, little work but close to
    the codes, is in float32.
    """

    def __init__(self, config: VQConfig, normal: blocks.Normal, dtype: str):
        self.dtype = dtype
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
        x_BHWC = self.conv_in(x_BHWC.astype(self.dtype))
        for level in self.down:
            x_BHWC = level(x_BHWC)
        x_BHWC = self.norm_out(self.mid(x_BHWC).astype(jnp.float32))
        return self.conv_out(jax.nn.silu(x_BHWC))

    def time(self, z_BTHWC: jax.Array, train: bool, past: blocks.Past | None = None) -> jax.Array:
        for layer in self.time_conv:
            z_BTHWC = jax.nn.silu(layer(z_BTHWC, past))
        for block in self.time_res_stack:
            z_BTHWC = block(z_BTHWC, train, past)
        return z_BTHWC


class Decoder(nnx.Module):
    """More frames of 4-channel latents, then pixels in 2-D, with norms steered by the codes.

    `dtype` is as in the encoder.
    """

    def __init__(self, config: VQConfig, normal: blocks.Normal, dtype: str):
        self.dtype = dtype
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
        self,
        z_BTHWC: jax.Array,
        q_BTHWC: jax.Array,
        train: bool,
        first_frame: bool = False,
        past: blocks.Past | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Both through the same layers as one batch; with `first_frame` only that one is made."""
        both_BTHWC = jnp.concatenate([z_BTHWC, q_BTHWC])
        for block in self.time_res_stack:
            both_BTHWC = block(both_BTHWC, train, past)
        if first_frame:
            both_BTHWC = both_BTHWC[:, :1]
        for layer in self.time_conv:
            if not first_frame:
                both_BTHWC = jnp.repeat(both_BTHWC, 2, axis=1)
            both_BTHWC = jax.nn.silu(layer(both_BTHWC, past))
        return tuple(jnp.split(both_BTHWC, 2))

    def frames(self, z_BhwC: jax.Array, zq_BhwE: jax.Array) -> jax.Array:
        steer_BhwE = zq_BhwE.astype(self.dtype)
        x_BHWC = self.mid(self.conv_in(z_BhwC.astype(self.dtype)), steer_BhwE)
        for level in reversed(self.up):
            x_BHWC = level(x_BHWC, steer_BhwE)
        x_BHWC = self.norm_out(x_BHWC.astype(jnp.float32), zq_BhwE)
        return self.conv_out(jax.nn.silu(x_BHWC))


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


def time_layers(config: VQConfig, frames: int, stride: int, normal: blocks.Normal):
    """The convolutions that halve (or follow a doubling of) time, and the residual blocks."""
    channels = config.latent_channels
    convs = [
        blocks.CausalConv(channels, frames, 3, normal, stride=stride, gain=2.0)
        for _ in range(config.temporal_factor.bit_length() - 1)
    ]
    res_stack = [blocks.TemporalResBlock(channels, normal) for _ in range(config.res_blocks)]
    return nnx.List(convs), nnx.List(res_stack)
