"""Long videos, bfloat16, and what fits in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokenizer import autoencoder, blocks, quantize, vq

TINY = vq.VQConfig(
    codebook_size=64,
    width=8,
    multipliers=(1, 2),
    res_blocks=1,
    attention_levels=(1,),
    norm_groups=4,
)


@pytest.fixture(scope="module")
def arrays():
    """Batch statistics are far from their start."""
    params, stats = vq.init(TINY, jax.random.key(0))
    stats = {
        name: value + 0.1 * np.arange(4, dtype=np.float32) if value.shape else value
        for name, value in stats.items()
    }
    return params, stats


@pytest.fixture(scope="module")
def tiny(arrays):
    return vq.merge(TINY, *arrays)


@pytest.fixture(scope="module")
def video():
    return np.random.default_rng(0).uniform(-1, 1, (2, 12, 8, 12, 3)).astype(np.float32)


def streamed(step, x_BTHWC, plan):
    """The chunks' results end to end."""
    past, parts, start = None, [], 0
    for length in plan:
        part, past = step(x_BTHWC[:, start : start + length], past)
        parts.append(np.asarray(part))
        start += length
    assert start == x_BTHWC.shape[1]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("plan", [[4, 4, 4], [8, 4], [4, 8]])
def test_any_chunks_give_the_codes_and_pixels_of_the_whole(tiny, video, plan):
    codes_Bthw = tiny.encode_video(video)
    np.testing.assert_array_equal(streamed(tiny.encode_stream, video, plan), codes_Bthw)
    x_BTHWC = tiny.decode_video(codes_Bthw)
    again_BTHWC = streamed(tiny.decode_stream, codes_Bthw, [length // 4 for length in plan])
    # Pixels of random weights reach 10, so this is the rounding of float32.
    np.testing.assert_allclose(again_BTHWC, x_BTHWC, atol=2e-4)
    # And that takes the past: without it later codes and pixels are others.
    fresh_Bthw = np.concatenate([tiny.encode_video(x) for x in np.split(video, 3, axis=1)], 1)
    np.testing.assert_array_equal(fresh_Bthw[:, 0], codes_Bthw[:, 0])
    assert (fresh_Bthw[:, 1:] != codes_Bthw[:, 1:]).mean() > 0.1
    assert np.abs(tiny.decode_video(codes_Bthw[:, 1:]) - x_BTHWC[:, 4:]).max() > 1e-2


def test_pixels_do_not_see_later_codes(tiny, video):
    codes_Bthw = np.array(tiny.encode_video(video))
    before_BTHWC = np.asarray(tiny.decode_video(codes_Bthw))
    codes_Bthw[:, 2] = (codes_Bthw[:, 2] + 1) % 64
    after_BTHWC = np.asarray(tiny.decode_video(codes_Bthw))
    np.testing.assert_array_equal(after_BTHWC[:, :8], before_BTHWC[:, :8])
    assert np.abs(after_BTHWC[:, 8:] - before_BTHWC[:, 8:]).max() > 1e-2


def test_clips_are_encoded_and_decoded_alone(tiny, video):
    codes_Bthw = tiny.encode_clips(video)
    clips_NTHWC = video.reshape(6, 4, *video.shape[2:])
    np.testing.assert_array_equal(codes_Bthw.reshape(6, 1, 4, 6), tiny.encode_video(clips_NTHWC))
    x_NTHWC = tiny.decode_video(codes_Bthw.reshape(6, 1, 4, 6))
    x_BTHWC = tiny.decode_clips(codes_Bthw)
    np.testing.assert_allclose(x_BTHWC.reshape(x_NTHWC.shape), x_NTHWC, atol=2e-4)


def test_frames_beyond_a_multiple_are_dropped_or_padded(tiny, video):
    np.testing.assert_array_equal(tiny.encode_video(video[:, :7]), tiny.encode_video(video[:, :4]))
    np.testing.assert_array_equal(tiny.encode_clips(video[:, :7]), tiny.encode_clips(video[:, :4]))
    x_THWC = vq.pad_frames(video[0, :6], 4)
    assert isinstance(x_THWC, np.ndarray)
    np.testing.assert_array_equal(x_THWC[:6], video[0, :6])
    np.testing.assert_array_equal(x_THWC[6:], video[0, [5, 5]])
    np.testing.assert_array_equal(vq.pad_frames(x_THWC, 4), x_THWC)
    with pytest.raises(ValueError, match="^a video of 0 frames has no last frame to repeat; skip"):
        vq.pad_frames(video[0, :0], 4)


def test_a_stream_compiles_once_per_shape(tiny, monkeypatch):
    traces = []
    for part in (autoencoder.Encoder, autoencoder.Decoder):
        layers = part.frames
        monkeypatch.setattr(
            part, "frames", lambda *args, run=layers: (traces.append(1), run(*args))[1]
        )
    chunk_BTHWC, past, ahead = np.zeros((1, 4, 2, 14, 3), np.float32), None, None
    counts = []
    for _ in range(3):
        codes_Bthw, past = tiny.encode_stream(chunk_BTHWC, past)
        _, ahead = tiny.decode_stream(codes_Bthw, ahead)
        counts.append(len(traces))
    assert counts[0] > 0 and counts == counts[:1] * 3


def test_stream_errors(tiny, video):
    with pytest.raises(ValueError, match="^a chunk of 6 frames is no multiple of temporal_factor"):
        tiny.encode_stream(video[:, :6])
    with pytest.raises(ValueError, match="^a chunk of 0 frames is no multiple of temporal_factor"):
        tiny.encode_stream(video[:, :0])
    codes_Bthw, past = tiny.encode_stream(video[:, :4])
    message = r"ends with an array of shape \(2, 2, 4, 6, 4\), this chunk needs \(1, 2, 4, 6, 4\)"
    with pytest.raises(ValueError, match=message):
        tiny.encode_stream(video[:1, :4], past)
    with pytest.raises(ValueError, match=r"needs \(4, 2, 4, 6, 4\); give what the chunk before it"):
        tiny.decode_stream(codes_Bthw, past)


def test_bfloat16_is_close_and_leaves_the_weights(arrays, tiny, video):
    half = vq.merge(TINY, *arrays, dtype="bfloat16")
    for name, value in vq.split(half)[0].items():
        assert value is arrays[0][name], name
    z_BhwE, half_BhwE = (nnx.jit(vq.VQ.image_latents)(model, video[:, 0]) for model in (tiny, half))
    assert z_BhwE.dtype == half_BhwE.dtype == jnp.float32
    error = float(jnp.abs(half_BhwE - z_BhwE).mean() / z_BhwE.std())
    assert 1e-4 < error < 0.02, "computed in bfloat16, but no worse than that"
    codes_Bthw = tiny.encode_video(video)
    assert (half.encode_video(video) == codes_Bthw).mean() > 0.9
    x_BTHWC, half_BTHWC = (model.decode_video(codes_Bthw) for model in (tiny, half))
    assert half_BTHWC.dtype == jnp.float32
    assert 1e-4 < jnp.abs(half_BTHWC - x_BTHWC).mean() / x_BTHWC.std() < 0.05
    with pytest.raises(ValueError, match="^dtype 'half' is unknown; use one of float32, bfloat16"):
        vq.merge(TINY, *arrays, dtype="half")


def test_distances_to_codes_are_float32():
    z_NE = jnp.array([[100.5]], jnp.bfloat16)
    codebook_KE = jnp.array([[100.7], [100.45]])  # both are 100.5 in bfloat16
    assert quantize.nearest_code(z_NE, codebook_KE).tolist() == [1]
    assert quantize.nearest_code(z_NE, codebook_KE.astype(jnp.bfloat16)).tolist() == [0]


def test_gradients_of_attention_in_parts(monkeypatch):
    """Also where the last part is not full, and in bfloat16 with sums in float32."""
    q_BSC, k_BSC, v_BSC = (jax.random.normal(jax.random.key(i), (2, 7, 4)) for i in range(3))
    gradient = jax.grad(lambda *qkv: jnp.square(blocks.attend(*qkv)).sum(), (0, 1, 2))
    whole = gradient(q_BSC, k_BSC, v_BSC)
    half = gradient(*(x.astype(jnp.bfloat16) for x in (q_BSC, k_BSC, v_BSC)))
    monkeypatch.setattr(blocks, "ATTENTION_BLOCK", 3)
    for part, want, rough in zip(gradient(q_BSC, k_BSC, v_BSC), whole, half, strict=True):
        np.testing.assert_allclose(part, want, atol=1e-6)
        assert rough.dtype == jnp.bfloat16
        np.testing.assert_allclose(rough.astype(jnp.float32), want, atol=0.1)


def temporaries(f, *shapes):
    """Bytes that the compiled function needs beside its arguments and results."""
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_length_of_a_video(tiny):
    def latents(x_BTHWC):
        return tiny.video_latents(x_BTHWC)

    def pixels(q_BthwE):
        return tiny.video_pixels(q_BthwE)

    for f, clip, video in (
        (latents, (1, 4, 32, 32, 3), (1, 40, 32, 32, 3)),
        (pixels, (1, 1, 16, 16, 4), (1, 10, 16, 16, 4)),
    ):
        copies = 3 * 40 * 32 * 32 * 3 * 4  # the video itself, in another order
        assert temporaries(f, video) < 1.5 * temporaries(f, clip) + copies


def test_no_positions_by_positions_matrix():
    """A 1024x1024 image has 128x128 codes; here forward and backward at that grid."""
    config = vq.VQConfig(
        width=4, multipliers=(1,), res_blocks=1, attention_levels=(), norm_groups=2
    )
    params, stats = vq.init(config, jax.random.key(0))

    def there_and_back(params, x_BHWC):
        model = vq.merge(config, params, stats)
        return jnp.square(model.image_pixels(model.image_latents(x_BHWC))).sum()

    matrix = 4 * (128 * 128) ** 2
    x_BHWC = jnp.zeros((1, 128, 128, 3))
    for f in (there_and_back, jax.grad(there_and_back)):
        compiled = jax.jit(f).lower(params, x_BHWC).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < matrix / 3


def test_no_vectors_by_codes_matrix():
    matrix = 4 * 2048 * 32768
    assert temporaries(quantize.nearest_code, (2048, 4), (32768, 4)) < matrix / 3
