"""What a token is: text, image and video as ids of one vocabulary, in Emu3's order at any size.

    text ranks | <|endoftext|> <|im_start|> <|im_end|> | <|extra_0|> .. <|extra_204|>
    | <|image token|> <|image start|> <|image end|> | visual codes

With Qwen's 151,643 ranks and 32,768 codes these are Emu3's 184,622 ids exactly. An image is written

    boi "h*w" img (w codes EOL) x h EOF eoi

and a video the same with its frame rate and duration in the text and one EOF after each frame; h
and w count codes, not pixels. What may follow `img` is so known id by id: `legal_range`.

Legend: h rows, w columns, t latent frames of a grid of codes.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import tiktoken

from emu3_jax import bpe

EXTRAS = 205
EMU3_CODES = 32_768
_META = re.compile(r"([0-9]{1,6})\*([0-9]{1,6})(?: ([0-9.]{1,12})fps ([0-9.e+-]{1,12})s)?")
# tiktoken's regex engine aborts the process's call on a run of about half a million blanks.
_LONGEST_BLANK = 100_000

train_bpe = bpe.train
save_ranks = bpe.save


@dataclasses.dataclass(frozen=True)
class Ids:
    """Where the controls and the visual codes sit; `visual` is the id of code 0 of `codes`."""

    pad: int
    bos: int
    eos: int
    eol: int
    eof: int
    img: int
    boi: int
    eoi: int
    visual: int
    codes: int


@dataclasses.dataclass(frozen=True)
class Text:
    """A piece of a document: plain text."""

    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """A piece of a document: one image's codes."""

    codes_hw: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
    """A piece of a document: a clip's codes and its frame rate in pixel frames a second."""

    codes_thw: np.ndarray
    fps: float


def special_names(codes: int) -> list[str]:
    """Returns the strings of all ids after the text, in order (`codes` visual ones at the end)."""
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    extras = [f"<|extra_{i}|>" for i in range(EXTRAS)]
    image = ["<|image token|>", "<|image start|>", "<|image end|>"]
    return controls + extras + image + [f"<|visual token {code:06d}|>" for code in range(codes)]


def special_ids(text_size: int, codes: int) -> Ids:
    """Returns the layout after `text_size` text ids (Emu3: 151,643 and 32,768 codes)."""
    extra = text_size + 3
    image = extra + EXTRAS
    return Ids(
        pad=text_size,
        eol=extra + 200,
        eof=extra + 201,
        bos=extra + 203,
        eos=extra + 204,
        img=image,
        boi=image + 1,
        eoi=image + 2,
        visual=image + 3,
        codes=codes,
    )


class Vocab:
    """Text ranks, 211 specials and `codes` visual codes as one range of ids."""

    def __init__(self, ranks: dict[bytes, int], codes: int = EMU3_CODES):
        if not 1 <= codes <= 1_000_000:
            raise ValueError(f"a vocabulary of {codes} visual codes; use 1 to 1,000,000")
        self.ranks = ranks
        self.codes = codes
        self.text_size = len(ranks)
        self.names = special_names(codes)
        self.size = self.text_size + len(self.names)
        self.ids = special_ids(self.text_size, codes)
        self.pad, self.bos, self.eos = self.ids.pad, self.ids.bos, self.ids.eos
        self.eol, self.eof, self.img = self.ids.eol, self.ids.eof, self.ids.img
        self.boi, self.eoi, self.visual = self.ids.boi, self.ids.eoi, self.ids.visual
        self.fingerprint = _fingerprint(ranks, self.names)
        self._encoding = tiktoken.Encoding(
            "emu3",
            pat_str=bpe.SPLIT,
            mergeable_ranks=ranks,
            special_tokens={name: self.text_size + i for i, name in enumerate(self.names)},
        )

    @classmethod
    def load(
        cls, ranks_path: str | os.PathLike, codes: int = EMU3_CODES, sha256: str | None = None
    ) -> "Vocab":
        """Reads a ranks file in tiktoken's text format; ValueError if it is not `sha256`'s.

        The path "emu3" stands for Emu3's own vocabulary, whatever `codes`.
        """
        if ranks_path == "emu3":
            return cls.emu3()
        return cls(bpe.read(ranks_path, sha256), codes)

    @classmethod
    def emu3(cls, cache_dir: str | os.PathLike | None = None) -> "Vocab":
        """Emu3's own 184,622 ids; the ranks are fetched once into `cache_dir` and checked."""
        return cls.load(bpe.fetch_emu3(cache_dir), EMU3_CODES, bpe.EMU3_SHA256)

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """Returns the ids of `text`; special strings in it are plain text unless `specials`."""
        ids = []
        for chunk in _chunks(bpe.normalise(text)):
            if specials:
                ids += self._encoding.encode(chunk, allowed_special="all")
            else:
                ids += self._encoding.encode_ordinary(chunk)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`, special ids as their strings, broken UTF-8 as U+FFFD."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.size:
                raise ValueError(f"id {i} is outside the vocabulary of {self.size} ids")
        return self._encoding.decode(ids)

    def image_head(self, h: int, w: int) -> list[int]:
        """Returns the ids of an image before its codes, from boi to img."""
        return [self.boi, *self.encode(f"{h}*{w}"), self.img]

    def video_head(
        self, t: int, h: int, w: int, fps: float, temporal_factor: int = 4
    ) -> list[int]:
        """Returns the ids of a clip before its codes, from boi to img.

        `fps` counts pixel frames a second, of which `temporal_factor` make one latent frame. Emu3's
        paper says that the text in front tells resolution, frame rate and duration but not how;
        `h*w {fps}fps {seconds}s` is this project's choice.
        """
        if not 0.01 <= fps <= 1000:
            raise ValueError(f"a frame rate of {fps} frames a second; use 0.01 to 1000")
        seconds = t * temporal_factor / fps
        return [self.boi, *self.encode(f"{h}*{w} {fps:g}fps {seconds:g}s"), self.img]

    def frames(self, codes_thw: np.ndarray) -> np.ndarray:
        """Returns the ids of frames: EOL after each row, EOF after each frame."""
        codes_thw = self._checked(codes_thw, "thw")
        t, h, _ = codes_thw.shape
        rows_thw = np.concatenate(
            [self.visual + codes_thw, np.full((t, h, 1), self.eol)], axis=-1, dtype=np.int32
        )
        eof_t1 = np.full((t, 1), self.eof, np.int32)
        return np.concatenate([rows_thw.reshape(t, -1), eof_t1], axis=-1).ravel()

    def image_block(self, codes_hw: np.ndarray) -> np.ndarray:
        """Returns the ids of one image, from boi to eoi; codes in [0, codes)."""
        codes_hw = self._checked(codes_hw, "hw")
        return self._block(self.image_head(*codes_hw.shape), codes_hw[None])

    def video_block(
        self, codes_thw: np.ndarray, fps: float, temporal_factor: int = 4
    ) -> np.ndarray:
        """Returns the ids of one clip, from boi to eoi; see `video_head`."""
        codes_thw = self._checked(codes_thw, "thw")
        return self._block(
            self.video_head(*codes_thw.shape, fps, temporal_factor), codes_thw
        )

    def parse(self, ids: Sequence[int]) -> list[Text | Image | Video]:
        """Returns the pieces of a document in order; PAD, BOS and EOS only end a piece of text.

        ValueError names the position of a malformed block or of an id that belongs in one.
        """
        ids = np.asarray(ids, np.int64)
        inside = {self.eol, self.eof, self.img, self.eoi}
        pieces, text, at = [], [], 0
        while at < len(ids):
            i = int(ids[at])
            if i in inside or i >= self.visual:
                raise ValueError(
                    f"{self.decode([i])} at position {at} stands outside an image or video block"
                )
            if i not in (self.boi, self.pad, self.bos, self.eos):
                text.append(i)
                at += 1
                continue
            pieces += [Text(self.decode(text))] if text else []
            text = []
            if i == self.boi:
                piece, at = self._parse_block(ids, at)
                pieces.append(piece)
            else:
                at += 1
        return pieces + ([Text(self.decode(text))] if text else [])

    def _block(self, head: list[int], codes_thw: np.ndarray) -> np.ndarray:
        ends = np.array([self.eoi], np.int32)
        return np.concatenate([np.array(head, np.int32), self.frames(codes_thw), ends])

    def _checked(self, codes: np.ndarray, dims: str) -> np.ndarray:
        codes = np.asarray(codes)
        if codes.ndim != len(dims) or codes.size == 0 or not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(
                f"codes of shape {codes.shape} and type {codes.dtype} are no grid of codes; "
                f"give integers [{', '.join(dims)}], none of them empty"
            )
        if codes.min() < 0 or codes.max() >= self.codes:
            raise ValueError(
                f"codes from {codes.min()} to {codes.max()} do not fit this vocabulary's "
                f"{self.codes} codes; use the tokenizer it was made for"
            )
        return codes.astype(np.int32)

    def _parse_block(self, ids: np.ndarray, start: int) -> tuple[Image | Video, int]:
        """Returns the block whose boi is at `start`, and the position after its eoi."""

        def malformed(reason: str) -> ValueError:
            return ValueError(f"malformed image or video block at position {start}: {reason}")

        ends = np.flatnonzero(ids[start:] == self.eoi)
        if not len(ends):
            raise malformed("no <|image end|> follows")
        block = ids[start + 1 : start + ends[0]]
        heads = np.flatnonzero(block == self.img)
        if not len(heads):
            raise malformed("no <|image token|> follows")
        head, body = block[: heads[0]], block[heads[0] + 1 :]
        meta = self.decode(head) if len(head) <= 64 else "too long"
        match = _META.fullmatch(meta)
        h, w = (int(match[1]), int(match[2])) if match else (0, 0)
        if h * w == 0:
            raise malformed(f"its size reads {meta!r}, not 'h*w' or 'h*w Ffps Ss'")
        length = h * (w + 1) + 1
        t = len(body) // length
        if len(body) != max(t, 1) * length or (t != 1 and match[3] is None):
            raise malformed(f"{len(body)} ids from img to eoi; a frame of {h}*{w} takes {length}")
        frames = body.reshape(t, length)
        rows_thw = frames[:, :-1].reshape(t, h, w + 1)
        codes_thw = rows_thw[..., :-1] - self.visual
        if (frames[:, -1] != self.eof).any() or (rows_thw[..., -1] != self.eol).any():
            raise malformed(f"row ends or frame ends are not where {h}*{w} puts them")
        if codes_thw.min() < 0 or codes_thw.max() >= self.codes:
            raise malformed("an id among its codes is no visual code")
        codes_thw = codes_thw.astype(np.int32)
        after = start + int(ends[0]) + 1
        if match[3] is None:
            return Image(codes_thw[0]), after
        try:
            return Video(codes_thw, float(match[3])), after
        except ValueError:
            raise malformed(f"its frame rate reads {match[3]!r}") from None


def legal_range(ids: Ids, offset: Any, height: Any, width: Any, frames: Any = 1) -> tuple[Any, Any]:
    """Returns (lo, hi): the ids in [lo, hi) may stand `offset` >= 1 positions after the img id.

    Each of `frames` frames has `height` rows of `width` codes and an EOL, then an EOF; after the
    last come eoi, EOS and PAD for ever. Arguments are ints or traced integer arrays. (Counted from
    the end of the rows, unlike Emu3's own rule, which is wrong for widths of 1 and 2.)
    """
    row = width + 1
    frame = height * row + 1
    index = offset - 1
    after = index - frames * frame
    place = index % frame
    cases = [
        (after == 0, ids.eoi),
        (after == 1, ids.eos),
        (after > 1, ids.pad),
        (place == frame - 1, ids.eof),
        (place % row == width, ids.eol),
    ]
    low, high = ids.visual, ids.visual + ids.codes
    for condition, control in reversed(cases):
        low = _where(condition, control, low)
        high = _where(condition, control + 1, high)
    return low, high


def _where(condition: Any, value: Any, otherwise: Any) -> Any:
    if isinstance(condition, bool | np.bool_):
        return value if condition else otherwise
    return jnp.where(condition, value, otherwise)


def _chunks(text: str) -> list[str]:
    """Cuts `text` inside runs of blanks that the regex engine cannot take; else leaves it whole."""
    if len(text) <= _LONGEST_BLANK:
        return [text]
    cuts = [0]
    for run in re.finditer(r"\s+", text):
        cuts += range(run.start() + _LONGEST_BLANK, run.end(), _LONGEST_BLANK)
    cuts.append(len(text))
    return [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


def _fingerprint(ranks: dict[bytes, int], names: list[str]) -> str:
    """sha256 over everything that decides an id: the cutting rule, the ranks, the specials."""
    digest = hashlib.sha256(f"NFC {bpe.SPLIT}\n".encode())
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d %s\n" % (rank, token.hex().encode()))
    digest.update("\n".join(names).encode())
    return digest.hexdigest()
