"""How well a tokenizer keeps what it sees: measures of image pairs and of the codes' use.

The conventions are stated here because published figures differ by them more than by tokenizer.
Pairs are 8-bit images: `rounded` makes them of what the decoder gives.

Legend: B images, H rows and W columns of pixels, C colours, K codes of the codebook.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

WINDOW = 7  # pixels a side of SSIM's window
PEAK = 255  # the data range
EXACT = 1e-10  # an exact copy counts as this mean squared error, which is 148 dB


def rounded(x_HWC: jax.Array) -> jax.Array:
    """Floats in [-1, 1] to the nearest uint8, clipped. (`pixels.to_uint8` truncates, as Emu3.)"""
    return jnp.clip(jnp.round((x_HWC + 1.0) * (PEAK / 2)), 0, PEAK).astype(jnp.uint8)


def psnr_db(real_BHWC: np.ndarray, made_BHWC: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each 8-bit image: 10 log10(255^2 / mean squared error).

    Average it over images; that is not the ratio of their mean error. An exact copy counts 148 dB.
    """
    error_BHWC = real_BHWC.astype(np.float64) - made_BHWC
    return 10 * np.log10(PEAK**2 / np.maximum(np.mean(error_BHWC**2, axis=(1, 2, 3)), EXACT))


@jax.jit
def ssim(real_BHWC: jax.Array, made_BHWC: jax.Array) -> jax.Array:
    """Structural similarity of each 8-bit image, float32 [B]: Wang et al. 2004, IEEE TIP 13(4).

    Uniform windows of 7x7 that lie within the image, sample covariance (n - 1), K1 = 0.01,
    K2 = 0.03, the mean over windows and then colours: scikit-image's structural_similarity with
    its defaults, channel_axis=-1 and data_range=255 (or 1.0 for pixels in [0, 1]). A Gaussian
    window of 11x11 gives 0.00 to 0.02 less; a data range twice too large up to 0.12 more.

    Raises:
        ValueError: a side is shorter than the window.
    """
    height, width = real_BHWC.shape[1:3]
    if min(height, width) < WINDOW:
        raise ValueError(f"SSIM needs {WINDOW} pixels a side; the images have {height}x{width}")
    # Sums of 49 products of 8-bit numbers, and their squares, are whole numbers below 2^31: exact.
    x_BHWC, y_BHWC = real_BHWC.astype(jnp.int32), made_BHWC.astype(jnp.int32)
    pairs = (x_BHWC, y_BHWC, x_BHWC * x_BHWC, y_BHWC * y_BHWC, x_BHWC * y_BHWC)
    x, y, xx, yy, xy = (_window_sum(value_BHWC) for value_BHWC in pairs)
    n = WINDOW**2
    mean_xy = (x * y).astype(jnp.float32) / n**2
    mean_squares = (x * x + y * y).astype(jnp.float32) / n**2
    covariance = (n * xy - x * y).astype(jnp.float32) / (n * (n - 1))
    variances = (n * xx - x * x + n * yy - y * y).astype(jnp.float32) / (n * (n - 1))
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    similarity_BHWC = ((2 * mean_xy + c1) * (2 * covariance + c2)) / (
        (mean_squares + c1) * (variances + c2)
    )
    return similarity_BHWC.mean(2).mean((1, 2))  # short sums: float32 adds up badly


def _window_sum(value_BHWC: jax.Array) -> jax.Array:
    """The sum over each window that lies within the image."""
    height, width = (side - WINDOW + 1 for side in value_BHWC.shape[1:3])
    rows_BHWC = sum(value_BHWC[:, i : i + height] for i in range(WINDOW))
    return sum(rows_BHWC[:, :, i : i + width] for i in range(WINDOW))


def usage(count_K: np.ndarray) -> float:
    """The share of codes that were seen at all.

    It grows with the number of tokens, which belongs beside it: of K equally likely codes, as many
    tokens as codes show 63%, four times as many 98%.
    """
    return float(np.mean(count_K > 0))


def entropy_bits(count_K: np.ndarray) -> float:
    """Entropy of the codes' distribution in bits a token; at most log2 K."""
    share = count_K[count_K > 0] / count_K.sum()
    return float(-(share * np.log2(share)).sum())


def perplexity(count_K: np.ndarray) -> float:
    """exp of the entropy in nats: how many codes, equally used, would be as spread out.

    Count the codes of the whole set: a mean over batches would depend on the size of the batch.
    """
    return 2.0 ** entropy_bits(count_K)


def bits_per_pixel(codebook_size: int, tokens: int, num_pixels: int) -> float:
    """log2 K a token, over the pixels that they stand for, of every frame."""
    return math.log2(codebook_size) * tokens / num_pixels
