"""Where the files of a tar lie, read off its headers.

tarfile would allocate what a header promises, follow sizes backwards without end, and recurse into
headers about headers. Here nothing but names, places and sizes of ordinary files is looked at: no
links, no devices, no sparse files.
"""

import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

LONGEST = 2**20  # bytes of a long name, or of a header of pax
_BLOCK = tarfile.BLOCKSIZE
_FURTHEST = 2**60  # bytes into a tar
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_ABOUT_NEXT = (*_PAX, tarfile.GNUTYPE_LONGNAME)
_ABOUT = (*_ABOUT_NEXT, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE)
_RECORD = re.compile(rb"([0-9]{1,9}) ([^=]+)=")


def files(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Yields name, first byte and length of each file; what is no UTF-8 in a name as U+FFFD.

    Raises tarfile.ReadError, whose message goes on after "is", for no tar or one that is damaged or
    cut short: a whole one ends with a block of zeros. `file` is sought and read forwards alone, so
    it may be compressed.
    """
    at, about = 0, {}
    while True:
        file.seek(at)
        try:
            info = tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "replace")
            if info.type in _ABOUT:
                size, found = info.size, {}
            else:
                size, found, about = about.get("size", info.size), about, {}
            if not 0 <= size < _FURTHEST - at or info.type == tarfile.GNUTYPE_SPARSE:
                raise tarfile.HeaderError(f"{size} bytes of type {info.type!r}")
            if info.type in _ABOUT_NEXT:
                about |= _about(info, file)
        except tarfile.EOFHeaderError:
            return
        except tarfile.HeaderError as error:
            what = f"damaged or cut short at byte {at}" if at else f"no tar, or cut short ({error})"
            raise tarfile.ReadError(what) from None
        at += _BLOCK
        if info.isreg() and "sparse" not in found:
            yield found.get("path", info.name), at, size
        if info.isreg() or info.type not in tarfile.SUPPORTED_TYPES or info.type in _ABOUT:
            at += -(-size // _BLOCK) * _BLOCK  # links, folders and devices have no data


def _about(info: tarfile.TarInfo, file: BinaryIO) -> dict[str, Any]:
    """What a header says of the next one: its `path` and `size`, and whether it is `sparse`."""
    if info.size > LONGEST:
        raise tarfile.HeaderError(f"a name or header of {info.size} bytes")
    data, at, found = file.read(info.size), 0, {}
    if info.type not in _PAX:
        return {"path": data.partition(b"\0")[0].decode("utf-8", "replace")}
    while record := _RECORD.match(data, at):
        begin, at = record.end(), at + int(record[1])
        if at < begin:
            break
        value = data[begin : at - 1]
        if record[2] == b"path":
            found["path"] = value.decode("utf-8", "replace")
        elif record[2] == b"size":
            if not re.fullmatch(rb"[0-9]{1,20}", value):
                raise tarfile.HeaderError(f"a size of {value[:20]!r}")
            found["size"] = int(value)
        elif record[2].startswith(b"GNU.sparse"):
            found["sparse"] = True
    if data[at:].strip(b"\0"):
        raise tarfile.HeaderError("a header of pax that is none")
    return found
