"""Which records of a source are left out on purpose, and why.

Emu3's images (arXiv 2409.18869, section 2.1: none under 512 x 512 pixels; an aesthetic score of at
least 5.5, or else little text and more than one colour) are

    Filters(least_side=512, columns=(Column("aesthetic", least=5.5, rescue=(
        Column("text_area", most=T), Column("colourfulness", least=C))),))

with T and C of one's own, as the paper tells neither. What needs a model (a score, the area of
text, optical flow) is no business of this file: the model's numbers are columns of the source.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib

from data_pipelines import entries, image_folder
from emu3_jax import untrusted


@dataclasses.dataclass
class Column:
    """A range, ends included, that a column of the source must lie in.

    A record outside of it is kept all the same if it lies in each range of `rescue`, the columns
    of which need no value for other records.
    """

    name: str
    least: float = -math.inf
    most: float = math.inf
    rescue: tuple["Column", ...] = ()

    def check(self) -> None:
        """ValueError for a range that is empty or leaves out nothing."""
        if not self.least <= self.most:
            raise ValueError(
                f"column {self.name}: least {self.least} is above most {self.most}; exchange them"
            )
        if self.least == -math.inf and self.most == math.inf:
            raise ValueError(f"column {self.name} has neither least nor most; set one")
        for column in self.rescue:
            column.check()

    def keeps(self, entry: entries.Entry) -> bool:
        """Whether a record stays; BadFile if it has no number there."""
        if self.least <= self._number(entry) <= self.most:
            return True
        return bool(self.rescue) and all(column.keeps(entry) for column in self.rescue)

    def _number(self, entry: entries.Entry) -> float:
        if self.name not in entry.columns:
            has = ", ".join(entry.columns) or "none"
            raise image_folder.BadFile(f"{entry.key}: no column {self.name!r}; it has {has}")
        value = entry.columns[self.name]
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isnan(number):
            raise image_folder.BadFile(
                f"{entry.key}: column {self.name!r} is {value!r}, which is no number"
            )
        return number


@dataclasses.dataclass
class Filters:
    """What a record must be to stay; as it is, all do.

    least_side      pixels of the shorter side
    least_pixels    height times width
    widest          longer side to shorter side, at most; 0: any
    least_caption, most_caption   characters; most 0: any
    columns         ranges of the source's own columns. A record without a number there is bad
                    rather than left out: it counts towards Encode's max_bad
    duplicates      file of keys to leave out, as job Duplicates writes it; "": none
    """

    least_side: int = 0
    least_pixels: int = 0
    widest: float = 0.0
    least_caption: int = 0
    most_caption: int = 0
    columns: tuple[Column, ...] = ()
    duplicates: str = ""

    def check(self) -> None:
        """ValueError for settings that nothing passes or that say nothing, for a missing file."""
        negative = [f"{name} {value}" for name, value in vars(self).items()
                    if isinstance(value, int | float) and value < 0]  # fmt: skip
        if negative:
            raise ValueError(f"filters: {negative[0]} is negative; 0 turns it off")
        if 0 < self.widest < 1:
            raise ValueError(
                f"filters: widest {self.widest:g} is longer to shorter side, so it is 1 or more"
            )
        if 0 < self.most_caption < self.least_caption:
            raise ValueError(
                f"filters: least_caption {self.least_caption} is above most_caption "
                f"{self.most_caption}; exchange them"
            )
        for column in self.columns:
            column.check()
        _ = self._left_out  # reads the file

    def reason(self, entry: entries.Entry, height: int, width: int) -> str:
        """Why a record of so many pixels is left out, the first reason of several; "" if it stays.

        "duplicate", "caption", "resolution", "aspect" or "column NAME". Raises BadFile, naming
        record and column, where there is no number to compare.
        """
        long, short = max(height, width), min(height, width)
        if entry.key in self._left_out:
            return "duplicate"
        most_caption = self.most_caption or math.inf
        if not self.least_caption <= len(entry.caption) <= most_caption:
            return "caption"
        if short < self.least_side or height * width < self.least_pixels:
            return "resolution"
        if self.widest and long > self.widest * short:
            return "aspect"
        for column in self.columns:
            if not column.keeps(entry):
                return f"column {column.name}"
        return ""

    def fingerprint(self) -> str:
        """A hash of all that decides: settings, and what the file holds. "" if all are off."""
        if self == Filters():
            return ""
        settings = dataclasses.asdict(self) | {"duplicates": bool(self.duplicates)}
        made = hashlib.sha256(json.dumps(settings).encode())
        if self.duplicates:
            made.update(pathlib.Path(self.duplicates).read_bytes())
        return made.hexdigest()

    @functools.cached_property
    def _left_out(self) -> frozenset[str]:
        return read_keys(pathlib.Path(self.duplicates)) if self.duplicates else frozenset()


def read_keys(path: pathlib.Path) -> frozenset[str]:
    """The keys in a file of duplicates; ValueError if there is none, or no keys in its lines."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; run configs/duplicates.py, or set no duplicates")
    keys = set()
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            keys.add(untrusted.parse(line)["key"])
        except (ValueError, KeyError, TypeError):
            shown = line[:80].decode("utf-8", "replace")
            raise ValueError(f'{path}, line {number} is not {{"key": ...}}: {shown}') from None
    return frozenset(keys)
