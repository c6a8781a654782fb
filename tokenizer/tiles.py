"""Images too large for one pass, in tiles with a halo: an approximation, for those who ask for it.

Attention and the statistics of group norm span the whole image, so a tile does not give the codes
or the pixels that the image would, however large the halo. Codes cannot be blended: each comes from
the tile in which it lies farthest from a cut. Pixels are blended linearly where tiles overlap.

All tiles of an image have one size, the last ones moved back to end with the image, so that it
compiles once per size of image. Images and codes stay with the host, one tile is on the device. An
image that fits in one tile is encoded and decoded whole.

Legend: B batch, H height, W width, C colours; h w the latent grid, P pixels of a tile along a side.
"""

import itertools
from collections.abc import Iterator

import jax
import numpy as np

from tokenizer import vq

TILE = 1024  # pixels: the largest image that Emu3's own processor makes is 1024 x 1024


def encode_tiled(model: vq.VQ, x_BHWC: jax.Array, tile: int = TILE, halo: int = 64) -> np.ndarray:
    """Images to codes_Bhw.

    Args:
        x_BHWC: floats in [-1, 1]; a height or width that is no multiple of `spatial_factor` floors.
        tile: height and width in pixels of what passes the encoder at once.
        halo: how many pixels around a code, inside the image, its tile holds at least.

    Raises:
        ValueError: `tile` or `halo` is no number of codes, or too little of a tile is left.
    """
    tile_codes, halo_codes = in_codes(model, tile, halo)
    batch, height, width, _ = x_BHWC.shape
    if max(height, width) <= tile:
        return np.asarray(model.encode(x_BHWC))
    factor = model.config.spatial_factor
    codes_Bhw = np.empty((batch, height // factor, width // factor), np.int32)
    sides = (spans(size, tile_codes, halo_codes) for size in codes_Bhw.shape[1:])
    for (rows, core_rows), (columns, core_columns) in itertools.product(*sides):
        tile_BHWC = x_BHWC[:, scale(rows, factor), scale(columns, factor)]
        tile_Bhw = np.asarray(model.encode(tile_BHWC))
        inner = shift(core_rows, -rows.start), shift(core_columns, -columns.start)
        codes_Bhw[:, core_rows, core_columns] = tile_Bhw[:, *inner]
    return codes_Bhw


def decode_tiled(
    model: vq.VQ, codes_Bhw: jax.Array, tile: int = TILE, halo: int = 128
) -> np.ndarray:
    """Codes to images x_BHWC, not clamped to [-1, 1]; the codes may come from anywhere.

    Tiles of `tile` pixels overlap by twice `halo` pixels or more, over which one fades into the
    other. Raises ValueError as `encode_tiled` does.
    """
    tile_codes, halo_codes = in_codes(model, tile, halo)
    if max(codes_Bhw.shape[1:]) <= tile_codes:
        return np.asarray(model.decode(codes_Bhw))
    factor = model.config.spatial_factor
    batch, h, w = codes_Bhw.shape
    x_BHWC = np.zeros((batch, h * factor, w * factor, 3), np.float32)
    sides = []
    for size in (h, w):
        windows = [window for window, _ in spans(size, tile_codes, halo_codes)]
        sides.append(list(zip(windows, fades(windows, factor, 2 * halo), strict=True)))
    for (rows, fade_H), (columns, fade_W) in itertools.product(*sides):
        tile_BHWC = np.asarray(model.decode(codes_Bhw[:, rows, columns]))
        fade_HWC = fade_H[:, None, None] * fade_W[:, None]
        x_BHWC[:, scale(rows, factor), scale(columns, factor)] += tile_BHWC * fade_HWC
    return x_BHWC


def in_codes(model: vq.VQ, tile: int, halo: int) -> tuple[int, int]:
    """Both in codes along a side."""
    factor = model.config.spatial_factor
    if tile % factor or halo % factor or not 0 <= 2 * halo < tile:
        raise ValueError(
            f"tiles of {tile} pixels with a halo of {halo} do not work; take multiples of "
            f"{factor}, the halo below half a tile"
        )
    return tile // factor, halo // factor


def spans(size: int, tile: int, halo: int) -> list[tuple[slice, slice]]:
    """Along a side of `size`: each tile, and its core. Every place is in exactly one core."""
    if size <= tile:
        return [(slice(0, size), slice(0, size))]
    step = tile - 2 * halo
    starts = [min(start, size - tile) for start in range(0, size - tile + step, step)]
    cuts = [(left + tile + right) // 2 for left, right in itertools.pairwise(starts)]
    windows = [slice(start, start + tile) for start in starts]
    cores = [slice(*ends) for ends in itertools.pairwise([0, *cuts, size])]
    return list(zip(windows, cores, strict=True))


def fades(windows: list[slice], factor: int, ramp: int) -> Iterator[np.ndarray]:
    """The weight of each tile's pixels along a side, fade_P; over all tiles they add up to 1."""
    size = windows[-1].stop * factor
    total_P, parts = np.zeros(size, np.float32), []
    for window in (scale(window, factor) for window in windows):
        place_P = np.arange(window.start, window.stop) + 0.5
        # No fading at the ends of the image, where nothing overlaps.
        in_P = place_P - window.start if window.start else ramp
        out_P = window.stop - place_P if window.stop < size else ramp
        part_P = np.broadcast_to(np.minimum(in_P, out_P).clip(0.5, max(ramp, 1)), place_P.shape)
        total_P[window] += part_P
        parts.append((window, part_P))
    return (part_P / total_P[window] for window, part_P in parts)


def scale(span: slice, factor: int) -> slice:
    return slice(span.start * factor, span.stop * factor)


def shift(span: slice, by: int) -> slice:
    return slice(span.start + by, span.stop + by)
