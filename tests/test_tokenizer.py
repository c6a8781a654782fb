"""The tokenizer itself: sizes, the single pass for images, codes, pixels and training."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokenizer import autoencoder, blocks, patches, pixels, quantize, train, vq

TINY = vq.VQConfig(
    codebook_size=16,
    width=8,
    multipliers=(1, 2),
    res_blocks=1,
    attention_levels=(1,),
    norm_groups=4,
)


@pytest.fixture(scope="module")
def tiny():
    """A tokenizer whose codes and batch statistics are far from their start."""
    params, stats = vq.init(TINY, jax.random.key(0))
    params["quantize.embedding"] = 2 * jax.random.normal(jax.random.key(1), (16, 4))
    stats = {
        name: value + 0.1 * np.arange(4, dtype=np.float32) if value.shape else value
        for name, value in stats.items()
    }
    return vq.merge(TINY, params, stats)


def images(seed, *shape):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def test_the_default_is_emu3s_size():
    params, stats = vq.shapes(vq.VQConfig())
    assert sum(math.prod(x.shape) for x in params.values()) == 270_740_287
    assert len(params) + len(stats) == 495
    assert vq.VQConfig().spatial_factor == 8
    assert vq.VQConfig(multipliers=(1, 2, 2)).spatial_factor == 4


def test_an_image_is_a_clip_of_equal_frames(tiny):
    x_BHWC = images(0, 2, 8, 12, 3)
    codes_Bhw = tiny.encode(x_BHWC)
    clip_BTHWC = np.repeat(x_BHWC[:, None], 4, axis=1)
    assert codes_Bhw.shape == (2, 4, 6) and codes_Bhw.dtype == jnp.int32
    np.testing.assert_array_equal(codes_Bhw, tiny.encode_video(clip_BTHWC)[:, 0])
    frames_BTHWC = tiny.decode_video(codes_Bhw[:, None])
    assert frames_BTHWC.shape == (2, 4, 8, 12, 3)
    np.testing.assert_allclose(tiny.decode(codes_Bhw), frames_BTHWC[:, 0], atol=2e-5)


def test_an_image_passes_the_2d_layers_once(tiny, monkeypatch):
    batches = []
    for part in (autoencoder.Encoder, autoencoder.Decoder):
        layers = part.frames
        monkeypatch.setattr(
            part, "frames", lambda *args, run=layers: (batches.append(len(args[1])), run(*args))[1]
        )
    tiny.image_pixels(tiny.image_latents(jnp.zeros((3, 8, 8, 3))))
    assert batches == [3, 3]


def test_video_codes_see_the_past_but_not_the_future(tiny):
    x_BTHWC = images(1, 1, 8, 8, 8, 3)
    z_BthwE = tiny.video_latents(x_BTHWC)
    assert z_BthwE.shape == (1, 2, 4, 4, 4)
    late = x_BTHWC.copy()
    late[:, 4:] = 0
    early = x_BTHWC.copy()
    early[:, :4] = 0
    np.testing.assert_array_equal(tiny.video_latents(late)[:, 0], z_BthwE[:, 0])
    assert np.abs(tiny.video_latents(early)[:, 1] - z_BthwE[:, 1]).max() > 1e-3


def test_upsampling_is_nearest_then_convolution():
    upsample = blocks.Upsample(3, lambda shape: jax.random.normal(jax.random.key(2), shape))
    x_BHWC = images(2, 2, 3, 4, 3)
    want = upsample.conv(x_BHWC.repeat(2, 1).repeat(2, 2))
    np.testing.assert_allclose(upsample(x_BHWC), want, atol=1e-6)


def test_the_causal_convolution_is_a_3d_convolution():
    key = jax.random.key(3)
    layer = blocks.CausalConv(4, 4, 3, lambda shape: jax.random.normal(key, shape), stride=2)
    x_BTHWC = images(3, 2, 6, 5, 4, 4)
    want = jax.lax.conv_general_dilated(
        x_BTHWC,
        layer.kernel[...],
        (2, 1, 1),
        ((2, 0), (1, 1), (1, 1)),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )
    assert want.shape == (2, 3, 5, 4, 4)
    np.testing.assert_allclose(layer(x_BTHWC), want, atol=1e-6)


def test_attention_in_parts_is_attention(monkeypatch):
    q_BSC, k_BSC, v_BSC = (jnp.asarray(images(seed, 2, 7, 4)) for seed in (4, 5, 6))
    whole = blocks.attend(q_BSC, k_BSC, v_BSC)
    monkeypatch.setattr(blocks, "ATTENTION_BLOCK", 3)
    np.testing.assert_allclose(blocks.attend(q_BSC, k_BSC, v_BSC), whole, atol=1e-6)


@pytest.mark.parametrize("codes", [5, 8, 19, 24])
def test_nearest_code_over_tiles(monkeypatch, codes):
    monkeypatch.setattr(quantize, "CODE_TILE", 8)
    rng = np.random.default_rng(codes)
    codebook_KE = rng.standard_normal((codes, 4)).astype(np.float32)
    codebook_KE[-1] = codebook_KE[1]  # a tie: the lower of the two
    z_BTE = rng.standard_normal((3, 50, 4)).astype(np.float32)
    z_BTE[0, 0] = codebook_KE[-1]
    distance_BTK = np.square(z_BTE[:, :, None] - codebook_KE).sum(-1)
    code_BT = quantize.nearest_code(z_BTE, codebook_KE)
    np.testing.assert_array_equal(code_BT, distance_BTK[..., :-1].argmin(-1))
    assert code_BT[0, 0] == 1


def test_losses_pull_the_right_side():
    z_E, q_E = jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0])
    np.testing.assert_allclose(quantize.losses(z_E, q_E), (2.5, 2.5))
    commitment, codebook = jax.jacobian(quantize.losses, (0, 1))(z_E, q_E)
    np.testing.assert_allclose(commitment, [[1.0, -2.0], [0.0, 0.0]])
    np.testing.assert_allclose(codebook, [[0.0, 0.0], [-1.0, 2.0]])
    gradient = jax.grad(lambda z: (quantize.straight_through(z, q_E) * q_E).sum())(z_E)
    np.testing.assert_allclose(gradient, q_E)


def test_pixels_there_and_back():
    x_HWC = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    np.testing.assert_allclose(
        pixels.to_float(x_HWC), (x_HWC / np.float32(255) - 0.5) / 0.5, atol=2e-7
    )
    y_HWC = np.array([-1.5, -1.0, -0.001, 0.0, 0.999, 1.0, 2.0], np.float32)
    np.testing.assert_array_equal(pixels.to_uint8(y_HWC), [0, 0, 127, 127, 254, 255, 255])


@pytest.mark.parametrize(
    "size, want",
    [
        ((512, 512), (512, 512)),
        ((32, 32), (512, 512)),
        ((100, 300), (296, 888)),
        ((2000, 1000), (1448, 720)),
        ((516, 516), (512, 512)),  # 64.5 rounds to even
        ((524, 524), (528, 528)),  # and so does 65.5
    ],
)
def test_smart_resize(size, want):
    assert pixels.smart_resize(*size) == want


def test_smart_resize_of_the_demo_and_its_errors():
    assert pixels.smart_resize(32, 32, factor=4, min_pixels=1024, max_pixels=1024) == (32, 32)
    with pytest.raises(ValueError, match="image of 7x64 pixels has a side below 8; enlarge it"):
        pixels.smart_resize(7, 64)
    with pytest.raises(ValueError, match="image of 100x501 pixels has an aspect ratio above 5"):
        pixels.smart_resize(100, 501)
    assert pixels.smart_resize(100, 500)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(code_dim=8), "code_dim 8 differs from latent_channels 4; set them equal"),
        (dict(norm_groups=3), "8 channels do not split into norm_groups 3; change width 8 or"),
        (dict(attention_levels=(2,)), "names level 2, but multipliers .* has levels 0 to 1"),
        (dict(temporal_factor=3), "temporal_factor 3 is not a power of two"),
    ],
)
def test_config_errors(change, words):
    with pytest.raises(ValueError, match=words):
        vq.shapes(dataclasses.replace(TINY, **change))


def test_input_errors(tiny):
    with pytest.raises(ValueError, match="image of 1x8 pixels is smaller than one code, 2x2"):
        tiny.encode(np.zeros((1, 1, 8, 3), np.float32))
    with pytest.raises(ValueError, match="a clip of 3 frames is shorter than temporal_factor 4"):
        tiny.encode_video(np.zeros((1, 3, 8, 8, 3), np.float32))
    params, stats = vq.split(tiny)
    with pytest.raises(ValueError, match="quantize.embedding is in only one of the arrays"):
        vq.merge(TINY, {k: v for k, v in params.items() if k != "quantize.embedding"}, stats)


def shapes_to_draw(count):
    """uint8 images of a coloured rectangle each: easy, and not all alike."""
    rng = np.random.default_rng(0)
    x_BHWC = np.full((count, 16, 16, 3), 255, np.uint8)
    for x_HWC in x_BHWC:
        y, x = rng.integers(0, 8, 2)
        x_HWC[y : y + rng.integers(4, 9), x : x + rng.integers(4, 9)] = rng.integers(0, 256, 3)
    return x_BHWC


STEPS = 48
TASK = train.TokenizerTask(
    TINY, buffer_rows=2048, codebook_init_step=8, restart_every=10, restart_until=40
)
OPTIMIZER = optax.adam(3e-3)


@jax.jit
def update(params, variables, moments, batch, step):
    grad_fn = jax.value_and_grad(TASK.loss, has_aux=True)
    key = jax.random.fold_in(jax.random.key(1), step)
    (_, (variables, metrics)), grads = grad_fn(params, variables, batch, key)
    updates, moments = OPTIMIZER.update(grads, moments, params)
    params = optax.apply_updates(params, updates)
    before = params["quantize.embedding"]
    params, variables = TASK.after_update(params, variables, step, key)
    moved_K = (params["quantize.embedding"] != before).any(-1)
    return params, variables, moments, metrics | {"moved": moved_K.sum()}


def run():
    params, variables = TASK.init(jax.random.key(0))
    moments = OPTIMIZER.init(params)
    x_BHWC = shapes_to_draw(64)
    history = []
    for step in range(STEPS):
        batch = {"image": jnp.asarray(x_BHWC[step % 4 * 16 :][:16])}
        params, variables, moments, metrics = update(params, variables, moments, batch, step)
        history.append({name: float(value) for name, value in metrics.items()})
    return params, variables, history


@pytest.fixture(scope="module")
def trained():
    return run()


def test_training_learns(trained):
    params, variables, history = trained
    assert history[-1]["l2"] < 0.5 * history[0]["l2"]
    assert history[-1]["psnr"] > history[0]["psnr"] + 2
    assert int(variables["stats"]["encoder.time_res_stack.0.norm1.count"]) == STEPS
    assert all(np.isfinite(list(row.values())).all() for row in history)


def test_codes_are_placed_on_data_and_restart(trained):
    _, variables, history = trained
    moved = [row["moved"] for row in history]
    assert moved[7] == 16  # all of them, after update 8
    assert all(moved[done - 1] == 0 for done in range(1, STEPS + 1) if done not in (8, 10, 20, 30))
    assert history[8]["commitment"] < 0.3 * history[7]["commitment"]
    assert history[-1]["perplexity"] > 4
    assert 1 <= history[-1]["perplexity_recent"] <= 16
    assert int(variables["seen"]) >= 2048  # the ring is full and goes round


def test_training_is_deterministic(trained):
    again, _, _ = run()
    for name, value in trained[0].items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)


def test_the_least_missed_code_restarts_where_the_error_is():
    """Of two codes side by side one goes, and one that nobody hits; the far vectors get them."""
    task = train.TokenizerTask(
        TINY, buffer_rows=32, restart_every=5, restart_until=100, restart_share=2 / 16
    )
    _, stats = vq.shapes(TINY)
    codes_KE = 10 * jnp.eye(16, 4) + 100 * jnp.arange(16.0)[:, None]
    codes_KE = codes_KE.at[7].set(codes_KE[6] + 0.01)
    buffer_RE = jnp.concatenate([codes_KE, jnp.full((4, 4), -500.0), jnp.full((12, 4), 1e6)])
    hits_K = jnp.full(16, 8.0).at[3].set(0.0).at[7].set(7.0)
    variables = task.variables(stats) | {
        "buffer_RE": buffer_RE, "hits_K": hits_K, "seen": jnp.int32(20)
    }  # fmt: skip
    params = {"quantize.embedding": codes_KE}
    for step, expect in ((18, []), (19, [3, 7]), (20, []), (99, [])):
        after, left = task.after_update(params, variables, step, jax.random.key(step))
        moved_K = (after["quantize.embedding"] != codes_KE).any(-1)
        assert np.flatnonzero(moved_K).tolist() == expect, step
        for code in expect:  # rows that hold nothing yet are not taken
            np.testing.assert_array_equal(after["quantize.embedding"][code], buffer_RE[16])
            assert left["hits_K"][code] == pytest.approx(hits_K.sum() / 16)


def test_distance_to_the_nearest_other_code():
    codes_KE = jax.random.normal(jax.random.key(0), (300, 4))  # more than one part
    distance_KK = jnp.square(codes_KE[:, None] - codes_KE).sum(-1) + jnp.diag(jnp.full(300, 1e9))
    got_K = quantize.distance_to_others(codes_KE)
    np.testing.assert_allclose(got_K, distance_KK.min(1), rtol=1e-5)


PATCHES = vq.VQConfig(
    codebook_size=16, code_dim=4, latent_channels=4, width=32, multipliers=(1, 1, 2), res_blocks=1,
    attention_levels=(2,),
)  # fmt: skip


@pytest.mark.slow
def test_patches_make_a_code_of_its_own_pixels_alone():
    """Before and after training steps; without `patches` the rest of the picture counts."""
    x_BHWC = jnp.asarray(shapes_to_draw(8), jnp.float32) / 127.5 - 1
    changed_BHWC = (-x_BHWC).at[:, 4:8, 8:12].set(x_BHWC[:, 4:8, 8:12])  # patch (1, 2) stays

    def spread(params, stats):
        model = vq.merge(PATCHES, params, stats)
        z_BhwE, other_BhwE = map(model.image_latents, (x_BHWC, changed_BHWC))
        return float(jnp.abs(z_BhwE - other_BhwE)[:, 1, 2].max() / z_BhwE.std())

    for held in (True, False):
        task = train.TokenizerTask(PATCHES, patches=held)
        params, variables = task.init(jax.random.key(0))
        before = spread(params, variables["stats"])
        optimizer = optax.adam(1e-2)
        moments = optimizer.init(params)
        step = jax.jit(jax.grad(task.loss, has_aux=True))
        for _ in range(3):
            grads, (variables, _) = step(params, variables, {"image": x_BHWC}, None)
            updates, moments = optimizer.update(grads, moments, params)
            params = optax.apply_updates(params, updates)
        after = spread(params, variables["stats"])
        assert (max(before, after) < 0.02) if held else (min(before, after) > 0.2)


def test_patches_start_as_an_orthonormal_transform():
    """Of 4x4 pixels of 3 colours 32 features of 48 are kept: the energy of what is smooth."""
    params = patches.start(PATCHES, vq.init(PATCHES, jax.random.key(0))[0], jax.random.key(1))
    encoder = vq.merge(PATCHES, params, vq.init(PATCHES, jax.random.key(0))[1]).encoder
    features = encoder.conv_in(jnp.eye(48).reshape(48, 4, 4, 3))
    for level in encoder.down:
        features = level(features)
    made_48F = features.reshape(48, 64)[:, ::2] / patches.SMALL
    np.testing.assert_allclose(made_48F.T @ made_48F, np.eye(32), atol=1e-5)
    np.testing.assert_allclose(made_48F[:, :3].T, np.tile(np.eye(3), 16) / 4, atol=1e-6)


def test_patches_that_do_not_fit():
    with pytest.raises(ValueError, match="make the last multiplier twice the one before it"):
        narrow = dataclasses.replace(TINY, multipliers=(1, 1))
        train.TokenizerTask(narrow, patches=True).init(jax.random.key(0))


def test_averaged_codes_are_the_mean_of_their_vectors():
    task = train.TokenizerTask(TINY, codebook_init_step=1, average_codes=True, hits_decay=0.0)
    _, stats = vq.shapes(TINY)
    rng = np.random.default_rng(0)
    z_BhwE = jnp.asarray(rng.standard_normal((2, 4, 4, TINY.code_dim)), jnp.float32)
    codes_Bhw = jnp.asarray(rng.integers(0, 3, (2, 4, 4)))
    variables, _ = task.remember(task.variables(stats), z_BhwE, codes_Bhw, z_BhwE)
    params = {"quantize.embedding": jnp.zeros((TINY.codebook_size, TINY.code_dim))}
    after, _ = task.after_update(params, variables, jnp.int32(5), jax.random.key(0))
    for code in range(3):
        want_E = np.asarray(z_BhwE)[np.asarray(codes_Bhw) == code].mean(0)
        np.testing.assert_allclose(after["quantize.embedding"][code], want_E, rtol=1e-5, atol=1e-6)


def test_averages_need_a_placement():
    task = train.TokenizerTask(TINY, codebook_init_step=-1, average_codes=True)
    message = (
        "^average_codes with codebook_init_step -1: averages start where codes are placed; "
        "take a step of 1 or more$"
    )
    with pytest.raises(ValueError, match=message):
        task.init(jax.random.key(0))


def test_means_are_a_round_of_k_means(monkeypatch):
    monkeypatch.setattr(quantize, "VECTOR_TILE", 8)
    z_NE = images(20, 30, 2)
    weight_N = np.r_[np.ones(20), np.zeros(10)].astype(np.float32)
    codebook_KE = np.r_[z_NE[:5], [[9.0, 9.0]]].astype(np.float32)
    got_KE = quantize.means(z_NE, weight_N, codebook_KE)
    nearest_N = ((z_NE[:, None] - codebook_KE) ** 2).sum(-1).argmin(1)[:20]
    for k in range(5):
        np.testing.assert_allclose(got_KE[k], z_NE[:20][nearest_N == k].mean(0), rtol=1e-5)
    np.testing.assert_array_equal(got_KE[5], codebook_KE[5])


def test_codes_are_placed_again_to_the_end():
    task = train.TokenizerTask(TINY, buffer_rows=256, codebook_init_step=2, place_every=3)
    params, variables = task.init(jax.random.key(0))
    z_RE = jax.random.normal(jax.random.key(1), (256, 4)) + 5
    variables |= {"buffer_RE": z_RE, "seen": jnp.int32(256)}
    start_KE, moved = params["quantize.embedding"], []
    for step in range(9):
        before_KE = params["quantize.embedding"]
        params, _ = task.after_update(params, variables, step, jax.random.key(step))
        moved.append(bool((params["quantize.embedding"] != before_KE).any()))
    assert [step + 1 for step in range(9) if moved[step]] == [2, 3, 6, 9]
    codes_KE = params["quantize.embedding"]
    error = float(jnp.square(z_RE - codes_KE[quantize.nearest_code(z_RE, codes_KE)]).mean())
    alone = float(jnp.square(z_RE - start_KE[quantize.nearest_code(z_RE, start_KE)]).mean())
    assert error < 0.1 * alone
