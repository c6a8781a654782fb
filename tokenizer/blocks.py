"""The layers of Emu3's vision tokenizer: 2-D residual blocks and the thin causal stack over time.

Everything is channels-last and computes in its input's dtype, the statistics of norms and softmax
in float32. Modules that a flag does not concern never see it: only batch norm, and what holds it,
takes `train`.

Legend: B batch (frames count as batch in 2-D layers), T frames, H height, W width, C channels,
h w the latent grid, E code dim, G norm groups, S positions (height times width), Q positions of
one block of L, I O channels in and out of a kernel.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

Normal = Callable[[tuple[int, ...]], jax.Array]  # shape -> standard normal numbers

GROUP_NORM_EPS = 1e-6
BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1  # torch's meaning: the share of the new statistics
ATTENTION_BLOCK = 1024  # queries at a time: bounds the score matrix at 1024 x S
FRONT = 2  # frames that a causal convolution sees before the first, whatever its kernel's length


class ResBlock(nnx.Module):
    """Norm, SiLU, conv, twice, plus the input. The decoder's norms also take the code grid."""

    def __init__(self, channels_in: int, channels: int, norm, normal: Normal):
        self.norm1 = norm(channels_in)
        self.conv1 = Conv(channels_in, channels, normal)
        self.norm2 = norm(channels)
        self.conv2 = Conv(channels, channels, normal)
        changes = channels_in != channels
        self.nin_shortcut = Pointwise(channels_in, channels, normal) if changes else None

    def __call__(self, x_BHWC: jax.Array, *zq_BhwE: jax.Array) -> jax.Array:
        y_BHWC = self.conv1(jax.nn.silu(self.norm1(x_BHWC, *zq_BhwE)))
        y_BHWC = self.conv2(jax.nn.silu(self.norm2(y_BHWC, *zq_BhwE)))
        if self.nin_shortcut is not None:
            x_BHWC = self.nin_shortcut(x_BHWC)
        return x_BHWC + y_BHWC


class AttentionBlock(nnx.Module):
    """One head over all positions of a frame, plus the input."""

    def __init__(self, channels: int, norm, normal: Normal):
        self.norm = norm(channels)
        self.q = Pointwise(channels, channels, normal)
        self.k = Pointwise(channels, channels, normal)
        self.v = Pointwise(channels, channels, normal)
        self.proj_out = Pointwise(channels, channels, normal)

    def __call__(self, x_BHWC: jax.Array, *zq_BhwE: jax.Array) -> jax.Array:
        batch, height, width, channels = x_BHWC.shape
        y_BSC = self.norm(x_BHWC, *zq_BhwE).reshape(batch, height * width, channels)
        y_BSC = attend(self.q(y_BSC), self.k(y_BSC), self.v(y_BSC))
        return x_BHWC + self.proj_out(y_BSC).reshape(x_BHWC.shape)


def attend(q_BSC: jax.Array, k_BSC: jax.Array, v_BSC: jax.Array) -> jax.Array:
    """Softmax attention, at most `ATTENTION_BLOCK` queries at a time, in the gradient too."""
    batch, positions, channels = q_BSC.shape
    count = -(-positions // ATTENTION_BLOCK)
    if count == 1:
        return attend_block(q_BSC, k_BSC, v_BSC)
    size = -(-positions // count)  # equal blocks: fewer than `count` rows are padding
    q_BSC = jnp.pad(q_BSC, ((0, 0), (0, count * size - positions), (0, 0)))
    q_LBQC = q_BSC.reshape(batch, count, size, channels).swapaxes(0, 1)
    # Without the checkpoint the gradient would keep every block's scores: S x S after all.
    block = jax.checkpoint(attend_block, prevent_cse=False)
    y_LBQC = jax.lax.map(lambda q_BQC: block(q_BQC, k_BSC, v_BSC), q_LBQC)
    return y_LBQC.swapaxes(0, 1).reshape(batch, count * size, channels)[:, :positions]


def attend_block(q_BQC: jax.Array, k_BSC: jax.Array, v_BSC: jax.Array) -> jax.Array:
    score_BQS = jnp.einsum("BQC,BSC->BQS", q_BQC, k_BSC, preferred_element_type=jnp.float32)
    weight_BQS = jax.nn.softmax(score_BQS / math.sqrt(q_BQC.shape[-1]), axis=-1)
    return jnp.einsum("BQS,BSC->BQC", weight_BQS.astype(v_BSC.dtype), v_BSC)


class Downsample(nnx.Module):
    """Halves height and width: a stride-2 conv that pads one row below and one column right."""

    def __init__(self, channels: int, normal: Normal):
        self.conv = Conv(channels, channels, normal, stride=2, padding=(0, 1))

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return self.conv(x_BHWC)


class Upsample(nnx.Module):
    """Doubles height and width: nearest neighbour, then a conv.

    Two of the three taps along each axis fall on equal pixels, so each output pixel is a 2x2 conv
    of the small image with kernel rows and columns summed: four of those, one for each place in a
    2x2 square, cost 4/9 of the 3x3 conv on the large image.
    """

    def __init__(self, channels: int, normal: Normal):
        self.conv = Conv(channels, channels, normal)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        batch, height, width, channels = x_BHWC.shape
        rows = []
        for kernel_HWIO, pad_y in halves(self.conv.kernel[...]):
            row = [
                convolve(x_BHWC, kernel_WHIO.swapaxes(0, 1), 1, (pad_y, pad_x))
                for kernel_WHIO, pad_x in halves(kernel_HWIO.swapaxes(0, 1))
            ]
            rows.append(jnp.stack(row, axis=3))
        y_BHyWxC = jnp.stack(rows, axis=2)
        y_BHWC = y_BHyWxC.reshape(batch, 2 * height, 2 * width, channels)
        return y_BHWC + self.conv.bias[...].astype(x_BHWC.dtype)


def halves(kernel_3: jax.Array):
    """For the even and the odd outputs along axis 0: the two taps that are left, and padding."""
    even_2 = jnp.stack([kernel_3[0], kernel_3[1] + kernel_3[2]])
    odd_2 = jnp.stack([kernel_3[0] + kernel_3[1], kernel_3[2]])
    return (even_2, (1, 0)), (odd_2, (0, 1))


class GroupNorm(nnx.Module):
    """Group norm over one frame, statistics in float32."""

    def __init__(self, channels: int, groups: int):
        self.groups = groups
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        x32_BHWC = x_BHWC.astype(jnp.float32)
        mean_BC = self.over_group(x32_BHWC.mean((1, 2)))
        variance_BC = self.over_group(jnp.square(x32_BHWC - mean_BC[:, None, None]).mean((1, 2)))
        gain_BC = jax.lax.rsqrt(variance_BC + GROUP_NORM_EPS) * self.scale[...]
        shift_BC = self.bias[...] - mean_BC * gain_BC
        return (x32_BHWC * gain_BC[:, None, None] + shift_BC[:, None, None]).astype(x_BHWC.dtype)

    def over_group(self, x_BC: jax.Array) -> jax.Array:
        # Space is reduced first, with channels innermost, because that vectorises; then groups.
        mean_BG = x_BC.reshape(len(x_BC), self.groups, -1).mean(-1)
        return jnp.repeat(mean_BG, x_BC.shape[1] // self.groups, axis=1)


class SpatialNorm(nnx.Module):
    """MoVQ's norm (arXiv 2209.09002): group norm whose scale and shift are read off the codes."""

    def __init__(self, channels: int, groups: int, code_dim: int, normal: Normal):
        self.norm_layer = GroupNorm(channels, groups)
        self.conv_y = Pointwise(code_dim, channels, normal, bias=1.0)
        self.conv_b = Pointwise(code_dim, channels, normal, bias=0.0)

    def __call__(self, x_BHWC: jax.Array, zq_BhwE: jax.Array) -> jax.Array:
        # The 1x1 convs commute with nearest resizing, so they run on the small grid.
        y_BHWC = nearest(self.conv_y(zq_BhwE), x_BHWC.shape)
        b_BHWC = nearest(self.conv_b(zq_BhwE), x_BHWC.shape)
        return self.norm_layer(x_BHWC) * y_BHWC + b_BHWC


def nearest(x_BhwC: jax.Array, shape_BHWC: tuple[int, ...]) -> jax.Array:
    """Nearest-neighbour resize to a whole multiple of the grid."""
    batch, h, w, channels = x_BhwC.shape
    scale_y, scale_x = shape_BHWC[1] // h, shape_BHWC[2] // w
    x_BhywxC = jnp.broadcast_to(
        x_BhwC[:, :, None, :, None], (batch, h, scale_y, w, scale_x, channels)
    )
    return x_BhywxC.reshape(batch, h * scale_y, w * scale_x, channels)


class Past:
    """The last two frames that each causal convolution saw: what a clip's next part needs.

    Convolutions run in a fixed order, so a list in that order holds them. Each takes its own from
    `tails` and leaves new ones in `new_tails`. At the start of a clip they are zeros.
    """

    def __init__(self, tails: Sequence[jax.Array]):
        self.tails = tails
        self.new_tails = []

    def extend(self, x_BTHWC: jax.Array) -> jax.Array:
        """`x` with the two frames before it."""
        x_BTHWC = jnp.concatenate([self.tails[len(self.new_tails)], x_BTHWC], axis=1)
        self.new_tails.append(x_BTHWC[:, -FRONT:])
        return x_BTHWC


class CausalConv(nnx.Module):
    """3-D convolution that sees the two frames in front and none behind, whatever its length.

    A clip goes on where `past` left off; without one it starts, with two frames of zeros in front.
    With a stride of 2 that holds for an even number of frames, of which the next starts a pair.
    The taps over time are laid side by side as channels and one 2-D convolution does the rest:
    the same sum, and on 4 channels much faster than a 3-D convolution.
    """

    def __init__(
        self,
        channels: int,
        frames: int,
        size: int,
        normal: Normal,
        *,
        stride: int = 1,
        gain: float = 0.0,
    ):
        self.stride = stride
        self.kernel = nnx.Param(
            causal_kernel(normal, (frames, size, size, channels, channels), gain)
        )
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x_BTHWC: jax.Array, past: Past | None = None) -> jax.Array:
        taps, height, width, channels, out = self.kernel.shape
        if past is None:
            x_BTHWC = jnp.pad(x_BTHWC, ((0, 0), (FRONT, 0), (0, 0), (0, 0), (0, 0)))
        else:
            x_BTHWC = past.extend(x_BTHWC)
        batch, padded = x_BTHWC.shape[:2]
        frames = (padded - taps) // self.stride + 1
        last = (frames - 1) * self.stride + 1
        x_BTHWC = jnp.concatenate(
            [x_BTHWC[:, tap : tap + last : self.stride] for tap in range(taps)], axis=-1
        )
        kernel_HWIO = self.kernel[...].transpose(1, 2, 0, 3, 4)
        kernel_HWIO = kernel_HWIO.reshape(height, width, taps * channels, out)
        x_BHWC = x_BTHWC.reshape(batch * frames, *x_BTHWC.shape[2:])
        y_BHWC = convolve(x_BHWC, kernel_HWIO, 1, "SAME")
        y_BTHWC = y_BHWC.reshape(batch, frames, *y_BHWC.shape[1:])
        return y_BTHWC + self.bias[...].astype(y_BTHWC.dtype)


class TemporalResBlock(nnx.Module):
    """Batch norm, SiLU, causal conv, twice, plus the input."""

    def __init__(self, channels: int, normal: Normal):
        self.norm1 = BatchNorm(channels)
        self.conv1 = CausalConv(channels, 3, 3, normal)
        self.norm2 = BatchNorm(channels)
        self.conv2 = CausalConv(channels, 3, 3, normal)

    def __call__(self, x_BTHWC: jax.Array, train: bool, past: Past | None = None) -> jax.Array:
        y_BTHWC = self.conv1(jax.nn.silu(self.norm1(x_BTHWC, train)), past)
        y_BTHWC = self.conv2(jax.nn.silu(self.norm2(y_BTHWC, train)), past)
        return x_BTHWC + y_BTHWC


class BatchNorm(nnx.Module):
    """Batch norm as torch.nn.BatchNorm3d: training uses and records the batch's statistics."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))
        self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x_BTHWC: jax.Array, train: bool) -> jax.Array:
        x32_BTHWC = x_BTHWC.astype(jnp.float32)
        mean_C, var_C = self.mean[...], self.var[...]
        if train:
            mean_C = x32_BTHWC.mean((0, 1, 2, 3))
            var_C = jnp.square(x32_BTHWC - mean_C).mean((0, 1, 2, 3))
            self.record(mean_C, var_C, x_BTHWC.size // mean_C.size)
        gain_C = jax.lax.rsqrt(var_C + BATCH_NORM_EPS) * self.scale[...]
        shift_C = self.bias[...] - mean_C * gain_C
        return (x32_BTHWC * gain_C + shift_C).astype(x_BTHWC.dtype)

    def record(self, mean_C: jax.Array, var_C: jax.Array, values: int):
        # torch normalises by the biased variance and records the unbiased one.
        unbiased_C = jax.lax.stop_gradient(var_C) * (values / max(values - 1, 1))
        keep = 1 - BATCH_NORM_MOMENTUM
        mean_C = jax.lax.stop_gradient(mean_C)
        self.mean[...] = keep * self.mean[...] + BATCH_NORM_MOMENTUM * mean_C
        self.var[...] = keep * self.var[...] + BATCH_NORM_MOMENTUM * unbiased_C
        self.count[...] = self.count[...] + 1


class Conv(nnx.Module):
    """A 3x3 convolution; `padding` is (before, after), the same for height and width."""

    def __init__(
        self, channels_in: int, channels: int, normal: Normal, *, stride: int = 1, padding=(1, 1)
    ):
        self.stride = stride
        self.padding = padding
        shape_HWIO = (3, 3, channels_in, channels)
        self.kernel = nnx.Param(normal(shape_HWIO) * (9 * channels_in) ** -0.5)
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        y_BHWC = convolve(x_BHWC, self.kernel[...], self.stride, (self.padding, self.padding))
        return y_BHWC + self.bias[...].astype(y_BHWC.dtype)


class Pointwise(nnx.Module):
    """A 1x1 convolution, written as the matrix product that it is."""

    def __init__(self, channels_in: int, channels: int, normal: Normal, *, bias: float = 0.0):
        self.kernel = nnx.Param(normal((channels_in, channels)) * channels_in**-0.5)
        self.bias = nnx.Param(jnp.full(channels, bias))

    def __call__(self, x_C: jax.Array) -> jax.Array:
        return x_C @ self.kernel[...].astype(x_C.dtype) + self.bias[...].astype(x_C.dtype)


def convolve(x_BHWC: jax.Array, kernel_HWIO: jax.Array, stride: int, padding) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x_BHWC,
        kernel_HWIO.astype(x_BHWC.dtype),
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def causal_kernel(normal: Normal, shape_THWIO: tuple[int, ...], gain: float) -> jax.Array:
    """Small noise around "pass the newest frame through, times `gain`".

    An image fills only the last taps, in front of which the padding is zero, and SiLU halves small
    values; with the usual zero-mean kernels four channels lose most of an image on the way.
    """
    taps, height, width, channels, _ = shape_THWIO
    noise_THWIO = normal(shape_THWIO) * (0.1 / (taps * height * width * channels)) ** 0.5
    return noise_THWIO.at[-1, height // 2, width // 2].add(gain * jnp.eye(channels))
