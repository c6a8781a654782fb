"""Can what part.json and store.json say be so? They are as little trusted as any file.

Nothing that follows from them takes more memory than a few times the files of the store: counts
have bytes behind them, shapes add up, and files lie in their part.
"""

import pathlib
from collections.abc import Collection

from emu3_jax import untrusted

MOST_PARTS = 100_000  # their names have five digits
_COUNTS = ("documents", "codes", "text_tokens", "conversations", "skipped")
_TEXTS = ("vocabulary", "tokenizer", "dtype", "video")


def check_part(path: pathlib.Path, info: dict, columns: Collection[str]) -> None:
    """ValueError for a part.json of `path`, a part with these columns, that cannot be so."""
    untrusted.check(info, dict.fromkeys((*_COUNTS, "turns"), untrusted.count))
    untrusted.check(info, dict.fromkeys((*_TEXTS, "source"), untrusted.text))
    untrusted.check(info, dict.fromkeys(("dropped", "files"), untrusted.counts_by_name))
    untrusted.check(info, dict(crc32c=untrusted.mapping))
    if info["crc32c"].keys() != set(columns):
        raise ValueError(f"crc32c is not of the columns {', '.join(columns)}")
    for name in info["files"]:
        untrusted.below(path, name)
        if name.partition("/")[0] not in columns:
            raise ValueError(f"file {untrusted.short(name)} is of no column")
    if info["documents"] > column_bytes(info, "keys"):  # each has one, at least
        raise ValueError(
            f"{info['documents']} documents have keys of {column_bytes(info, 'keys')} bytes"
        )
    _check_shapes(info)


def check_store(info: dict) -> None:
    """ValueError for a store.json that cannot be so."""
    untrusted.check(info, dict.fromkeys((*_COUNTS, "parts"), untrusted.count))
    untrusted.check(info, dict.fromkeys((*_TEXTS, "read_from", "licence"), untrusted.text))
    untrusted.check(info, dict(dropped=untrusted.counts_by_name))
    if not 1 <= info["parts"] <= MOST_PARTS:
        raise ValueError(f"parts is {info['parts']}, which is none of 1 to {MOST_PARTS}")


def column_bytes(info: dict, column: str) -> int:
    """How many bytes the files of a column have, all in all."""
    return sum(size for name, size in info["files"].items() if name.startswith(f"{column}/"))


def _check_shapes(info: dict) -> None:
    if not isinstance(info.get("shapes"), list):
        raise ValueError("shapes are no list")
    documents = codes = 0
    for shape in info["shapes"]:
        if not isinstance(shape, list) or len(shape) != 5:
            raise ValueError(f"shape {untrusted.short(shape)} is not (t, h, w, fps, documents)")
        t, h, w, fps, count = shape
        if not untrusted.counts([t, h, w, count]) or not untrusted.number(fps) or fps < 0:
            raise ValueError(f"shape {untrusted.short(shape)} is not (t, h, w, fps, documents)")
        documents, codes = documents + count, codes + t * h * w * count
    if (documents, codes) != (info["documents"], info["codes"]):
        raise ValueError(
            f"shapes have {documents} documents and {codes} codes; documents is "
            f"{info['documents']}, codes {info['codes']}"
        )
