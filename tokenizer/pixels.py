"""Between uint8 images and what the tokenizer eats, as Emu3's image processor does it.

Legend: H height, W width, C the three colours; `...` any leading dims.
"""

import math

import jax
import jax.numpy as jnp


def to_float(x_HWC: jax.Array) -> jax.Array:
    """uint8 [..., H, W, 3] in 0..255 to float32 in [-1, 1]."""
    return x_HWC.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x_HWC: jax.Array) -> jax.Array:
    """Floats in [-1, 1] to uint8, clipped. Truncates where one might round: Emu3 does."""
    return jnp.clip((x_HWC * 0.5 + 0.5) * 255, 0, 255).astype(jnp.uint8)


def smart_resize(
    height: int,
    width: int,
    factor: int = 8,
    min_pixels: int = 512 * 512,
    max_pixels: int = 1024 * 1024,
) -> tuple[int, int]:
    """The size to resize an image to: multiples of `factor`, area within bounds, aspect kept.

    Emu3 resizes with PIL's bicubic filter. Rounds half to even.

    Raises:
        ValueError: a side is smaller than `factor`, or one side is over 5 times the other.
    """
    if min(height, width) < factor:
        raise ValueError(f"image of {height}x{width} pixels has a side below {factor}; enlarge it")
    if max(height, width) > 5 * min(height, width):
        raise ValueError(f"image of {height}x{width} pixels has an aspect ratio above 5; crop it")
    new_height, new_width = (round(side / factor) * factor for side in (height, width))
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return tuple(math.floor(side / shrink / factor) * factor for side in (height, width))
    if new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return tuple(math.ceil(side * grow / factor) * factor for side in (height, width))
    return new_height, new_width
