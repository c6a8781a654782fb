"""The Frechet distance against closed forms and scipy's square root of a matrix."""

import jax
import numpy as np
import pytest
import scipy.linalg
import torch

from tests import test_lpips
from tokenizer import frechet


def statistics(f_BC: np.ndarray) -> frechet.Statistics:
    whole = frechet.Statistics(f_BC.shape[1])
    whole.add(f_BC)
    return whole


def gaussian(seed: int, count: int = 300, channels: int = 8) -> np.ndarray:
    """Correlated numbers far from the origin, as features are."""
    rng = np.random.default_rng(seed)
    mix_CC = rng.normal(size=(channels, channels))
    return rng.normal(size=(count, channels)) @ mix_CC + 10 + rng.normal(size=channels)


def test_statistics_are_numpys_however_the_samples_come():
    f_BC = gaussian(0) + 1e4
    parts = frechet.Statistics(8)
    for start, stop in [(200, 300), (0, 1), (1, 1), (1, 150), (150, 200)]:
        parts.add(f_BC[start:stop])
    assert parts.count == 300
    for found in (parts, statistics(f_BC[::-1])):
        np.testing.assert_allclose(found.mean_C, f_BC.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(found.covariance_CC, np.cov(f_BC.T), rtol=1e-7, atol=1e-9)


def test_diagonal_gaussians_have_a_closed_form():
    """Two points a channel, all combinations of signs: means and covariances are exact."""
    signs_BC = np.array(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, -1).T
    s_C, t_C, shift_C = np.array([1, 2, 0.5]), np.array([3, 0.1, 0]), np.array([4, 0, -1])
    one, two = statistics(signs_BC * s_C), statistics(signs_BC * t_C + shift_C)
    expected = np.sum(shift_C**2) + np.sum((s_C - t_C) ** 2) * 8 / 7
    assert frechet.distance(one, two) == pytest.approx(expected, rel=1e-12)


def test_distance_is_what_scipys_root_gives():
    f_BC, g_BC = gaussian(1), gaussian(2)
    one, two = np.cov(f_BC.T), np.cov(g_BC.T)
    expected = np.sum((f_BC.mean(axis=0) - g_BC.mean(axis=0)) ** 2) + np.trace(one + two)
    expected -= 2 * np.trace(scipy.linalg.sqrtm(one @ two)).real
    found = frechet.distance(statistics(f_BC), statistics(g_BC))
    assert found == pytest.approx(expected, rel=1e-9)
    assert frechet.distance(statistics(g_BC), statistics(f_BC)) == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("count", [300, 5])
def test_a_set_is_0_from_itself_even_with_fewer_samples_than_features(count):
    f_BC = gaussian(3, count)
    scale = np.trace(np.cov(f_BC.T))
    assert 0 <= frechet.distance(statistics(f_BC), statistics(f_BC)) < 1e-6 * scale
    moved = frechet.distance(statistics(f_BC), statistics(f_BC + 2))
    assert moved == pytest.approx(8 * 4, abs=1e-6 * scale)


def test_features_are_the_average_of_vggs_last_depth():
    weights = test_lpips.small("vgg")
    x_BHWC = test_lpips.pictures(2, 32, 48)
    f_BC = jax.jit(frechet.features)(weights, x_BHWC)
    flipped_BC = jax.jit(frechet.features)(weights, x_BHWC[::-1])
    *_, last_BCHW = test_lpips.reference_taps("vgg", weights, torch.tensor(x_BHWC))
    assert last_BCHW.shape[2:] == (2, 3)
    np.testing.assert_allclose(f_BC, last_BCHW.mean((2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(flipped_BC, f_BC[::-1], rtol=1e-5, atol=1e-6)


def test_what_is_no_set_of_features_is_refused():
    empty = frechet.Statistics()
    with pytest.raises(ValueError, match="a covariance of 0 images; add at least 2"):
        frechet.distance(empty, empty)
    with pytest.raises(ValueError, match=r"features of \(4, 8\); give finite numbers of \[B, 512"):
        empty.add(np.zeros((4, 8)))
    with pytest.raises(ValueError, match=r"features of \(1, 512\); give finite numbers"):
        empty.add(np.full((1, 512), np.nan))
    with pytest.raises(ValueError, match="features of 512 and 8; give one network's"):
        frechet.distance(empty, frechet.Statistics(8))
