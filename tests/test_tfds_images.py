"""TFDS data sets are read without TensorFlow, which is nowhere required, and what cannot be read
says why."""

import io
import json
import pathlib
import shutil

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_generated_pb2 as examples

from data_pipelines import image_folder, sources, tfds_images
from tests import encoding

COUNT = 5


def picture(i: int) -> bytes:
    """A file of 12+i x 16 px in a colour that tells i; the last is too small."""
    file, size = io.BytesIO(), (12 + i, 16) if i < COUNT - 1 else (4, 16)
    PIL.Image.new("RGB", size, (20 * i, 7, 9)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A data set as TFDS prepares it, written by hand as TFDS needs TensorFlow to write one."""
    path = tmp_path_factory.mktemp("data") / "tiny" / "1.0.0"
    path.mkdir(parents=True)
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        "text": tfds.features.Text(),
        "score": tfds.features.Scalar(np.float32),
        "mask": tfds.features.Image(shape=(None, None, 1)),
        "words": tfds.features.Sequence(tfds.features.Text()),
    }
    tfds.features.FeaturesDict(features).save_config(path)
    file = str(path / "tiny-train.array_record-00000-of-00001")
    writer = array_record_module.ArrayRecordWriter(file, "group_size:1")
    for i in range(COUNT):
        example = examples.Example()
        feature = example.features.feature
        feature["image"].bytes_list.value.append(picture(i))
        feature["label"].int64_list.value.append(i % 2)
        feature["text"].bytes_list.value.append(f"text {i}".encode())
        feature["score"].float_list.value.append(i / 2)
        feature["mask"].bytes_list.value.append(b"never decoded")
        feature["words"].bytes_list.value.extend([b"one", b"two"])
        writer.write(example.SerializeToString())
    writer.close()
    split = {
        "name": "train",
        "shardLengths": [str(COUNT)],
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    write_info(path, {"fileFormat": "array_record", "splits": [split]})
    return path


def write_info(path, entries):
    info = {"name": "tiny", "version": "1.0.0"} | entries
    (path / "dataset_info.json").write_text(json.dumps(info))


def test_records_have_pictures_and_the_captions_asked_for(directory):
    images = tfds_images.TfdsImages(str(directory), "train", caption="text")
    assert len(images) == COUNT
    for i in range(COUNT - 1):
        record = images[i]
        assert (record.key, record.caption) == (f"train/{i}", f"text {i}")
        expected_HWC = np.broadcast_to(np.array([20 * i, 7, 9], np.uint8), (16, 12 + i, 3))
        np.testing.assert_array_equal(record.image_HWC, expected_HWC)
    classes = tfds_images.TfdsImages(str(directory), "train", caption="label")
    assert [classes[i].caption for i in range(3)] == ["cat", "dog", "cat"]
    assert tfds_images.TfdsImages(str(directory), "train")[0].caption == ""


def test_a_part_of_a_split(directory):
    images = tfds_images.TfdsImages(str(directory), "train[1:3]", caption="text")
    assert [(r.key, r.caption) for r in images] == [
        ("train[1:3]/0", "text 1"),
        ("train[1:3]/1", "text 2"),
    ]


def test_a_bad_image_is_named(directory):
    images = tfds_images.TfdsImages(str(directory), "train")
    with pytest.raises(image_folder.BadImage, match="train/4: 4x16 px, smaller than 8 px"):
        images[COUNT - 1]


def test_what_cannot_be_read_says_why(directory, tmp_path):
    def message(*args, **options):
        with pytest.raises(ValueError) as error:
            tfds_images.TfdsImages(*args, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    place = str(directory)
    assert "is no TFDS data set; give the directory that" in message(str(tmp_path), "train")
    assert "Unknown split 'test'. Should be one of ['train']" in message(place, "test")
    absent = message(place, "train", image="picture")
    assert absent.endswith(
        "has no feature 'picture'; it has image, label, mask, score, text, words"
    )
    wrong = message(place, "train", caption="image")
    assert wrong.endswith("'image' is of kind Image; take one of Text or ClassLabel")
    other = tmp_path / "tiny" / "1.0.0"
    other.mkdir(parents=True)
    (other / "features.json").write_text((directory / "features.json").read_text())
    write_info(other, {"fileFormat": "tfrecord"})
    assert "is in tfrecord files; prepare it with file_format=" in message(str(other), "train")


@pytest.mark.parametrize("form", ["pythonClassName", "type"])
def test_no_class_is_imported_but_tfds_own(form, directory, tmp_path, monkeypatch):
    (tmp_path / "imported.py").write_text(f"open({str(tmp_path / 'victim')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    other = pathlib.Path(shutil.copytree(directory, tmp_path / "tiny" / "1.0.0"))
    features = json.loads((other / "features.json").read_text())
    features["featuresDict"]["features"]["text"] = {form: "imported.Text"}
    if form == "type":
        features = {form: "imported.Text", "content": {}}
    (other / "features.json").write_text(json.dumps(features))
    with pytest.raises(ValueError) as error:
        tfds_images.TfdsImages(str(other), "train")
    assert str(error.value) == f"{other} has features of 'imported.Text', not TFDS's"
    assert not (tmp_path / "victim").exists()


def test_damaged_files_are_named(directory, tmp_path):
    other = pathlib.Path(shutil.copytree(directory, tmp_path / "tiny" / "1.0.0"))
    records = other / "tiny-train.array_record-00000-of-00001"
    records.write_bytes(records.read_bytes()[:70_000])
    images = tfds_images.TfdsImages(str(other), "train")
    with pytest.raises(image_folder.BadFile) as error:
        images.entry(0)
    assert str(error.value).startswith(f"{other}: train/0 cannot be read (")
    (other / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError) as error:
        tfds_images.TfdsImages(str(other), "train")
    assert str(error.value).startswith(f"{other} is damaged (") and "\n" not in str(error.value)


def test_entries_and_files_come_without_decoding(directory, monkeypatch):
    monkeypatch.setattr(PIL.Image, "open", None)
    images = sources.Tfds(str(directory), "train", caption="text").open()
    assert [images.entry(i) for i in range(2)] == [
        sources.Entry("train/0", "text 0", {"label": "cat", "score": 0.0}),
        sources.Entry("train/1", "text 1", {"label": "dog", "score": 0.5}),
    ]
    assert images.file(1).read() == picture(1)
    assert images.file(1).name == f"{directory}: train/1"
    by_class = sources.Tfds(str(directory), "train", caption="label").open()
    assert by_class.entry(1) == sources.Entry("train/1", "dog", {"text": "text 1", "score": 0.5})


def test_a_store_of_a_data_set_is_that_of_the_files_in_a_folder(directory, tmp_path, capsys):
    for i in range(COUNT):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    want = encoding.documents(sources.Images(str(tmp_path), ""), tmp_path / "want")
    tfds_train = sources.Tfds(str(directory), "train", caption="text")
    found = encoding.documents(tfds_train, tmp_path / "found")
    assert [d[1:] for d in found] == [d[1:] for d in want] and len(want) == COUNT - 1
    assert [d[0] for d in found] == [f"train/{i}" for i in range(COUNT - 1)]
    assert f"skipped: {directory}: train/4: 4x16 px, smaller than 8 px" in capsys.readouterr().err
