"""The published layouts: parity with transformers' Emu3VQVAE, and every bit there and back."""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx

from tokenizer import convert, vq

SMALL = dict(
    codebook_size=64,
    base_channels=32,
    channel_multiplier=[1, 2, 2, 4],
    num_res_blocks=2,
    attn_resolutions=[3],
    hidden_size=128,
)
TINY = vq.VQConfig(
    codebook_size=32, width=32, multipliers=(1, 2), res_blocks=1, attention_levels=(1,)
)


def weights(name, shape):
    """A random array that depends on its name only.

    The gains keep four channels alive over time, and attention from being so sharp that float32
    rounding decides who attends to whom.
    """
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    x = rng.standard_normal(shape)
    if name.endswith("num_batches_tracked"):
        return np.array(zlib.crc32(name.encode()) % 1000, np.int64)
    if name.endswith("running_var"):
        x = 0.5 + np.abs(x)
    elif name.endswith("running_mean"):
        x = 0.1 * x
    elif x.ndim == 1:
        x = 1 + 0.1 * x if name.endswith("weight") else 0.05 * x
    elif "embedding" not in name:
        gains = {"decoder.time_conv": 2, "time_conv": 4, "quant_conv": 4}
        gains |= {"q_proj": 0.3, "k_proj": 0.3}
        gain = next((gain for part, gain in gains.items() if part in name), 1)
        x = gain * x / np.sqrt(np.prod(shape[1:]))
    return x.astype(np.float32)


@pytest.fixture(scope="module")
def reference():
    """transformers' tokenizer, non-trivial in every tensor, running statistics included."""
    model = transformers.Emu3VQVAE(transformers.Emu3VQVAEConfig(**SMALL)).eval()
    state = {name: weights(name, tuple(t.shape)) for name, t in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(a) for name, a in state.items()})
    return model


@pytest.fixture(scope="module")
def reference_path(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    reference.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(reference_path):
    return convert.load(reference_path)


def pixels(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def channels_last(x):
    return np.moveaxis(x.numpy(), -3, -1)


def test_image_equals_transformers(reference, ours):
    x_BHWC = pixels(0, 2, 32, 48, 3)
    x = torch.from_numpy(np.moveaxis(x_BHWC, -1, 1))
    with torch.no_grad():
        codes = torch.stack(reference.encode(x, torch.tensor([[32, 48]] * 2)).image_tokens)
        image = channels_last(reference.decode(codes))
    assert len(np.unique(codes)) > 10
    np.testing.assert_array_equal(ours.encode(x_BHWC), codes.numpy())
    np.testing.assert_allclose(ours.decode(codes.numpy()), image, atol=5e-4)


@pytest.mark.parametrize("frames", [4, 8])
def test_video_equals_transformers(reference, ours, frames):
    x_BTHWC = pixels(frames, 1, frames, 48, 32, 3)
    codes_Bthw, video_BTHWC = there_and_back(reference, x_BTHWC)
    assert codes_Bthw.shape == (1, frames // 4, 6, 4)
    np.testing.assert_array_equal(ours.encode_video(x_BTHWC), codes_Bthw)
    np.testing.assert_allclose(ours.decode_video(codes_Bthw), video_BTHWC, atol=5e-4)


def there_and_back(reference, x_BTHWC):
    """transformers' codes and pixels. By hand: encode() crops a video's codes on wrong axes."""
    with torch.no_grad():
        z = reference.encoder(torch.from_numpy(np.moveaxis(x_BTHWC, -1, 2)))
        z = reference.quant_conv(z.permute(0, 2, 1, 3, 4)).permute(0, 2, 1, 3, 4)
        codes = reference.quantize(z)
        return codes.numpy(), channels_last(reference.decode(codes))


def test_a_streamed_video_equals_transformers_whole(reference, ours):
    x_BTHWC = pixels(12, 1, 12, 48, 32, 3)
    codes_Bthw, video_BTHWC = there_and_back(reference, x_BTHWC)
    early_Bthw, past = ours.encode_stream(x_BTHWC[:, :8])
    late_Bthw, _ = ours.encode_stream(x_BTHWC[:, 8:], past)
    np.testing.assert_array_equal(np.concatenate([early_Bthw, late_Bthw], 1), codes_Bthw)
    early_BTHWC, past = ours.decode_stream(codes_Bthw[:, :1])
    late_BTHWC, _ = ours.decode_stream(codes_Bthw[:, 1:], past)
    both_BTHWC = np.concatenate([early_BTHWC, late_BTHWC], 1)
    np.testing.assert_allclose(both_BTHWC, video_BTHWC, atol=5e-4)


def test_clips_equal_those_of_transformers(reference, ours):
    """Emu3's script cuts a video into clips of 4 frames, which make a batch."""
    x_BTHWC = pixels(5, 1, 8, 48, 32, 3)
    codes_Nthw, clips_NTHWC = there_and_back(reference, x_BTHWC.reshape(2, 4, 48, 32, 3))
    codes_Bthw = codes_Nthw.reshape(1, 2, 6, 4)
    np.testing.assert_array_equal(ours.encode_clips(x_BTHWC), codes_Bthw)
    video_BTHWC = clips_NTHWC.reshape(x_BTHWC.shape)
    np.testing.assert_allclose(ours.decode_clips(codes_Bthw), video_BTHWC, atol=5e-4)


def test_sizes_between_multiples_floor_as_in_transformers(reference, ours):
    x_BHWC = pixels(1, 1, 33, 47, 3)
    x = torch.from_numpy(np.moveaxis(x_BHWC, -1, 1))
    with torch.no_grad():
        codes = reference.encode(x, torch.tensor([[33, 47]])).image_tokens[0]
    np.testing.assert_array_equal(ours.encode(x_BHWC)[0], codes.numpy())


def test_batch_norm_trains_as_in_torch(reference, ours):
    x_BTHWC = 1 + 2 * pixels(2, 3, 2, 4, 5, 4)
    block = reference.encoder.time_res_stack[0]
    before = {k: v.clone() for k, v in block.state_dict().items()}
    mine = nnx.clone(ours.encoder.time_res_stack[0])
    try:
        with torch.no_grad():
            y = block.train()(torch.from_numpy(np.moveaxis(x_BTHWC, -1, 1)))
        np.testing.assert_allclose(mine(x_BTHWC, True), np.moveaxis(y.numpy(), 1, -1), atol=2e-5)
        for norm in ("norm1", "norm2"):
            want, have = getattr(block, norm), getattr(mine, norm)
            np.testing.assert_allclose(have.mean[...], want.running_mean, atol=1e-6)
            np.testing.assert_allclose(have.var[...], want.running_var, rtol=1e-5)
            assert int(have.count[...]) == int(want.num_batches_tracked)
    finally:
        block.eval().load_state_dict(before)


def read(path):
    return safetensors.numpy.load_file(path / "model.safetensors")


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


def test_import_then_export_is_bit_identical(reference_path, ours, tmp_path):
    convert.save(ours, tmp_path / "hf", layout="hf")
    assert_same_bits(read(reference_path), read(tmp_path / "hf"))
    convert.save(ours, tmp_path / "official", layout="official")
    again = convert.load(tmp_path / "official")
    convert.save(again, tmp_path / "official2", layout="official")
    assert_same_bits(read(tmp_path / "official"), read(tmp_path / "official2"))
    assert_same_bits(read(reference_path), dict(convert.tensors(again, "hf")))
    assert convert.fingerprint(again) == convert.fingerprint(ours)
    counter = read(tmp_path / "official")["encoder.time_res_stack.0.norm1.num_batches_tracked"]
    assert counter.shape == () and counter.dtype == np.int64 and counter > 0


def test_official_names_and_shapes(ours):
    shapes = {name: value.shape for name, value in convert.tensors(ours, "official")}
    assert len(shapes) == 495
    assert shapes["encoder.down.3.attn.1.proj_out.weight"] == (128, 128, 1, 1)
    assert shapes["encoder.down.1.block.0.nin_shortcut.weight"] == (64, 32, 1, 1)
    assert shapes["encoder.time_conv.1.conv.conv.weight"] == (4, 4, 4, 3, 3)
    assert shapes["encoder.time_res_stack.1.conv2.conv.bias"] == (4,)
    assert shapes["encoder.mid.attn_1.norm.bias"] == (128,)
    assert shapes["decoder.up.3.attn.2.norm.norm_layer.weight"] == (128,)
    assert shapes["decoder.up.0.block.0.norm1.conv_y.weight"] == (64, 4, 1, 1)
    assert shapes["decoder.up.1.upsample.conv.weight"] == (64, 64, 3, 3)
    assert shapes["quant_conv.conv.weight"] == (4, 4, 3, 1, 1)
    assert shapes["quantize.embedding.weight"] == (64, 4)


def test_transformers_loads_our_export(ours, tmp_path):
    convert.save(ours, tmp_path, layout="hf")
    model, info = transformers.Emu3VQVAE.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    x_BHWC = pixels(3, 1, 16, 24, 3)
    with torch.no_grad():
        x = torch.from_numpy(np.moveaxis(x_BHWC, -1, 1))
        codes = model.encode(x, torch.tensor([[16, 24]])).image_tokens[0]
    np.testing.assert_array_equal(ours.encode(x_BHWC)[0], codes.numpy())


def test_inside_a_sharded_emu3_model(tmp_path):
    tokenizer = vq.merge(TINY, *vq.init(TINY, jax.random.key(0)))
    settings = convert.config_json(TINY, "hf")
    names = {f"<|visual token {i:06d}|>": 20 + i for i in range(32)}
    config = transformers.Emu3Config(
        vq_config=settings,
        text_config=dict(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        vocabulary_map=names | {"<|extra_200|>": 3, "<image>": 4},
    )
    model = transformers.Emu3ForConditionalGeneration(config)
    state = {
        f"model.vqmodel.{k}": torch.from_numpy(np.array(v))
        for k, v in convert.tensors(tokenizer, "hf")
    }
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = convert.load(tmp_path)
    assert convert.fingerprint(again) == convert.fingerprint(tokenizer)
    assert again.config == TINY
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    mine = {name for name, _ in convert.tensors(again, "hf", prefix="vqmodel.")}
    assert mine == {name for name in index if name.startswith("vqmodel.")}


def test_half_precision_files_keep_their_bits(tmp_path):
    params, stats = vq.init(TINY, jax.random.key(0))
    params = {name: value.astype(jnp.bfloat16) for name, value in params.items()}
    convert.save(vq.merge(TINY, params, stats), tmp_path / "a", layout="hf")
    tokenizer = convert.load(tmp_path / "a")
    convert.save(tokenizer, tmp_path / "b", layout="hf")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (
        tmp_path / "b/model.safetensors"
    ).read_bytes()
    x_BHWC = tokenizer.decode(tokenizer.encode(pixels(0, 1, 8, 8, 3)))
    half_BHWC = convert.load(tmp_path / "a", dtype="bfloat16").decode(jnp.zeros((1, 4, 4), int))
    assert x_BHWC.dtype == half_BHWC.dtype == jnp.float32
    assert (half_BHWC != tokenizer.decode(jnp.zeros((1, 4, 4), int))).any()


def test_errors(tmp_path, reference_path):
    def refuse(path, words):
        with pytest.raises(ValueError, match=words) as error:
            convert.load(path)
        assert "\n" not in str(error.value)

    refuse(tmp_path, "has no config.json; give a directory of a tokenizer checkpoint")
    config = tmp_path / "config.json"
    config.write_text("{}")
    refuse(tmp_path, "is not the config of a model; it names no model_type")
    config.write_text(json.dumps({"model_type": "Emu3"}))
    refuse(tmp_path, "is a checkpoint of 'Emu3', not of a tokenizer; known are Emu3VisionVQ")
    good = json.loads((reference_path / "config.json").read_text())
    config.write_text(json.dumps(good))
    refuse(tmp_path, "has no .safetensors file")
    (tmp_path / "model.safetensors").symlink_to(reference_path / "model.safetensors")
    config.write_text(json.dumps(good | {"double_latent": True}))
    refuse(tmp_path, "double_latent is True; only False is supported")
    config.write_text(json.dumps(good | {"hidden_size": 64}))
    refuse(tmp_path, "hidden_size is 64; only 128 is supported")
    config.write_text(json.dumps(good | {"codebook_size": 65}))
    refuse(tmp_path, r"quantize.embedding.weight has shape \(64, 4\), which does not fit")
    config.write_text(json.dumps(good | {"num_res_blocks": 1}))
    refuse(tmp_path, "tensors are not in its config.json, first decoder.time_res_stack.1")
    config.write_text(json.dumps(good | {"num_res_blocks": 3}))
    refuse(tmp_path, "tensors are not in its safetensors, first decoder.time_res_stack.2")


def test_what_pytorch_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="norm_groups is 8, but Emu3's PyTorch code fixes 32"):
        convert.config_json(vq.VQConfig(norm_groups=8), "official")
    with pytest.raises(ValueError, match=r"levels \(2, 3\) have widths \[512, 1024\]"):
        convert.config_json(vq.VQConfig(attention_levels=(2, 3)), "hf")
    with pytest.raises(ValueError, match="layout 'torch' is unknown; use one of official, hf"):
        convert.config_json(vq.VQConfig(), "torch")
