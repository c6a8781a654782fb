"""Sources of records, and what a configuration holds of one: where it is.

`open()` of a configuration reads what tells the records apart: a list, names, headers. Keys and
captions come without decoding, pixels when they are asked for.
"""

import dataclasses
import pathlib
from typing import BinaryIO, Protocol

from data_pipelines import entries, image_folder, video_folder

Entry = entries.Entry


class Source(Protocol):
    """An opened source: records by number, the same on every host."""

    has_videos: bool

    def __len__(self) -> int:
        """How many records there are."""

    def __getitem__(self, index: int) -> image_folder.Record | video_folder.Video:
        """A record, its image decoded; raises image_folder.BadFile."""

    def entry(self, index: int) -> Entry:
        """What the source says of a record, undecoded; raises image_folder.BadFile."""

    def file(self, index: int) -> pathlib.Path | BinaryIO:
        """What PIL or PyAV can open; an open file has a `name` for errors. Raises BadFile."""


class Opens(Protocol):
    """What a configuration holds of a source; a dataclass."""

    name: str

    def open(self) -> Source:
        """Raises ValueError if there is no such source."""


def read(source: Source, index: int) -> image_folder.Record | video_folder.Video:
    """The record of a source of images and videos, by its entry and its file."""
    entry, file = source.entry(index), source.file(index)
    if entries.is_video(entry.key):
        return video_folder.open_video(entry, file)
    return image_folder.Record(entry.key, image_folder.read_image(file), entry.caption)


@dataclasses.dataclass
class Images:
    """Files of a directory, with the captions of a list, JSON lines or CSV with the columns `file`
    and `caption`; an empty `list` takes every image in it and below, captions from NAME.txt."""

    directory: str = "runs/images"
    list: str = "captions.jsonl"

    @property
    def name(self) -> str:
        """What messages and stores call it."""
        return str(pathlib.Path(self.directory, self.list))

    def open(self) -> image_folder.ImageFolder:
        """ValueError for a missing or unusable list or directory."""
        return image_folder.ImageFolder(self.directory, self.list)


@dataclasses.dataclass
class Videos:
    """The same of videos."""

    directory: str = "runs/videos"
    list: str = "captions.jsonl"

    @property
    def name(self) -> str:
        """What messages and stores call it."""
        return str(pathlib.Path(self.directory, self.list))

    def open(self) -> video_folder.VideoFolder:
        """ValueError for a missing or unusable list or directory."""
        return video_folder.VideoFolder(self.directory, self.list)


@dataclasses.dataclass
class Tfds:
    """A split, or a part as "train[:100]", of a data set prepared by TensorFlow Datasets.

    `directory` is that of one version, with dataset_info.json. `image` and `caption` are features,
    the latter a text or a class, whose name is then the caption; "": no captions.
    """

    directory: str = "runs/tfds"
    split: str = "validation"
    image: str = "image"
    caption: str = ""

    @property
    def name(self) -> str:
        """What messages and stores call it."""
        return f"{self.directory} {self.split}"

    def open(self) -> Source:
        """ValueError for a directory, split or feature that cannot be used."""
        from data_pipelines import tfds_images  # TFDS takes seconds to import

        return tfds_images.TfdsImages(self.directory, self.split, self.image, self.caption)


@dataclasses.dataclass
class WebDataset:
    """Tar files of images and videos with captions: see webdataset.py.

    `shards` is a directory of .tar files or a pattern, as "data/train-*.tar".
    """

    shards: str = "runs/shards"

    @property
    def name(self) -> str:
        """What messages and stores call it."""
        return self.shards

    def open(self) -> Source:
        """ValueError for a pattern without files, for a file that is damaged or no tar."""
        from data_pipelines import webdataset  # it imports this file

        return webdataset.WebDataset(self.shards)


@dataclasses.dataclass
class Parquet:
    """Parquet files with images, or videos, in a column: see parquet.py.

    `files` is a directory of .parquet files or a pattern. `image` holds bytes, or Hugging Face's
    structure of `bytes` and `path`; `caption` and `key` are columns of strings. Without a caption
    ("") there is none; without a key, FILE/ROW is the key, and all are images.
    """

    files: str = "runs/parquet"
    image: str = "image"
    caption: str = "caption"
    key: str = ""

    @property
    def name(self) -> str:
        """What messages and stores call it."""
        return self.files

    def open(self) -> Source:
        """ValueError for a pattern without files, a file or a column that cannot be used."""
        from data_pipelines import parquet  # it imports this file

        return parquet.Parquet(self.files, self.image, self.caption, self.key)


def match(pattern: str, ending: str) -> list[pathlib.Path]:
    """The files of a directory with an ending, or those of a pattern, in the order of names.

    Raises ValueError if there are none.
    """
    path = pathlib.Path(pattern)
    if path.is_dir():
        path = path / f"*{ending}"
    found = sorted(pathlib.Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    if not found:
        raise ValueError(f"{path} matches no file; give a directory of {ending} files or a pattern")
    return found
