"""Measures against scikit-image, brute force and arithmetic."""

import numpy as np
import pytest

from tokenizer import measures, pixels


def pairs():
    """Two noisy images, and a flat one with a darker bar."""
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (3, 24, 31, 3), dtype=np.uint8)
    noise = rng.integers(-40, 41, real.shape)
    made = np.clip(real.astype(int) + noise, 0, 255).astype(np.uint8)
    real[2] = made[2] = 200
    made[2, 5:9] = 190
    return real, made


def test_psnr_and_ssim_are_scikit_images():
    # 0.26.0: peak_signal_noise_ratio(data_range=255), structural_similarity(channel_axis=-1,
    # data_range=255), and the latter of pixels in [0, 1] with data_range=1.0 as well.
    psnr = [20.99273417126308, 21.137870909277105, 35.91231611251554]
    ssim = [0.9539567454100203, 0.9548925898494214, 0.8611853047643366]
    np.testing.assert_allclose(measures.psnr_db(*pairs()), psnr, rtol=1e-12)
    np.testing.assert_allclose(measures.ssim(*pairs()), ssim, rtol=1e-6)


def slow_ssim(x_HWC, y_HWC):
    """Window by window, in float64."""
    c1, c2 = 0.01**2, 0.03**2
    values = []
    for c in range(x_HWC.shape[2]):
        for i in range(x_HWC.shape[0] - 6):
            for j in range(x_HWC.shape[1] - 6):
                x, y = (z[i : i + 7, j : j + 7, c].ravel() / 255 for z in (x_HWC, y_HWC))
                (vx, vxy), (_, vy) = np.cov(x, y)
                mx, my = x.mean(), y.mean()
                luminance = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
                values.append(luminance * (2 * vxy + c2) / (vx + vy + c2))
    return np.mean(values)


def test_ssim_of_extreme_pixels_is_exact():
    """Black and white, where sums are largest, and nearly flat white, where variance is lost."""
    rng = np.random.default_rng(1)
    real = np.where(rng.random((2, 17, 12, 3)) < 0.5, 0, 255).astype(np.uint8)
    made = np.where(rng.random(real.shape) < 0.1, 255 - real, real).astype(np.uint8)
    real[1], made[1] = 255 - (rng.random((2, 17, 12, 3)) < 0.1)
    slow = [slow_ssim(x, y) for x, y in zip(real, made, strict=True)]
    assert slow[1] < 0.999
    np.testing.assert_allclose(measures.ssim(real, made), slow, rtol=1e-6)


def test_an_exact_copy():
    real, _ = pairs()
    np.testing.assert_array_equal(measures.ssim(real, real), 1)
    np.testing.assert_allclose(measures.psnr_db(real, real), 148.13, atol=0.01)


def test_images_below_the_window():
    with pytest.raises(ValueError) as error:
        measures.ssim(np.zeros((1, 6, 9, 3), np.uint8), np.zeros((1, 6, 9, 3), np.uint8))
    assert str(error.value) == "SSIM needs 7 pixels a side; the images have 6x9"


def test_rounding_is_to_the_nearest():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    x = np.array(pixels.to_float(levels))
    for shift in (-0.49, 0, 0.49):
        np.testing.assert_array_equal(measures.rounded(x + shift / 127.5), levels)
    np.testing.assert_array_equal(measures.rounded(np.float32([[[-1.2, 1.2]]])), [[[0, 255]]])


def test_use_of_codes():
    count_K = np.array([5, 5, 5, 5, 0, 0, 0, 0])
    assert measures.usage(count_K) == 0.5
    assert measures.entropy_bits(count_K) == 2
    assert measures.perplexity(count_K) == 4
    skewed_K = np.array([3, 1])
    nats = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert measures.perplexity(skewed_K) == pytest.approx(np.exp(nats), rel=1e-12)


def test_bits_per_pixel_of_emu3():
    """64x64 codes an image of 512x512; a clip of 4 frames has as many."""
    assert measures.bits_per_pixel(32768, 64 * 64, 512 * 512) == 15 / 64
    assert measures.bits_per_pixel(32768, 64 * 64, 4 * 512 * 512) == 15 / 256
