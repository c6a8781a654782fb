"""The opponent in adversarial training: PatchGAN (arXiv 1611.07004), which judges patches.

It is only ever used while it trains, and judges real pictures and reconstructions in batches apart.
So its batch norm takes the statistics of the batch at hand, as taming-transformers' does, and
records none: there is no other use for them.

Legend: B batch of frames, H height, W width, C channels; h w the grid of patches.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from tokenizer import blocks, vq

NORMS = ("batch", "none")
SIZE = 4  # of the kernels
SLOPE = 0.2  # of what is negative
DEVIATION = 0.02  # of initial kernels, as in pix2pix and taming-transformers


class Discriminator(nnx.Module):
    """`layers` halvings, one layer more, and a logit a patch: above 0 for real.

    2 layers see patches of 34x34 pixels, 3 of 70x70; widths double up to 8 times `width`.
    """

    def __init__(self, layers: int, width: int, norm: str, normal: blocks.Normal):
        widths = [3, *(width * min(2**level, 8) for level in range(layers + 1))]
        self.layers = layers
        self.convs = nnx.List(
            [
                # A bias in front of batch norm would do nothing.
                Conv(widths[i], widths[i + 1], 2 if i < layers else 1, normal,
                     bias=norm == "none" or i == 0)
                for i in range(layers + 1)
            ]
        )  # fmt: skip
        normed = widths[2:] if norm == "batch" else []
        self.norms = nnx.List([BatchNorm(channels) for channels in normed])
        self.conv_out = Conv(widths[-1], 1, 1, normal)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Frames in [-1, 1] to logits_Bhw. ValueError if they are too small for one patch."""
        height, width = x_BHWC.shape[1:3]
        least = 3 * 2**self.layers  # the layers after the halvings take a pixel each
        if min(height, width) < least:
            raise ValueError(
                f"a discriminator of {self.layers} layers needs {least}x{least} pixels, not "
                f"{height}x{width}; take fewer layers or larger pictures"
            )
        for i, conv in enumerate(self.convs):
            x_BHWC = conv(x_BHWC)
            if i and self.norms:
                x_BHWC = self.norms[i - 1](x_BHWC)
            x_BHWC = jax.nn.leaky_relu(x_BHWC, SLOPE)
        return self.conv_out(x_BHWC)[..., 0]


class Conv(nnx.Module):
    """A 4x4 convolution with a border of one pixel."""

    def __init__(
        self, channels_in: int, channels: int, stride: int, normal: blocks.Normal, bias: bool = True
    ):
        self.stride = stride
        self.kernel = nnx.Param(DEVIATION * normal((SIZE, SIZE, channels_in, channels)))
        self.bias = nnx.Param(jnp.zeros(channels)) if bias else None

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        padding = ((1, 1), (1, 1))
        y_BHWC = blocks.convolve(x_BHWC, self.kernel[...], self.stride, padding)
        return y_BHWC if self.bias is None else y_BHWC + self.bias[...]


class BatchNorm(nnx.Module):
    """Norm over all frames of the batch at hand, whichever devices they are on."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        mean_C = x_BHWC.mean((0, 1, 2))
        var_C = jnp.square(x_BHWC - mean_C).mean((0, 1, 2))
        gain_C = jax.lax.rsqrt(var_C + blocks.BATCH_NORM_EPS) * self.scale[...]
        return (x_BHWC - mean_C) * gain_C + self.bias[...]


def init(layers: int, width: int, norm: str, key: jax.Array) -> vq.Arrays:
    """New weights, a flat dict by dotted name.

    Raises ValueError for a norm that is unknown, or fewer than one layer.
    """
    if norm not in NORMS or layers < 1:
        raise ValueError(
            f"no discriminator of {layers} layers with norm {norm!r}; "
            f"take 1 layer or more, and one of {', '.join(NORMS)}"
        )
    keys = iter(jax.random.split(key, layers + 2))
    normal = lambda shape: jax.random.normal(next(keys), shape)  # noqa: E731
    return vq.flat(nnx.split(Discriminator(layers, width, norm, normal))[1])


def merge(layers: int, width: int, norm: str, params: vq.Arrays) -> Discriminator:
    """The discriminator of these weights; cheap, and works on traced arrays."""
    graph, state = structure(layers, width, norm)
    found = [(path, params[vq.dotted(path)]) for path, _ in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(found))


def names(layers: int, width: int, norm: str) -> list[str]:
    """Of the weights."""
    return list(vq.flat(structure(layers, width, norm)[1]))


@functools.lru_cache(maxsize=16)
def structure(layers: int, width: int, norm: str) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Discriminator(layers, width, norm, jnp.zeros)))
