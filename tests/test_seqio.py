"""seqio and TFDS for real, in .venv-ingest: tasks and a mixture become stores, TFRecord files
array_record files. `make test` makes that environment."""

import json
import os
import pathlib
import subprocess

import numpy as np
import pytest

from data_pipelines import store, tfds_images
from emu3_jax import vocab as vocabulary

ROOT = pathlib.Path(__file__).parent.parent
PYTHON = ROOT / ".venv-ingest" / "bin" / "python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-ingest; run `make ingest`")


def expected(count, split="train"):
    """What seqio_tasks.py's source has, less the empty text and the broken one."""
    return [f"{split} text {i}: \u732b {'word ' * i}" for i in range(count)]


def flags(directory) -> dict[str, list[str]]:
    """The launcher's arguments by what is done."""
    seqio = ["--config=configs/text.py:seqio", "--config.module=seqio_tasks", "--config.codes=16"]
    seqio += [f"--config.vocab={directory / 'ranks.tiktoken'}"]
    convert = ["--config=configs/convert_tfds.py"]
    jobs = {
        "text": dict(mixture_or_task="long", parts=3, split="validation"),
        "again": dict(mixture_or_task="long", parts=3, split="validation"),
        "ids": dict(mixture_or_task="long", feature="targets"),
        "mixture": dict(mixture_or_task="both", parts=2),
        "random": dict(mixture_or_task="ids", feature="targets"),
        "typo": dict(mixture_or_task="lonk"),
        "module": dict(mixture_or_task="long", module="seqio_takss"),
        "split": dict(mixture_or_task="long", split="test"),
        "feature": dict(mixture_or_task="long", feature="inputs"),
    }
    for name, fields in jobs.items():
        fields["directory"] = directory / ("text" if name == "again" else name)
    done = {name: seqio + _options(fields) for name, fields in jobs.items()}
    for name in ("tfds", "damaged", "array_record"):
        source, target = directory / name / "pictures/1.0.0", directory / f"{name}_to"
        target = directory / "array_record/pictures/1.0.0" if name == "tfds" else target
        done[name] = convert + _options(dict(source=source, target=target))
    return done


def _options(fields):
    return [f"--config.{name}={value}" for name, value in fields.items()]


@pytest.fixture(scope="module")
def words():
    return vocabulary.Vocab({bytes([i]): i for i in range(256)}, codes=16)


@pytest.fixture(scope="module")
def ran(words, tmp_path_factory) -> tuple[pathlib.Path, dict[str, tuple[int, str, str]]]:
    """All jobs' exit codes, output and errors, from one process: TensorFlow imports slowly."""
    directory = tmp_path_factory.mktemp("ingest")
    vocabulary.save_ranks(words.ranks, directory / "ranks.tiktoken")
    jobs = flags(directory)
    made = subprocess.run(
        [PYTHON, "tests/seqio_side.py", directory],
        input="".join(json.dumps(job) + "\n" for job in jobs.values()),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | dict(PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}"),
    )
    assert made.returncode == 0, made.stderr[-2000:]
    lines = [line for line in made.stdout.splitlines() if line.startswith("[")]
    return directory, dict(zip(jobs, map(json.loads, lines), strict=True))


def contents(directory, words):
    opened = store.Store(directory, words.fingerprint)
    return [words.decode(document.text) for document in opened.read(range(len(opened)))]


def test_a_task_becomes_a_store(ran, words):
    """Its texts, each once; what is empty or broken is named, and nothing done twice."""
    directory, results = ran
    code, _, errors = results["text"]
    assert code == 0
    assert sorted(contents(directory / "text", words)) == sorted(expected(10, "validation"))
    assert len(errors.splitlines()) == 2 and errors.startswith("skipped: long/validation/")
    assert ": empty\n" in errors and "codec can't decode byte 0xff in position 7" in errors
    info = store.Store(directory / "text").info
    assert (info["skipped"], info["read_from"]) == (2, "long")
    again = (0, f"{directory / 'text'}: encoded (3 of 3 parts here)\n", "")
    assert tuple(results["again"]) == again


def test_ids_are_decoded_back_into_text(ran, words):
    """By the task's own vocabulary, here one of bytes, which leaves out what is no UTF-8."""
    directory, results = ran
    assert results["ids"][0] == 0 and results["ids"][2] == "skipped: long/train/0/10: empty\n"
    assert contents(directory / "ids", words) == [*expected(10), "broken "]


def test_a_mixture_becomes_weighted_stores(ran, words):
    """Rates of 3 to 1 count examples; the weights, which count ids, follow the mean lengths."""
    directory, results = ran
    assert results["mixture"][0] == 0
    weights = json.loads((directory / "mixture" / "mixture.json").read_text())
    assert sum(weights.values()) == pytest.approx(1)
    rates = {}
    for name, count in (("long", 10), ("short", 4)):
        path = directory / "mixture" / name
        texts = contents(path, words)
        assert sorted(texts) == sorted(expected(count))
        rates[name] = weights[str(path)] / np.mean([len(text.encode()) for text in texts])
    assert rates["long"] / rates["short"] == pytest.approx(3)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ("random", "task ids: feature 'targets' is ids that PassThroughVocabulary does not decode "
         "into text; take a text, one of note"),
        ("typo", "no Task or Mixture 'lonk'; did you mean 'long'?"),
        ("module", "module 'seqio_takss' cannot be imported: No module named 'seqio_takss'; set "
         "module"),
        ("split", "task long has no split 'test'; it has train, validation"),
        ("feature", "task long: feature 'inputs' is not there; it has targets, "
         "targets_pretokenized"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_why(ran, job, message):
    _, results = ran
    code, _, errors = results[job]
    assert (code, errors) == (2, f"error: {message}\n")


def test_without_tensorflow_seqio_is_asked_for(words):
    """This environment has none, so training cannot come to depend on it."""
    from data_pipelines import seqio_text

    with pytest.raises(ValueError, match="No module named 'seqio'; run `make ingest`, then start"):
        seqio_text.EncodeSeqio(module="seqio_tasks").run()


def test_tfds_files_are_rewritten(ran):
    """What TFDS wrote as TFRecord is read here, without TensorFlow, and nothing is decoded."""
    directory, results = ran
    assert results["tfds"][0] == 0
    with pytest.raises(ValueError, match="is in tfrecord files; prepare it with file_format=array"):
        tfds_images.TfdsImages(str(directory / "tfds/pictures/1.0.0"), "train", "image", "text")
    path = directory / "array_record/pictures/1.0.0"
    images = tfds_images.TfdsImages(str(path), "train", "image", "text")
    found = {images[i].caption: images[i].image_HWC for i in range(len(images))}
    assert sorted(found) == [f"picture {i}" for i in range(5)]
    for i in range(5):
        image_HWC = found[f"picture {i}"]
        assert image_HWC.shape == (12 + i, 16, 3) and (image_HWC == 50 * i).all()
    assert not list(path.glob("*.tmp"))


def test_tfds_files_that_cannot_be_rewritten(ran):
    directory, results = ran
    code, _, errors = results["damaged"]
    assert code == 2 and "pictures-train.tfrecord-00000-of-00001 is damaged: " in errors
    assert not (directory / "damaged_to/dataset_info.json").exists()
    source = directory / "array_record/pictures/1.0.0"
    message = f"error: {source} is in array_record files already; use it as it is\n"
    assert results["array_record"][0] == 2 and results["array_record"][2].endswith(message)
