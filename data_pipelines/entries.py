"""What a source says of its records without decoding any; directories of files with captions.

The captions are in a list, JSON lines or CSV with the columns `file` and `caption` (and any
others), files relative to the directory. Without a list, every file of a kind in the directory and
below is a record, and its caption is in NAME.txt beside it.
"""

import csv
import dataclasses
import io
import pathlib
from typing import Any, BinaryIO

from emu3_jax import untrusted

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
LONGEST = 1 << 24  # bytes of a file with a caption, or with a record's JSON
_KINDS = {"image": IMAGES, "video": VIDEOS}


class BadFile(ValueError):
    """A file of a source that cannot be used; the message names it."""


@dataclasses.dataclass
class Entry:
    """A record, undecoded. `key` names it within its source and ends as a file of its kind does.

    `columns` are all else that the source holds for it, numbers or strings by name. BadFile for a
    key or caption that a store cannot hold.
    """

    key: str
    caption: str = ""
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not untrusted.text(self.key) or "\n" in self.key:
            raise BadFile(f"{self.key!r} is no key: want text in one line")
        if not untrusted.text(self.caption):
            raise BadFile(f"{self.key}: caption {untrusted.short(self.caption)} is no text")


def is_image(name: str) -> bool:
    """Whether a file is one, by its name."""
    return name.lower().endswith(IMAGES)


def is_video(name: str) -> bool:
    """Whether a file is one, by its name."""
    return name.lower().endswith(VIDEOS)


def file_name(file: pathlib.Path | BinaryIO) -> str:
    """What errors call a file of a source: its path, or the `name` of one that is open."""
    return str(file) if isinstance(file, pathlib.Path) else file.name


class Folder:
    """Files of a directory, of a `kind` (image, video) if no list names them.

    `entries` are the list's lines as dictionaries, or {"file": NAME} in the order of the names.
    """

    def __init__(self, directory: str, list: str = "captions.jsonl", kind: str = "image"):
        """Raises ValueError for a missing directory or list, an empty one or one without `file`."""
        self.directory, self._listed = pathlib.Path(directory), bool(list)
        if list:
            self.entries = read_list(self.directory / list, kind)
        else:
            self.entries = [{"file": name} for name in _find(self.directory, kind)]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def has_videos(self) -> bool:
        """Whether any of the files is one, by its name."""
        return any(is_video(entry["file"]) for entry in self.entries)

    def entry(self, index: int) -> Entry:
        """What is known of a record. A sidecar that is missing is an empty caption."""
        columns = dict(self.entries[index])
        key, caption = columns.pop("file"), columns.pop("caption", "")
        return Entry(key, caption if self._listed else _sidecar(self.directory / key), columns)

    def file(self, index: int) -> pathlib.Path:
        """Where a record lies."""
        return self.directory / self.entries[index]["file"]


def read_list(path: pathlib.Path, kind: str = "image") -> list[dict]:
    """The entries of a .jsonl or .csv list of images; ValueError names what is wrong with it."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; write a list with the columns file and caption")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 ({error.reason} at byte {error.start})") from None
    if path.suffix == ".csv":
        entries = _parse_csv(path, text)
    else:
        entries = [_parse(path, i, line) for i, line in enumerate(text.split("\n")) if line]
    if not entries:
        raise ValueError(f"{path} lists no {kind}s; write one {kind} a line")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or "file" not in entry:
            said = untrusted.short(entry)
            raise ValueError(f"{path}, entry {i + 1} has no column 'file'; it reads {said}")
        try:
            untrusted.below(path.parent, entry["file"])
        except ValueError as error:
            raise ValueError(f"{path}, entry {i + 1}: file {error}") from None
    return entries


def _parse(path: pathlib.Path, index: int, line: str) -> dict:
    try:
        return untrusted.parse(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {index + 1} is no JSON: {error}") from error


def _parse_csv(path: pathlib.Path, text: str) -> list[dict]:
    lines = csv.DictReader(io.StringIO(text, newline=""), restkey="", restval="")
    try:
        return list(lines)
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num} is no CSV: {error}") from error


def _find(directory: pathlib.Path, kind: str) -> list[str]:
    """The files of a kind in a directory and below, in the order of their names."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory; give the one that holds the {kind}s")
    endings = _KINDS[kind]
    names = [
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.name.lower().endswith(endings) and not path.name.startswith(".")
    ]
    if not names:
        raise ValueError(f"{directory} holds no {kind}s ({' '.join(endings)})")
    return sorted(names)


def _sidecar(path: pathlib.Path) -> str:
    try:
        with path.with_suffix(".txt").open(encoding="utf-8", errors="replace") as file:
            text = file.read(LONGEST + 1)
    except FileNotFoundError:
        return ""
    if len(text) > LONGEST:
        raise BadFile(f"{path}: its caption is longer than {LONGEST} characters")
    return text.strip()
