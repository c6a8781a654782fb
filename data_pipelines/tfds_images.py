"""A TensorFlow Datasets data set of images as a source of records, without TensorFlow.

It must be prepared in array_record files: those give any record by its number.
"""

import io
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import tensorflow_datasets as tfds

from data_pipelines import image_folder, parts, sources
from emu3_jax import untrusted


class TfdsImages:
    """A random-access source: `images[i]` is an image_folder.Record (uint8 RGB on white), whose key
    is SPLIT/i, or raises BadImage.

    Numbers, texts and classes other than the caption are an entry's columns.
    """

    has_videos = False

    def __init__(self, directory: str, split: str, image: str = "image", caption: str = ""):
        """Args: directory: of one version of a data set, with dataset_info.json; split: a name, or
        a part as "train[:100]"; image, caption: features, the latter a text or a class, whose name
        is then the caption; without one there are no captions.

        Raises ValueError for a directory, split or feature that is not there or cannot be used.
        """
        builder = open_builder(directory)
        self._directory, self._split, self._image = directory, split, image
        self._features = builder.info.features
        self._check(image, "Image", tfds.features.Image)
        self._caption = self._caption_reader(caption)
        self._columns = {
            name: reader
            for name, feature in self._features.items()
            if name != caption and (reader := _reader(name, feature))
        }
        self._source = self._open(builder)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> image_folder.Record:
        return sources.read(self, index)

    def entry(self, index: int) -> sources.Entry:
        """Key, caption and columns of a record."""
        example = self._example(index)
        columns = {name: read(example) for name, read in self._columns.items()}
        return sources.Entry(f"{self._split}/{index}", self._caption(example), columns)

    def file(self, index: int) -> BinaryIO:
        """The image of a record, undecoded."""
        file = io.BytesIO(self._example(index)[self._image])
        file.name = f"{self._directory}: {self._split}/{index}"
        return file

    def _example(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            return self._source[index]
        except Exception as error:  # TFDS and array_record raise whatever they come across
            name, said = f"{self._directory}: {self._split}/{index}", parts.first_line(error)
            raise image_folder.BadFile(f"{name} cannot be read ({said})") from error

    def _open(self, builder: Any) -> Any:
        format = builder.info.file_format.value
        if format != "array_record":
            raise ValueError(
                f"{self._directory} is in {format} files; prepare it with file_format=array_record"
            )
        # Images stay files, which image_folder reads as it reads all others.
        kinds = tfds.features.Image, tfds.features.Video
        decoders = {
            name: tfds.decode.SkipDecoding()
            for name, feature in self._features.items()
            if isinstance(feature, kinds)
        }
        try:
            return builder.as_data_source(self._split, decoders=decoders)
        except ValueError as error:
            raise ValueError(f"{self._directory}: {parts.first_line(error)}") from error

    def _caption_reader(self, caption: str) -> Callable[[dict], str]:
        if not caption:
            return lambda example: ""
        self._check(caption, "Text or ClassLabel", tfds.features.Text, tfds.features.ClassLabel)
        return _reader(caption, self._features[caption])

    def _check(self, name: str, wanted: str, *kinds: type) -> None:
        if name not in self._features:
            raise ValueError(
                f"{self._directory} has no feature {name!r}; "
                f"it has {', '.join(sorted(self._features))}"
            )
        if not isinstance(self._features[name], kinds):
            kind = type(self._features[name]).__name__
            raise ValueError(f"{self._directory}: {name!r} is of kind {kind}; take one of {wanted}")


def open_builder(directory: str) -> Any:
    """What TFDS knows of a prepared data set; ValueError if it is none or damaged.

    TFDS imports the classes that features.json names, so none but its own may stand there.
    """
    path = pathlib.Path(directory)
    if not (path / "dataset_info.json").is_file():
        raise ValueError(
            f"{directory} is no TFDS data set; give the directory that holds dataset_info.json"
        )
    if (path / "features.json").is_file():
        for name in _class_names(untrusted.read_object(path / "features.json")):
            if not name.startswith("tensorflow_datasets.core.features."):
                raise ValueError(f"{directory} has features of {untrusted.short(name)}, not TFDS's")
    try:
        return tfds.builder_from_directory(directory)
    except Exception as error:  # TFDS raises whatever it comes across
        said = parts.first_line(error)
        raise ValueError(f"{directory} is damaged ({said}); get it anew") from error


def _class_names(value: Any) -> Iterator[str]:
    for key in ("pythonClassName", "python_class_name", "type"):  # the last in old ones
        if isinstance(value, dict) and isinstance(value.get(key), str):
            yield value[key]
    for child in value.values() if isinstance(value, dict) else value:
        if isinstance(child, dict | list):
            yield from _class_names(child)


def _reader(name: str, feature: Any) -> Callable[[dict], Any] | None:
    """What takes a text, a class's name or a number from an example; None for anything else."""
    if isinstance(feature, tfds.features.ClassLabel):
        names = [*feature.names, ""]  # class -1 is an unknown one
        return lambda example: names[int(example[name])]
    if isinstance(feature, tfds.features.Text):
        return lambda example: example[name].decode("utf-8", "replace")
    if feature.shape == () and np.issubdtype(feature.np_dtype, np.number):
        return lambda example: np.asarray(example[name]).item()
    return None
