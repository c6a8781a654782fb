"""The FID's Inception against a PyTorch one, written out block by block with random thin layers.

Tried by hand, for no package has that network whole: against pytorch-fid's own code at full width,
with random weights, features of about 2 differed by at most 1e-5.
"""

import hashlib

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from tokenizer import inception

WIDTH = 4


class Reference:
    """Runs the network and makes a layer's weights up where it first needs them."""

    def __init__(self):
        self.state = {}
        self.random = torch.Generator().manual_seed(0)

    def __call__(self, x_BHWC: np.ndarray) -> torch.Tensor:
        x = torch.tensor(x_BHWC).permute(0, 3, 1, 2)
        x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
        x = self.conv("Conv2d_1a_3x3", x, 3, stride=2)
        x = self.conv("Conv2d_2a_3x3", x, 3)
        x = F.max_pool2d(self.conv("Conv2d_2b_3x3", x, 3, padding=1), 3, 2)
        x = self.conv("Conv2d_4a_3x3", self.conv("Conv2d_3b_1x1", x, 1), 3)
        x = F.max_pool2d(x, 3, 2)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.block_a(name, x)
        x = self.block_b("Mixed_6a", x)
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self.block_c(name, x)
        x = self.block_d("Mixed_7a", x)
        x = self.block_e("Mixed_7b", x, lambda x: average(x))
        x = self.block_e("Mixed_7c", x, lambda x: F.max_pool2d(x, 3, 1, 1))
        return x.mean((2, 3))

    def block_a(self, name, x):
        five = self.conv(f"{name}.branch5x5_1", x, 1)
        double = self.conv(f"{name}.branch3x3dbl_1", x, 1)
        double = self.conv(f"{name}.branch3x3dbl_2", double, 3, padding=1)
        return join(
            self.conv(f"{name}.branch1x1", x, 1),
            self.conv(f"{name}.branch5x5_2", five, 5, padding=2),
            self.conv(f"{name}.branch3x3dbl_3", double, 3, padding=1),
            self.conv(f"{name}.branch_pool", average(x), 1),
        )

    def block_b(self, name, x):
        double = self.conv(f"{name}.branch3x3dbl_1", x, 1)
        double = self.conv(f"{name}.branch3x3dbl_2", double, 3, padding=1)
        return join(
            self.conv(f"{name}.branch3x3", x, 3, stride=2),
            self.conv(f"{name}.branch3x3dbl_3", double, 3, stride=2),
            F.max_pool2d(x, 3, 2),
        )

    def block_c(self, name, x):
        once = self.row(f"{name}.branch7x7_2", self.conv(f"{name}.branch7x7_1", x, 1), 7)
        twice = self.column(f"{name}.branch7x7dbl_2", self.conv(f"{name}.branch7x7dbl_1", x, 1), 7)
        twice = self.column(
            f"{name}.branch7x7dbl_4", self.row(f"{name}.branch7x7dbl_3", twice, 7), 7
        )
        return join(
            self.conv(f"{name}.branch1x1", x, 1),
            self.column(f"{name}.branch7x7_3", once, 7),
            self.row(f"{name}.branch7x7dbl_5", twice, 7),
            self.conv(f"{name}.branch_pool", average(x), 1),
        )

    def block_d(self, name, x):
        three = self.conv(f"{name}.branch3x3_1", x, 1)
        seven = self.row(f"{name}.branch7x7x3_2", self.conv(f"{name}.branch7x7x3_1", x, 1), 7)
        seven = self.column(f"{name}.branch7x7x3_3", seven, 7)
        return join(
            self.conv(f"{name}.branch3x3_2", three, 3, stride=2),
            self.conv(f"{name}.branch7x7x3_4", seven, 3, stride=2),
            F.max_pool2d(x, 3, 2),
        )

    def block_e(self, name, x, pool):
        once = self.conv(f"{name}.branch3x3_1", x, 1)
        twice = self.conv(f"{name}.branch3x3dbl_1", x, 1)
        twice = self.conv(f"{name}.branch3x3dbl_2", twice, 3, padding=1)
        return join(
            self.conv(f"{name}.branch1x1", x, 1),
            self.row(f"{name}.branch3x3_2a", once, 3),
            self.column(f"{name}.branch3x3_2b", once, 3),
            self.row(f"{name}.branch3x3dbl_3a", twice, 3),
            self.column(f"{name}.branch3x3dbl_3b", twice, 3),
            self.conv(f"{name}.branch_pool", pool(x), 1),
        )

    def row(self, name, x, size):
        return self.conv(name, x, (1, size), padding=(0, size // 2))

    def column(self, name, x, size):
        return self.conv(name, x, (size, 1), padding=(size // 2, 0))

    def conv(self, name, x, size, stride=1, padding=0):
        if f"{name}.conv.weight" not in self.state:
            self.make_up(name, x.shape[1], (size, size) if isinstance(size, int) else size)
        x = F.conv2d(x, self.state[f"{name}.conv.weight"], None, stride, padding)
        keys = ("running_mean", "running_var", "weight", "bias")
        norm = [self.state[f"{name}.bn.{key}"] for key in keys]
        return F.relu(F.batch_norm(x, *norm, training=False, eps=0.001))

    def make_up(self, name, channels, size):
        normal = lambda *shape: torch.randn(*shape, generator=self.random)  # noqa: E731
        spread = (2 / (channels * size[0] * size[1])) ** 0.5
        self.state[f"{name}.conv.weight"] = normal(WIDTH, channels, *size) * spread
        self.state[f"{name}.bn.weight"] = 1 + normal(WIDTH) / 5
        self.state[f"{name}.bn.bias"] = 0.8 + normal(WIDTH) / 5
        self.state[f"{name}.bn.running_mean"] = normal(WIDTH) / 5
        self.state[f"{name}.bn.running_var"] = (1 + normal(WIDTH) / 5) ** 2


def join(*parts):
    return torch.cat(parts, dim=1)


def average(x):
    """TensorFlow's average pool: what lies outside the image does not count."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _save(state: dict, path) -> str:
    safetensors.torch.save_file(state, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_features_agree_with_torch_and_files_are_checked(tmp_path):
    reference, path = Reference(), tmp_path / "inception.safetensors"
    x_BHWC = np.random.default_rng(0).uniform(-1, 1, (2, 40, 330, 3)).astype(np.float32)
    expected_BC = reference(x_BHWC)
    sha256 = _save(reference.state, path)
    weights = inception.load(path, sha256)
    assert len(weights) == 94 and expected_BC.shape == (2, 6 * WIDTH)
    assert (expected_BC.std(dim=0) > 0).float().mean() > 0.7
    f_BC = jax.jit(inception.features)(weights, x_BHWC)
    np.testing.assert_allclose(f_BC, expected_BC, rtol=1e-4, atol=1e-5)

    with pytest.raises(ValueError, match=f"has sha256 {sha256}, expected abc; give the right one"):
        inception.load(path, "abc")
    del reference.state["Mixed_7c.branch_pool.bn.bias"]
    sha256 = _save(reference.state, path)
    with pytest.raises(ValueError, match="no Inception weights: .*Mixed_7c.branch_pool.bn.bias"):
        inception.load(path, sha256)


def test_other_files_and_images_are_refused(tmp_path):
    path = tmp_path / "inception.pth"
    with pytest.raises(ValueError, match="no Inception weights .*pth; tokenizer/inception.py says"):
        inception.load(path, "abc")
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="holds no Inception weights: SafetensorError"):
        inception.load(path, hashlib.sha256(b"no safetensors").hexdigest())
    with pytest.raises(ValueError, match=r"images of \(1, 8, 8, 4\); Inception needs \[B, H, W, 3"):
        inception.features({}, np.zeros((1, 8, 8, 4)))
