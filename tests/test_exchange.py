"""The job: every format into every other, by the one command, and back with the same bits."""

import json
import pathlib

import jax
import numpy as np
import pytest
import reference
import safetensors.numpy
import torch
import transformers

from emu3_jax import convert, launch, mesh, release, vocab
from emu3_jax.transformer import Transformer
from tokenizer import convert as vision_convert
from tokenizer import exchange as job

CAPTIONS = ["a red apple on a table", "a green apple"] * 3


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> tuple[vocab.Vocab, str]:
    path = tmp_path_factory.mktemp("words") / "vocab.tiktoken"
    vocab.save_ranks(vocab.train_bpe(CAPTIONS, 300), path)
    return vocab.Vocab.load(path, reference.CODES), str(path)


@pytest.fixture(scope="module")
def official(words, tmp_path_factory) -> pathlib.Path:
    """An official decoder of 2 layers, and transformers' tiny vision tokenizer beside it."""
    path = tmp_path_factory.mktemp("official")
    hf_vision = reference.emu3().model.vqmodel
    hf_vision.save_pretrained(path / "hf_vision")
    tokenizer = vision_convert.load(path / "hf_vision")
    vision_convert.save(tokenizer, path / "lm" / "vision_tokenizer", "official")
    sizes = dict(layers=2, width=64, heads=4, kv_heads=2, head_dim=16, ffn=48, dtype="float32")
    model = Transformer(**sizes, vocab=words[0].size, first_visual=words[0].visual)
    with jax.set_mesh(mesh.Mesh().make(jax.devices()[:1])):
        params = jax.tree.map(np.asarray, model.init(jax.random.key(0))[0])
    convert.save(model, params, str(path / "lm"), "official")
    return path / "lm"


def _run(**fields) -> None:
    paths = {name: str(fields.pop(name)) for name in ("source", "target")}
    job.Convert(**paths, **fields).run()


def _read(path) -> dict[str, bytes]:
    tensors = {}
    for file in pathlib.Path(path).rglob("*.safetensors"):
        for name, array in safetensors.numpy.load_file(file).items():
            tensors[f"{file.parent.relative_to(path)}/{name}"] = array.tobytes()
    return tensors


def test_official_to_hf_to_ours_to_official_keeps_every_bit(official, words, tmp_path, capsys):
    ranks = words[1]
    _run(source=official, target=tmp_path / "hf", vocab=ranks)
    loaded, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], (key, info[key])
    image = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 32, 32))).float()
    codes = loaded.eval().model.vqmodel.encode(image, torch.tensor([[32, 32]])).image_tokens[0]
    ours_hw = vision_convert.load(official / "vision_tokenizer").encode(
        np.asarray(image).transpose(0, 2, 3, 1)
    )[0]
    np.testing.assert_array_equal(codes.numpy(), ours_hw)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("a red")["input_ids"] == (
        words[0].encode("a red")
    )
    _run(source=tmp_path / "hf", target=tmp_path / "run", format="emu3_jax")
    _run(source=tmp_path / "run", target=tmp_path / "back", format="official")
    assert _read(tmp_path / "back") == _read(official)
    _run(source=tmp_path / "run", target=tmp_path / "hf2", format="hf", context=64)
    assert _read(tmp_path / "hf2") == _read(tmp_path / "hf")
    config = json.loads((tmp_path / "hf2" / "config.json").read_text())
    assert config["text_config"]["max_position_embeddings"] == 64
    capsys.readouterr()
    _run(source=tmp_path / "run", target=tmp_path / "back", format="official")
    assert capsys.readouterr().out == f"{tmp_path / 'back'}: converted (from {tmp_path / 'run'})\n"


def test_a_vision_tokenizer_converts_alone(official, tmp_path):
    vision = official / "vision_tokenizer"
    _run(source=vision, target=tmp_path / "hf")
    transformers.Emu3VQVAE.from_pretrained(tmp_path / "hf")
    _run(source=tmp_path / "hf", target=tmp_path / "run", format="emu3_jax")
    _run(source=tmp_path / "run", target=tmp_path / "official", format="official")
    assert _read(tmp_path / "official") == _read(vision)


def test_an_interrupted_conversion_is_taken_up_again(official, tmp_path, monkeypatch):
    save, calls = job.save_vision, []

    def stops(*args):
        calls.append(args)
        raise KeyboardInterrupt

    for layout in ("official", "emu3_jax"):
        target = tmp_path / layout
        with monkeypatch.context() as broken:
            broken.setattr(job, "save_vision", stops)
            with pytest.raises(KeyboardInterrupt):
                _run(source=official, target=target, format=layout)
        _run(source=official, target=target, format=layout)
    assert len(calls) == 2 and job.save_vision is save
    assert _read(tmp_path / "official") == _read(official)
    _run(source=tmp_path / "emu3_jax", target=tmp_path / "back", format="official")
    assert _read(tmp_path / "back") == _read(official)


def _refused(capsys, *arguments) -> str:
    """The one line that the command ends with."""
    assert launch.main(["--config=configs/convert.py", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_errors_are_one_line_and_exit_code_2(official, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(pathlib.Path(__file__).parent.parent)
    source, target = f"--config.source={official}", f"--config.target={tmp_path / 'out'}"
    assert "give --config.source=DIR and --config.target=DIR" in _refused(capsys, source)
    nowhere = f"--config.source={tmp_path / 'nowhere'}"
    assert f"{tmp_path / 'nowhere'} is no known checkpoint: it has neither" in _refused(
        capsys, nowhere, target
    )
    assert "no format 'onnx'; use one of official, hf, emu3_jax" in _refused(
        capsys, source, target, "--config.format=onnx"
    )
    assert "has no field 'sourc'; did you mean 'source'?" in _refused(
        capsys, "--config.sourc=x", target
    )
    (official / "vision_tokenizer").rename(tmp_path / "vision")
    assert "has no vision tokenizer, which the hf layout holds too; give --config.tokenizer" in (
        _refused(capsys, source, target)
    )
    (tmp_path / "vision").rename(official / "vision_tokenizer")
    ranks = tmp_path / "other.tiktoken"
    vocab.save_ranks({bytes([byte]): byte for byte in range(256)}, ranks)
    assert "the vocabulary has 531 ids, codes from 467; the model has 549, codes from 485" in (
        _refused(capsys, source, target, f"--config.vocab={ranks}")
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    assert "full holds something else already; choose another --config.target" in _refused(
        capsys, source, f"--config.target={tmp_path / 'full'}"
    )


def test_formats_are_found_by_their_files(official, tmp_path):
    assert job.find(str(official)) == (str(official), str(official / "vision_tokenizer"))
    assert job.find(str(official / "vision_tokenizer")) == (
        None,
        str(official / "vision_tokenizer"),
    )
    assert release.recognise(str(official)) == "official"
