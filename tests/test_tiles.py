"""Tiles: every code from one tile and well inside it, pixels blended, one tile is the whole."""

import types

import jax
import numpy as np
import pytest

from tokenizer import tiles, vq

TINY = vq.VQConfig(
    codebook_size=64,
    width=8,
    multipliers=(1, 2),
    res_blocks=1,
    attention_levels=(1,),
    norm_groups=4,
)
SIZES = [(16, 16), (17, 41), (40, 16), (64, 23), (65, 66), (8, 100)]


@pytest.fixture(scope="module")
def tiny():
    return vq.merge(TINY, *vq.init(TINY, jax.random.key(0)))


def stand_in(**functions):
    """What tiles ask of a tokenizer, with other functions in it."""
    return types.SimpleNamespace(config=TINY, **functions)


@pytest.mark.parametrize("halo", [0, 2, 6])
@pytest.mark.parametrize("height, width", SIZES)
def test_every_code_is_of_its_place_with_the_halo_around_it(height, width, halo):
    x_BHWC = np.stack([*np.mgrid[:height, :width], np.zeros((height, width), int)], axis=-1)[None]
    x_BHWC = np.concatenate([x_BHWC, x_BHWC + 1000])
    shapes = set()

    def encode(tile_BHWC):
        """Where a code is, unless its tile ends too close to it."""
        shapes.add(tile_BHWC.shape)
        (top, left, _), (bottom, right, _) = tile_BHWC[0, 0, 0], tile_BHWC[0, -1, -1]
        y_Bhw, x_Bhw, _ = np.moveaxis(tile_BHWC[:, :-1:2, :-1:2], -1, 0)
        near_hw = (y_Bhw[0] - halo < top) & (top > 0) | (x_Bhw[0] - halo < left) & (left > 0)
        below, beside = bottom < height // 2 * 2 - 1, right < width // 2 * 2 - 1
        near_hw |= (y_Bhw[0] + 1 + halo > bottom) & below | (x_Bhw[0] + 1 + halo > right) & beside
        return np.where(near_hw, -1, 10_000 * y_Bhw + x_Bhw)

    codes_Bhw = tiles.encode_tiled(stand_in(encode=encode), x_BHWC, tile=16, halo=halo)
    y_Bhw, x_Bhw = x_BHWC[:, :-1:2, :-1:2, 0], x_BHWC[:, :-1:2, :-1:2, 1]
    np.testing.assert_array_equal(codes_Bhw, 10_000 * y_Bhw + x_Bhw)
    assert len(shapes) == 1 and (max(height, width) <= 16 or max(shapes.pop()[1:3]) <= 16)


@pytest.mark.parametrize("halo", [0, 2, 6])
@pytest.mark.parametrize("h, w", [(8, 8), (8, 20), (9, 31), (33, 12), (4, 50)])
def test_tiles_that_agree_blend_to_the_same(h, w, halo):
    def decode(codes_Bhw):
        return np.float32(codes_Bhw[..., None] * [1, 2, 3]).repeat(2, 1).repeat(2, 2)

    codes_Bhw = np.random.default_rng(h).integers(0, 64, (2, h, w))
    x_BHWC = tiles.decode_tiled(stand_in(decode=decode), codes_Bhw, tile=16, halo=halo)
    np.testing.assert_allclose(x_BHWC, decode(codes_Bhw), rtol=1e-5)


def test_tiles_that_differ_fade_into_each_other():
    """Also where four meet: no step is larger than the ramp's."""
    tones = iter([0.0, 8.0, 8.0, 0.0])

    def decode(codes_Bhw):
        return np.full((1, 16, 16, 3), next(tones), np.float32)

    model = stand_in(decode=decode)
    x_HWC = tiles.decode_tiled(model, np.zeros((1, 12, 12), int), tile=16, halo=4)[0]
    assert next(tones, None) is None, "2 x 2 tiles of 16, 8 apart"
    for row_WC, first, last in ((x_HWC[0], 0, 8), (x_HWC[-1], 8, 0)):
        assert (row_WC[:8] == first).all() and (row_WC[16:] == last).all()
    np.testing.assert_allclose(x_HWC[0, 8:16, 0], np.arange(0.5, 8))
    np.testing.assert_allclose(x_HWC, x_HWC.swapaxes(0, 1), rtol=1e-5)
    assert max(np.abs(np.diff(x_HWC, axis=axis)).max() for axis in (0, 1)) < 1.001


def test_an_image_of_one_tile_is_whole(tiny):
    x_BHWC = np.random.default_rng(0).uniform(-1, 1, (1, 12, 15, 3)).astype(np.float32)
    codes_Bhw = tiny.encode(x_BHWC)
    np.testing.assert_array_equal(tiles.encode_tiled(tiny, x_BHWC, tile=16, halo=4), codes_Bhw)
    tiled_BHWC = tiles.decode_tiled(tiny, codes_Bhw, tile=16, halo=4)
    np.testing.assert_array_equal(tiled_BHWC, tiny.decode(codes_Bhw))


def test_a_large_image_there_and_back(tiny):
    x_BHWC = np.random.default_rng(1).uniform(-1, 1, (1, 22, 12, 3)).astype(np.float32)
    codes_Bhw = tiles.encode_tiled(tiny, x_BHWC, tile=12, halo=2)
    assert codes_Bhw.shape == (1, 11, 6) and codes_Bhw.dtype == np.int32
    np.testing.assert_array_equal(codes_Bhw[:, :5], tiny.encode(x_BHWC[:, :12])[:, :5])
    y_BHWC = tiles.decode_tiled(tiny, codes_Bhw, tile=12, halo=2)
    assert y_BHWC.shape == x_BHWC.shape
    np.testing.assert_allclose(y_BHWC[:, :8], tiny.decode(codes_Bhw[:, :6])[:, :8], atol=1e-5)


@pytest.mark.parametrize("tile, halo", [(15, 4), (16, 3), (16, 8), (16, -2)])
def test_tiles_that_do_not_work(tiny, tile, halo):
    message = (
        f"^tiles of {tile} pixels with a halo of {halo} do not work; take multiples of 2, "
        "the halo below half a tile$"
    )
    with pytest.raises(ValueError, match=message):
        tiles.encode_tiled(tiny, np.zeros((1, 32, 32, 3), np.float32), tile, halo)
    with pytest.raises(ValueError, match=message):
        tiles.decode_tiled(tiny, np.zeros((1, 16, 16), np.int32), tile, halo)
