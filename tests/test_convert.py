"""Published layouts in and out: names, bits, transformers' own loading and logits, and memory."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import unicodedata

import jax
import numpy as np
import PIL.Image
import pytest
import reference
import safetensors.numpy
import safetensors.torch
import torch
import transformers

from emu3_jax import convert, mesh, processor, release, shards, vocab
from emu3_jax.transformer import Transformer

CAPTIONS = ["a red apple on a table", "a green apple", "IT'S na\u00efve\n\n90*90 \u732b  x"] * 3


@pytest.fixture(scope="module")
def hf_model():
    return reference.emu3()


@pytest.fixture(scope="module")
def hf_dir(hf_model, tmp_path_factory) -> pathlib.Path:
    """What transformers writes, in many shards."""
    path = tmp_path_factory.mktemp("hf")
    hf_model.save_pretrained(path, max_shard_size="2MB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


@pytest.fixture(scope="module")
def official_dir(hf_dir, tmp_path_factory) -> pathlib.Path:
    """The decoder as the official repository lays it out, in two shards with an index."""
    path = tmp_path_factory.mktemp("official")
    tensors = {
        name.removeprefix("text_model."): array
        for name, array in _read(hf_dir).items()
        if name.startswith("text_model.")
    }
    assert "model.layers.1.self_attn.q_proj.weight" in tensors and "lm_head.weight" in tensors
    names = sorted(tensors)
    files = {name: f"model-{1 + (i % 2):05d}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: tensors[name] for name in names if files[name] == file}
        safetensors.numpy.save_file(part, path / file, metadata={"format": "pt"})
    index = dict(metadata={}, weight_map=files)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = dict(reference.text_config(), model_type="Emu3", rope_theta=1e6, rope_scaling=None)
    del config["rope_parameters"]
    ids = reference.vocabulary()
    config |= dict(eol_token_id=ids["<|extra_200|>"], eof_token_id=ids["<|extra_201|>"])
    config |= dict(img_token_id=ids["<|image token|>"], boi_token_id=ids["<|image start|>"])
    config |= dict(eoi_token_id=ids["<|image end|>"], image_area=1024, torch_dtype="float32")
    (path / "config.json").write_text(json.dumps(config))
    return path


def _read(path) -> dict[str, np.ndarray]:
    tensors = {}
    for file in pathlib.Path(path).glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def _same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert left[name].tobytes() == right[name].tobytes(), name


def _vision(hf_model) -> convert.Vision:
    state = {name: array.numpy() for name, array in hf_model.model.vqmodel.state_dict().items()}
    return convert.Vision(state.items(), dict(reference.VQ, model_type="emu3_vqgan"))


@pytest.mark.parametrize("layout", ["hf", "official"])
def test_imported_weights_give_transformers_logits(hf_model, hf_dir, official_dir, layout):
    model, params = convert.load(str(hf_dir if layout == "hf" else official_dir))
    assert (model.layers, model.vocab, model.first_visual, model.dtype) == (2, 122, 58, "float32")
    tokens_BT = np.random.default_rng(1).integers(0, 122, (2, 11)).astype(np.int32)
    with torch.no_grad():
        expected_BTV = hf_model(input_ids=torch.from_numpy(tokens_BT).long()).logits.numpy()
    ones_BT = np.ones_like(tokens_BT)
    positions_BT = np.arange(11, dtype=np.int32) * ones_BT
    with jax.set_mesh(mesh.Mesh().make(jax.devices()[:1])):
        logits_BTV = jax.jit(model.logits)(params, tokens_BT, ones_BT, positions_BT)
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=1e-5, rtol=0)


def test_hf_import_then_export_keeps_every_bit(hf_model, hf_dir, tmp_path):
    model, params = convert.load(str(hf_dir))
    _, about = release.describe(str(hf_dir))
    convert.save(model, params, str(tmp_path), "hf", vision=_vision(hf_model), release=about)
    _same(_read(tmp_path), _read(hf_dir))
    written, given = _config(tmp_path), _config(hf_dir)
    for part in ("text_config", "vq_config"):
        for settings in (written[part], given[part]):
            settings.pop("dtype", None)
        assert written[part] == given[part]
    names = written["vocabulary_map"]
    assert names.items() <= given["vocabulary_map"].items()
    assert len(names) == 9 + reference.CODES


def test_official_import_then_export_keeps_every_bit(official_dir, tmp_path):
    model, params = convert.load(str(official_dir))
    _, about = release.describe(str(official_dir))
    convert.save(model, params, str(tmp_path), "official", release=about)
    _same(_read(tmp_path), _read(official_dir))
    given = _config(official_dir)
    assert given.items() <= _config(tmp_path).items()


@pytest.mark.parametrize("stacked", [True, False])
def test_layouts_convert_into_each_other(hf_model, hf_dir, official_dir, tmp_path, stacked):
    vision = _vision(hf_model)
    if stacked:
        model, params = convert.load(str(official_dir))
        _, about = release.describe(str(official_dir))
        convert.save(model, params, str(tmp_path / "hf"), "hf", vision=vision, release=about)
        model, params = convert.load(str(tmp_path / "hf"))
        convert.save(model, params, str(tmp_path / "official"), "official", release=about)
    else:
        convert.rewrite(str(official_dir), str(tmp_path / "hf"), "hf", vision=vision)
        convert.rewrite(str(tmp_path / "hf"), str(tmp_path / "official"), "official")
    _same(_read(tmp_path / "hf"), _read(hf_dir))
    _same(_read(tmp_path / "official"), _read(official_dir))
    assert release.describe(str(tmp_path / "official"))[0] == release.describe(str(hf_dir))[0]


def test_bfloat16_and_many_shards_keep_their_bits(official_dir, hf_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_BYTES", 1000)
    source = tmp_path / "source"
    shutil.copytree(official_dir, source)
    for file in source.glob("*.safetensors"):
        halved = {name: torch.from_numpy(a).bfloat16() for name, a in _read_one(file).items()}
        safetensors.torch.save_file(halved, file)
    model, params = convert.load(str(source), scratch=str(tmp_path / "scratch"))
    assert model.dtype == "bfloat16" and isinstance(params["layers"]["mlp"]["up"], np.memmap)
    write = shards.write
    monkeypatch.setattr(shards, "write", lambda t, p: write(t, p, shard_bytes=50_000))
    about = release.describe(str(source))[1]
    convert.save(model, params, str(tmp_path / "copy"), "official", release=about)
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 2
    _same(_read(tmp_path / "copy"), _read(source))
    index = json.loads((tmp_path / "copy" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in _read(source).values())
    assert _config(tmp_path / "copy")["torch_dtype"] == "bfloat16"
    # An earlier export's shards do not linger.
    monkeypatch.setattr(shards, "write", write)
    convert.save(model, params, str(tmp_path / "copy"), "official", release=about)
    files = [file.name for file in (tmp_path / "copy").glob("model*")]
    assert files == ["model.safetensors"]


@pytest.fixture(scope="module")
def ours(hf_model, tmp_path_factory):
    """A decoder of our own over a small vocabulary in Emu3's order, exported with everything."""
    words = vocab.Vocab(vocab.train_bpe(CAPTIONS, 300), reference.CODES)
    model = Transformer(
        layers=2,
        width=32,
        heads=4,
        kv_heads=2,
        head_dim=16,
        ffn=48,
        vocab=words.size,
        first_visual=words.visual,
        dtype="float32",
    )
    with jax.set_mesh(mesh.Mesh().make(jax.devices()[:1])):
        params = jax.tree.map(np.asarray, model.init(jax.random.key(0))[0])
    path = tmp_path_factory.mktemp("ours")
    about = release.Release(context=64, min_pixels=32 * 32, max_pixels=64 * 64)
    convert.save(model, params, str(path), "hf", words, _vision(hf_model), about)
    return words, model, params, path


def test_transformers_loads_our_export_completely(ours):
    words, model, params, path = ours
    loaded, info = transformers.AutoModelForImageTextToText.from_pretrained(
        path, output_loading_info=True
    )
    assert isinstance(loaded, transformers.Emu3ForConditionalGeneration)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], (key, info[key])
    tokens_BT = np.random.default_rng(1).integers(0, words.size, (2, 9)).astype(np.int32)
    with torch.no_grad():
        expected_BTV = loaded.eval()(input_ids=torch.from_numpy(tokens_BT).long()).logits.numpy()
    ones_BT = np.ones_like(tokens_BT)
    positions_BT = np.arange(9, dtype=np.int32) * ones_BT
    with jax.set_mesh(mesh.Mesh().make(jax.devices()[:1])):
        logits_BTV = jax.jit(model.logits)(params, tokens_BT, ones_BT, positions_BT)
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=1e-5, rtol=0)
    mapping = loaded.model.vocabulary_mapping
    assert mapping.eol_token_id == words.eol
    assert mapping.image_tokens == list(range(words.visual, words.size))
    generation = loaded.generation_config
    assert (generation.bos_token_id, generation.eos_token_id) == (words.bos, words.eos)


def test_transformers_tokenizes_as_we_do(ours):
    words, _, _, path = ours
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    rng = random.Random(0)
    letters = "ab pl'S9\u00e9\u732b\n-(_ e\u0301\t\u3000" + "".join(CAPTIONS[:3])
    texts = CAPTIONS[:3] + ["".join(rng.choices(letters, k=50)) for _ in range(200)]
    for text in texts:
        assert tokenizer(text)["input_ids"] == words.encode(text), text
        assert tokenizer.decode(words.encode(text)) == words.decode(words.encode(text))
    for i in range(words.text_size, words.size):
        name = "<image>" if i == words.pad + 3 else words.decode([i])
        assert tokenizer.convert_tokens_to_ids(name) == i
    text = "a red<|extra_203|> apple"
    assert tokenizer(text)["input_ids"] == words.encode(text, specials=True)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id) == (words.pad, words.bos)


def test_emu3_ranks_make_the_same_tokenizer(tmp_path):
    words = vocab.Vocab.emu3()
    few = vocab.Vocab(words.ranks, codes=64)
    processor.write_tokenizer(few, tmp_path, "hf")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json")
    )
    rng = random.Random(0)
    # No combining marks: their canonical order is a matter of each library's Unicode version.
    letters = [chr(rng.randrange(32, 0x3000)) for _ in range(300)]
    letters = [c for c in letters if not unicodedata.combining(c)] + list("etaoin shr'S\n\n  90*_(")
    texts = CAPTIONS[:3] + ["".join(rng.choices(letters, k=40)) for _ in range(500)]
    for text in texts + ["foo_bar (closeup) IT'S !!!\n https://a.b/c\n\n  x 90*90"]:
        assert tokenizer(text)["input_ids"] == words.encode(text), text


def test_processor_writes_documents_as_we_do(ours):
    words, _, _, path = ours
    made = transformers.AutoProcessor.from_pretrained(path)
    assert isinstance(made, transformers.Emu3Processor)
    pixels_HWC = np.full((32, 48, 3), 255, np.uint8)
    out = made(images=PIL.Image.fromarray(pixels_HWC), text="<image>a red apple")
    block = words.image_block(np.zeros((4, 6), int))
    at = int(np.flatnonzero(block == words.img)[0]) + 1
    grid = slice(at, at + 4 * 7)
    block[grid] = words.pad + 3  # the placeholder stands for codes and row ends
    assert out["input_ids"][0] == [words.bos, *block.tolist(), *words.encode("a red apple")]
    np.testing.assert_array_equal(np.asarray(out["pixel_values"][0]), 1.0)
    asked = made(
        text="a red apple", return_for_image_generation=True, ratio="1:1", image_area=64 * 64
    )
    head = [words.bos, *words.encode("a red apple"), words.boi, *words.encode("8*8"), words.img]
    assert asked["input_ids"][0] == head
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    prompt = made.apply_chat_template(chat, add_generation_prompt=True)
    assert prompt == "You are a helpful assistant. USER: <image>What?. ASSISTANT:"


def test_official_export_has_its_tokenizer_files(official_dir, ours, tmp_path):
    words, model, params, _ = ours
    square = dataclasses.replace(model, head_dim=8)
    shapes = {path: param.shape for path, param in _leaves(square.params())}
    small = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.reshape(-1)[: np.prod(shapes[path])].reshape(shapes[path]), params
    )
    convert.save(square, small, str(tmp_path), "official", vocab=words)
    again = vocab.Vocab.load(tmp_path / "emu3.tiktoken", reference.CODES)
    assert again.fingerprint == words.fingerprint
    visual = (tmp_path / "emu3_vision_tokens.txt").read_text().splitlines()
    assert visual == [words.decode([i]) for i in range(words.img, words.size)]
    config = _config(tmp_path)
    assert config["img_token_id"] == words.img and config["bos_token_id"] == words.bos
    with pytest.raises(ValueError, match="the official layout has no head_dim: width 32 must be"):
        convert.save(model, params, str(tmp_path), "official")


def test_unknown_directories_are_refused(hf_dir, tmp_path):
    with pytest.raises(ValueError) as error:
        convert.load(str(tmp_path))
    assert str(error.value) == (
        f"{tmp_path} is no known checkpoint: it has neither config.json beside *.safetensors "
        "(official, hf) nor checkpoints/ (emu3_jax)"
    )
    shutil.copytree(hf_dir, tmp_path / "copy")
    _edit(tmp_path / "copy", model_type="llama")
    with pytest.raises(ValueError, match="says model_type 'llama', expected 'Emu3' .official. or"):
        convert.load(str(tmp_path / "copy"))
    (tmp_path / "copy" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no readable JSON"):
        convert.load(str(tmp_path / "copy"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden_act="gelu"), "config.json has hidden_act 'gelu'; Emu3's decoder has 'silu'"),
        (dict(tie_word_embeddings=True), "has tie_word_embeddings True; Emu3's decoder has False"),
        (dict(rope_scaling=dict(rope_type="yarn")), "rope_scaling of type 'yarn'"),
        (dict(intermediate_size=80), r"gate_proj.weight has shape \(160, 64\), its config.json "),
        (dict(num_hidden_layers=1), "has 9 unknown tensors, such as model.layers.1."),
        (dict(num_hidden_layers=3), "lacks tensor model.layers.2.input_layernorm.weight, which"),
        (dict(eoi_token_id=121), "eoi_token_id 121 and vocab_size 122, which leaves no visual"),
    ],
)
def test_configs_that_do_not_fit_are_refused(official_dir, tmp_path, change, message):
    shutil.copytree(official_dir, tmp_path / "copy")
    _edit(tmp_path / "copy", **change)
    with pytest.raises(ValueError, match=message) as error:
        convert.load(str(tmp_path / "copy"))
    assert "\n" not in str(error.value)


def test_broken_shards_are_refused(official_dir, tmp_path):
    first = "model-00001-of-00002.safetensors"
    shutil.copytree(official_dir, tmp_path / "copy")
    data = (tmp_path / "copy" / first).read_bytes()
    (tmp_path / "copy" / first).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"{first} is no readable safetensors file"):
        convert.load(str(tmp_path / "copy"))
    (tmp_path / "copy" / first).unlink()
    with pytest.raises(ValueError, match=f"index.json names {first}, which is not there; copy all"):
        convert.load(str(tmp_path / "copy"))


def test_broken_vocabulary_maps_are_refused(hf_dir, tmp_path):
    shutil.copytree(hf_dir, tmp_path / "copy")
    names = reference.vocabulary()
    _edit(
        tmp_path / "copy", vocabulary_map={k: v for k, v in names.items() if k != "<|extra_201|>"}
    )
    with pytest.raises(ValueError, match="vocabulary_map lacks '<.extra_201.>'"):
        convert.load(str(tmp_path / "copy"))
    _edit(tmp_path / "copy", vocabulary_map=names | {"<|visual token 000063|>": 7})
    with pytest.raises(ValueError, match="64 visual tokens on ids 58 to 7; they must be one range"):
        convert.load(str(tmp_path / "copy"))


def test_exports_that_cannot_be_are_refused(ours, hf_model, tmp_path):
    words, model, params, _ = ours
    other = vocab.Vocab(words.ranks, codes=32)
    with pytest.raises(
        ValueError, match="the vocabulary has 530 ids, codes from 498; the model has 562"
    ):
        convert.save(model, params, str(tmp_path), "hf", other, _vision(hf_model))
    with pytest.raises(ValueError, match="the hf layout holds decoder and vision tokenizer; give"):
        convert.save(model, params, str(tmp_path), "hf")
    with pytest.raises(ValueError, match="no layout 'onnx'; use official or hf"):
        convert.save(model, params, str(tmp_path), "onnx")
    odd = dataclasses.replace(model, first_visual=58)
    with pytest.raises(ValueError, match="codes from 58 is not in Emu3's order; give the ids of"):
        convert.save(odd, params, str(tmp_path), "hf", vision=_vision(hf_model))
    assert not list(tmp_path.iterdir())


def test_conversion_takes_memory_that_does_not_grow_with_the_model(tmp_path):
    """Measured in a process of its own on a 600 MB model: loaded, saved as hf, rewritten as hf."""
    if not pathlib.Path("/proc/self/status").exists():
        pytest.skip("reads anonymous memory from Linux's /proc")
    here = pathlib.Path(__file__).parent
    command = [sys.executable, str(here / "convert_memory.py"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(here.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    model_mb, load_mb, save_mb, rewrite_mb = map(float, done.stdout.split())
    assert model_mb > 600
    assert max(load_mb, save_mb, rewrite_mb) < 300, (load_mb, save_mb, rewrite_mb)
    shutil.rmtree(tmp_path)


def _config(path) -> dict:
    return json.loads((pathlib.Path(path) / "config.json").read_text())


def _edit(path, **change) -> None:
    (path / "config.json").write_text(json.dumps(_config(path) | change))


def _read_one(file) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(file)


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)
