"""Codes that see their own patch alone: an encoder set to a transform of patches, and held there.

Emu3's encoder sees far beyond the pixels that a code stands for: 3x3 kernels, padding at the
borders, attention, norms over the whole picture. With a few thousand pictures to learn from, the
same pixels then get another code in every picture, and nothing that a decoder learns of one
picture holds for the next. So a small tokenizer may start, and stay, like this:

    2-D layers     Downsample: Walsh-Hadamard transform of 2x2, the lowest frequencies that have
                   room; residual branches and attention add nothing; all of it is held
    last level     each feature comes as a pair (x, -x) of one norm group, small against the
                   root of the norm's epsilon: mean 0, variance epsilon, whatever the picture
    norm_out on    trained; of the 3x3 kernels the centre only

It remains an Emu3 tokenizer, whose weights are these.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tokenizer import blocks, vq
from tokenizer.config import VQConfig

SMALL = 2e-5  # of a pixel: a patch of ones then raises the norm's variance by less than 1%
_TRAINED = ("norm_out", "conv_out", "time")


def start(config: VQConfig, params: vq.Arrays, key: jax.Array) -> vq.Arrays:
    """`params` with the encoder set as above; ValueError if the last level can't hold the pairs."""
    *_, channels, last = [0, *config.widths]
    if last < 2 * channels or not channels or last // config.norm_groups % 2:
        raise ValueError(
            f"patches: the last level's {last} channels in {config.norm_groups} groups do not "
            f"hold {channels} pairs; make the last multiplier twice the one before it"
        )
    params = dict(params)
    for name, value in params.items():
        if name.startswith("encoder.") and name.endswith(("conv2.kernel", "proj_out.kernel")):
            params[name] = value * 0
    params["encoder.conv_in.kernel"] = _centre(np.eye(3, config.width))
    orders = np.zeros(3)
    for level, (channels, deeper) in enumerate(zip(config.widths, config.widths[1:], strict=False)):
        kernel_HWIO, orders = _hadamard(orders, channels)
        params[f"encoder.down.{level}.downsample.conv.kernel"] = jnp.asarray(kernel_HWIO)
        shortcut = f"encoder.down.{level + 1}.block.0.nin_shortcut.kernel"
        if shortcut in params:
            params[shortcut] = jnp.eye(channels, deeper)
    pairs_FO = np.kron(np.eye(channels, last // 2), [SMALL, -SMALL])
    params[shortcut] = jnp.asarray(pairs_FO, jnp.float32)
    root = blocks.GROUP_NORM_EPS**0.5
    params["encoder.norm_out.scale"] = jnp.full(last, root / SMALL)
    params["encoder.norm_out.bias"] = jax.random.normal(key, (last,)) / 2
    params["encoder.conv_out.kernel"] *= 3  # drawn for nine taps, of which one is left
    return hold(params)


def hold(params: vq.Arrays) -> vq.Arrays:
    """`params` with what is held cut off from the gradient, and neighbours' taps at 0."""

    def one(name: str, value: jax.Array) -> jax.Array:
        if not name.startswith("encoder."):
            return value
        if not name.startswith(tuple(f"encoder.{part}" for part in _TRAINED)):
            return jax.lax.stop_gradient(value)
        spatial = value.ndim >= 4  # [..., height, width, in, out]
        return value * _centre(np.ones(value.shape[-2:])) if spatial else value

    return {name: one(name, value) for name, value in params.items()}


def _centre(kernel_IO: np.ndarray) -> jax.Array:
    """A 3x3 kernel that looks at its own pixel alone."""
    return jnp.asarray(np.pad(kernel_IO[None, None], ((1, 1), (1, 1), (0, 0), (0, 0))), jnp.float32)


def _hadamard(orders: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """A Downsample's kernel_HWIO, and the frequencies of its outputs, lowest first.

    Every feature gives its sum and its differences over 2x2 pixels; the features that have no room
    in `channels` are those of the highest frequency.
    """
    made = []
    for feature, order in enumerate(orders):
        for down in (0, 1):
            for right in (0, 1):
                signs_22 = np.outer([1, 1 - 2 * down], [1, 1 - 2 * right]) / 2
                made.append((order / 2 + down + right, feature, signs_22))
    made = sorted(made, key=lambda entry: entry[0])[:channels]
    kernel_HWIO = np.zeros((3, 3, channels, channels), np.float32)
    for output, (_, feature, signs_22) in enumerate(made):
        kernel_HWIO[:2, :2, feature, output] = signs_22
    return kernel_HWIO, np.array([order for order, _, _ in made])
