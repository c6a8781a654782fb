"""The Inception v3 of 2015-12-05, whose 2048 features the FID and rFID are defined on.

Its weights are in no package, so they are given by path and hash: the state dict of pytorch-fid's
pt_inception-2015-12-05-6726825d.pth, written once as safetensors where PyTorch is:

    state = torch.load("pt_inception-2015-12-05-6726825d.pth", weights_only=True)  # runs nothing
    safetensors.torch.save_file(state, PATH)

Layer by layer this is pytorch-fid's network: torchvision's with average pools that leave the border
out and a max pool in the last block. It has been compared with that code on random weights only.

Weights are {"Mixed_5b.branch1x1": {"kernel": HWIO, "bias": O}, ...}, batch norm folded in, and an
argument of every function.

Legend: B batch, H height, W width, C channels, I O channels in and out of a kernel.
"""

import hashlib
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

NAME = "FID"
FEATURES = 2048
SIDE = 299  # pixels; other sizes are resized
BATCH_NORM_EPS = 1e-3

# Each branch is a chain of convolutions and pools; a pair in it forks and is joined again.
BLOCK_A = (
    ("branch1x1",),
    ("branch5x5_1", "branch5x5_2"),
    ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
    ("average", "branch_pool"),
)
BLOCK_B = (
    ("branch3x3",),
    ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
    ("halve",),
)
BLOCK_C = (
    ("branch1x1",),
    ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
    tuple(f"branch7x7dbl_{i}" for i in range(1, 6)),
    ("average", "branch_pool"),
)
BLOCK_D = (
    ("branch3x3_1", "branch3x3_2"),
    tuple(f"branch7x7x3_{i}" for i in range(1, 5)),
    ("halve",),
)
BLOCK_E = (
    ("branch1x1",),
    ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
    ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")),
    ("average", "branch_pool"),
)
BLOCK_E_MAX = (*BLOCK_E[:3], ("max", "branch_pool"))
STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "halve")
STEM += ("Conv2d_3b_1x1", "Conv2d_4a_3x3", "halve")
BLOCKS = {
    **{f"Mixed_5{letter}": BLOCK_A for letter in "bcd"},
    "Mixed_6a": BLOCK_B,
    **{f"Mixed_6{letter}": BLOCK_C for letter in "bcde"},
    "Mixed_7a": BLOCK_D,
    "Mixed_7b": BLOCK_E,
    "Mixed_7c": BLOCK_E_MAX,
}
POOLS = ("halve", "average", "max")
STRIDED = (
    "Conv2d_1a_3x3",
    "Mixed_6a.branch3x3",
    "Mixed_6a.branch3x3dbl_3",
    "Mixed_7a.branch3x3_2",
    "Mixed_7a.branch7x7x3_4",
)
UNPADDED = (*STRIDED, "Conv2d_2a_3x3", "Conv2d_4a_3x3")

Params = dict[str, dict]


def load(path: str | pathlib.Path, sha256: str) -> Params:
    """Returns the weights as NumPy arrays: jax.device_put them once.

    ValueError when the file is missing, has another hash, is no safetensors or lacks a layer.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(
            f"no Inception weights {path}; tokenizer/inception.py says how to get them"
        )
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"file {path} has sha256 {found}, expected {sha256}; give the right one")
    try:
        state = safetensors.numpy.load_file(path)
        return {name: _folded(state, name) for name in convolutions()}
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"file {path} holds no Inception weights: {error!r}") from None


def convolutions() -> Iterator[str]:
    """Yields the names of the 94 convolutions in the order they run."""
    yield from (layer for layer in STEM if layer not in POOLS)
    for block, branches in BLOCKS.items():
        for layer in (layer for branch in branches for layer in branch):
            for name in layer if isinstance(layer, tuple) else (layer,):
                if name not in POOLS:
                    yield f"{block}.{name}"


def features(params: Params, x_BHWC: jax.Array) -> jax.Array:
    """Returns the 2048 features f_BC of RGB images in [-1, 1], of any size.

    The FID is defined on pictures of 8 bits: round to 1/127.5 first. They are resized to 299x299,
    bilinear between pixel centres and without smoothing, as pytorch-fid does.
    """
    if x_BHWC.ndim != 4 or x_BHWC.shape[-1] != 3:
        raise ValueError(f"images of {x_BHWC.shape}; Inception needs [B, H, W, 3]")
    shape = (x_BHWC.shape[0], SIDE, SIDE, 3)
    x_BHWC = x_BHWC.astype(jnp.float32)
    x_BHWC = jax.image.resize(x_BHWC, shape, "linear", antialias=False)
    x_BHWC = _chain(params, STEM, x_BHWC, "")
    for block, branches in BLOCKS.items():
        parts = [_chain(params, branch, x_BHWC, f"{block}.") for branch in branches]
        x_BHWC = jnp.concatenate(parts, axis=-1)
    return x_BHWC.mean(axis=(1, 2))


def _chain(params: Params, layers: tuple, x_BHWC: jax.Array, prefix: str) -> jax.Array:
    for layer in layers:
        if isinstance(layer, tuple):
            parts = [_chain(params, (name,), x_BHWC, prefix) for name in layer]
            x_BHWC = jnp.concatenate(parts, axis=-1)
        elif layer in POOLS:
            x_BHWC = _pool(x_BHWC, layer)
        else:
            x_BHWC = _convolve(params, prefix + layer, x_BHWC)
    return x_BHWC


def _convolve(params: Params, name: str, x_BHWC: jax.Array) -> jax.Array:
    kernel_HWIO, stride = params[name]["kernel"], 2 if name in STRIDED else 1
    height, width = (0, 0) if name in UNPADDED else (side // 2 for side in kernel_HWIO.shape[:2])
    y_BHWC = jax.lax.conv_general_dilated(
        x_BHWC,
        kernel_HWIO,
        window_strides=(stride, stride),
        padding=[(height, height), (width, width)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return jax.nn.relu(y_BHWC + params[name]["bias"])


def _pool(x_BHWC: jax.Array, kind: str) -> jax.Array:
    """Over 3x3 pixels: the largest in steps of 2 ("halve"), else "max" or "average" around each.

    Pixels outside the image are not counted.
    """
    window = (1, 3, 3, 1)
    if kind == "halve":
        return jax.lax.reduce_window(x_BHWC, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), "VALID")
    if kind == "max":
        return jax.lax.reduce_window(x_BHWC, -jnp.inf, jax.lax.max, window, (1, 1, 1, 1), "SAME")
    total_BHWC, count_1HW1 = (
        jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1, 1, 1, 1), "SAME")
        for x in (x_BHWC, jnp.ones((1, *x_BHWC.shape[1:3], 1)))
    )
    return total_BHWC / count_1HW1


def _folded(state: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """One convolution with its batch norm, which at rest is a scale and a shift of each channel."""
    keys = ("weight", "bias", "running_mean", "running_var")
    scale_O, shift_O, mean_O, variance_O = (state[f"{name}.bn.{k}"].astype("f8") for k in keys)
    scale_O = scale_O / np.sqrt(variance_O + BATCH_NORM_EPS)
    kernel_HWIO = state[f"{name}.conv.weight"].transpose(2, 3, 1, 0) * scale_O
    return {
        "kernel": kernel_HWIO.astype("f4"),
        "bias": (shift_O - mean_O * scale_O).astype("f4"),
    }
