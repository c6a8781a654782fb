"""Frechet distance between two sets of images: between Gaussians fitted to their features.

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr sqrt(C1 C2)          (Dowson and Landau, 1982)

over the mean m and covariance C of each set. With the features of `inception`, for which one has
to have the weights, this is the FID. The features here are others, so the number has another name,
FD-vgg16, and is compared with nothing but itself: VGG16's relu5_3 averaged over the image (512
numbers), from the weights that LPIPS uses. It falls as a set grows, so compare sets of one size;
of fewer than some thousand images it says little, and below 513 a covariance lacks full rank.

Statistics are summed in float64 on the host, batch by batch.

Legend: B batch, H height, W width, C channels (features).
"""

import jax
import numpy as np

from tokenizer import lpips

NAME = "FD-vgg16"
FEATURES = 512


def features(params: lpips.Params, x_BHWC: jax.Array) -> jax.Array:
    """Returns the 512 features f_BC of RGB images in [-1, 1] of at least 16 pixels a side.

    `params` are lpips.load("vgg"). Images are taken at the size they have; give both sets one size.
    """
    return lpips.features("vgg", params, x_BHWC)[-1].mean(axis=(1, 2))


class Statistics:
    """Mean and covariance of features that come in batches, of any sizes and in any order."""

    def __init__(self, channels: int = FEATURES):
        self.count = 0
        self.mean_C = np.zeros(channels)
        self._scatter_CC = np.zeros((channels, channels))  # sum of products of deviations

    def add(self, f_BC: np.ndarray) -> None:
        """Takes in a batch (Chan, Golub and LeVeque, 1979). ValueError for another width or NaN."""
        f_BC = np.asarray(f_BC, np.float64)
        channels = len(self.mean_C)
        if f_BC.ndim != 2 or f_BC.shape[1] != channels or not np.isfinite(f_BC).all():
            raise ValueError(f"features of {f_BC.shape}; give finite numbers of [B, {channels}]")
        if not len(f_BC):
            return
        batch_mean_C = f_BC.mean(axis=0)
        deviation_BC, shift_C = f_BC - batch_mean_C, batch_mean_C - self.mean_C
        total = self.count + len(f_BC)
        between = self.count * len(f_BC) / total
        self._scatter_CC += deviation_BC.T @ deviation_BC + between * np.outer(shift_C, shift_C)
        self.mean_C = self.mean_C + shift_C * len(f_BC) / total
        self.count = total

    @property
    def covariance_CC(self) -> np.ndarray:
        """The unbiased covariance, over N - 1. ValueError for fewer than 2 images."""
        if self.count < 2:
            raise ValueError(f"a covariance of {self.count} images; add at least 2")
        return self._scatter_CC / (self.count - 1)


def distance(one: Statistics, two: Statistics) -> float:
    """Returns the Frechet distance, not negative; ValueError for fewer than 2 images in a set.

    C1 C2 has the eigenvalues of sqrt(C1) C2 sqrt(C1), which is symmetric: the root stays real
    whatever the rounding, and where a covariance is singular.
    """
    if len(one.mean_C) != len(two.mean_C):
        raise ValueError(f"features of {len(one.mean_C)} and {len(two.mean_C)}; give one network's")
    c1_CC, c2_CC = one.covariance_CC, two.covariance_CC
    root_CC = _root(c1_CC)
    value_C = np.linalg.eigvalsh(root_CC @ c2_CC @ root_CC)
    overlap = np.sum(np.sqrt(np.maximum(value_C, 0)))
    apart = np.sum((one.mean_C - two.mean_C) ** 2)
    return max(0.0, float(apart + np.trace(c1_CC) + np.trace(c2_CC) - 2 * overlap))


def _root(c_CC: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance; eigenvalues that rounding made negative are 0."""
    value_C, vector_CC = np.linalg.eigh(c_CC)
    return (vector_CC * np.sqrt(np.maximum(value_C, 0))) @ vector_CC.T
