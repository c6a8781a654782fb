"""Images and videos become a token store: read, resized as Emu3 does, encoded, part by part.

They come from any source (sources.py), videos whole or by scenes, less what filters leave out.
Every process writes parts of its own and needs no other. A part is planned (plan.py), read ahead by
threads (reader.py) and encoded on the devices of the process (encoder.py), which get a batch before
the codes of the one before are fetched. What a part holds follows from the source and the
configuration, not from when it was made or after how many interruptions.

Legend: B images of a batch, T frames, H rows, W columns, C colours of pixels; t h w the grid of
codes.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, Protocol

import numpy as np

from data_pipelines import (
    chat,
    encoder,
    image_folder,
    parts,
    plan,
    progress,
    reader,
    scenes,
    sources,
    store,
)
from data_pipelines.filters import Filters
from emu3_jax import vocab as vocabulary
from tokenizer import convert

_WAIT = 2.0  # seconds between two looks at whether the other processes are done


@dataclasses.dataclass
class Encode:
    """Job: encodes the images and videos of a source, with their captions, into a token store.

    source            a dataclass of sources.py; videos are told by the names of their files
    filters           what is left out, and counted by reason in the store
    tokenizer, dtype  a directory that tokenizer.convert.load reads, and what to compute in
    vocab, codes      ranks file of the captions ("emu3": Emu3's) and number of visual codes
    conversation      the column that holds a conversation about each image or video (chat.py says
                      in which forms), which is stored in place of the caption; "": there is none
    directory         the store
    tokens            visual codes that a device encodes at once; memory grows with them. An image
                      of 512x512 pixels has 4,096
    parts             of the store; complete ones are skipped, so an interrupted job goes on
    worker, workers   this process writes parts worker, worker + workers, ...; with workers 0, these
                      are its number in a run of several processes and their count
    min_pixels, max_pixels, factor   images are resized to an area in this range, both sides to
                      multiples of `factor`, the tokenizer's pixels a code
    aspects, area     0, 0: every image keeps its shape, as Emu3 has it; else see plan.Sizes
    fps, seconds      frames a second that videos are read at and how much of them (0: all)
    clip_seconds      least and most seconds of a clip: each video becomes as many documents as it
                      has pieces of that length that no cut crosses (scenes.py), NAME#START each,
                      and `seconds` is not used. (0, 0): one document a video
    video             "clips": each 4 frames by themselves, as Emu3's script has it, or "stream"
    max_bad           how many bad files a part may skip; each is named on stderr and counted
    licence           of the images, for store.json
    """

    source: Any = dataclasses.field(default_factory=sources.Images)
    filters: Filters = dataclasses.field(default_factory=Filters)
    tokenizer: str = "runs/tokenizer"
    dtype: str = "float32"
    vocab: str = "emu3"
    codes: int = 32768
    conversation: str = ""
    directory: str = "runs/store"
    tokens: int = 4096
    parts: int = 1
    worker: int = 0
    workers: int = 0
    min_pixels: int = 512 * 512
    max_pixels: int = 1024 * 1024
    factor: int = 8
    aspects: int = 0
    area: int = 0
    fps: float = 24.0
    seconds: float = 5.0
    clip_seconds: tuple[float, float] = (0.0, 0.0)
    video: str = "clips"
    max_bad: int = 100
    licence: str = ""

    @property
    def sizes(self) -> plan.Sizes:
        """The sizes of what is encoded."""
        return plan.Sizes(self.min_pixels, self.max_pixels, self.factor, self.aspects, self.area)

    def pieces(self, file: pathlib.Path | BinaryIO) -> list[tuple[float, float]]:
        """(start, seconds) of what is taken of a video."""
        if any(self.clip_seconds):
            return scenes.clips(file, self.fps, *self.clip_seconds)
        return [(0.0, self.seconds)]

    def check(self) -> None:
        """ValueError for settings that cannot be."""
        self.sizes.check()
        self.filters.check()
        least, most = self.clip_seconds
        if not 0 <= least <= most:
            raise ValueError(
                f"clip_seconds {least:g} to {most:g}: want least and most, or 0 and 0 for whole "
                "videos"
            )

    def run(self) -> None:
        """Writes the missing parts of this process, and waits for those of the run's others.

        A part that was interrupted is begun again, so it is all that can be lost.
        """
        vq = convert.load(self.tokenizer, dtype=self.dtype)
        if vq.config.spatial_factor != self.factor:
            raise ValueError(
                f"factor is {self.factor}, but {self.tokenizer} has {vq.config.spatial_factor} "
                "pixels a code; set factor to that"
            )
        tokenizer = encoder.Encoder(vq, self.tokens, self.video)
        vocab = vocabulary.Vocab.load(self.vocab, self.codes)
        complete = encode(self, tokenizer, convert.fingerprint(vq), vocab)
        while not complete and not self.workers:
            time.sleep(_WAIT)  # JAX ends a run's processes soon after the first one has left
            complete = _finish(self)


class Encoder(Protocol):
    """What is needed of a tokenizer, see encoder.Encoder. Its results wait for the codes."""

    def batch(self, height: int, width: int) -> int:
        """How many images of a size are encoded together."""

    def images(self, x_BHWC: np.ndarray) -> Callable[[], np.ndarray]:
        """uint8 pixels to codes_Bthw, t = 1."""

    def video(self, x_THWC: np.ndarray) -> Callable[[], np.ndarray]:
        """uint8 pixels to codes_Bthw, B = 1."""


def encode(config: Encode, tokenizer: Encoder, fingerprint: str, vocab: vocabulary.Vocab) -> bool:
    """What `Encode.run` does with a tokenizer and a vocabulary in memory; is the store complete?

    Raises StoreError if the store holds parts of another tokenizer, vocabulary, source, dtype or
    video mode, ValueError for a source or filters that cannot be, for too many bad files.
    """
    config.check()
    source = config.source.open()
    if not 1 <= config.parts <= len(source):
        raise ValueError(f"{config.parts} parts for {len(source)} files; take 1 to {len(source)}")
    work = _Work(config, source, tokenizer, vocab)
    mine = parts.mine(config.parts, config.worker, config.workers)
    made_with = {part: work.made_with(part, fingerprint) for part in mine}
    paths = {part: store.part_path(config.directory, part, config.parts) for part in made_with}
    missing = [part for part in paths if not parts.is_complete(paths[part], made_with[part])]
    if not missing:
        print(f"{config.directory}: encoded ({len(paths)} of {config.parts} parts here)")
    shown = progress.Progress(config.directory, sum(len(work.members(part)) for part in missing))
    for part in missing:
        bad = progress.Bad(config.source.name, config.max_bad, shown)
        documents, dropped = work.documents(part, bad, shown)
        parts.write(paths[part], documents, made_with[part], len(bad.messages), dropped)
        counts = {"bad skipped": len(bad.messages), "left out": sum(dropped.values())}
        rest = "".join(f", {count} {what}" for what, count in counts.items() if count)
        print(f"{paths[part]}: {len(documents)} documents{rest}", flush=True)
    return _finish(config)


def _finish(config: Encode) -> bool:
    return store.finish(config.directory, config.parts, config.source.name, config.licence)


@dataclasses.dataclass
class _Work:
    """All that the parts of a store are made of."""

    config: Encode
    source: sources.Source
    tokenizer: Encoder
    vocab: vocabulary.Vocab

    def members(self, part: int) -> range:
        """The records of a part: a contiguous stretch of the source."""
        return parts.members(len(self.source), part, self.config.parts)

    def made_with(self, part: int, fingerprint: str) -> store.Fingerprints:
        """As whose work a part counts; `source` is its records by name, captions, filters and
        resizing."""
        config = self.config
        settings = [config.min_pixels, config.max_pixels, config.factor, config.aspects]
        settings += [config.area] if config.area else []
        if self.source.has_videos:
            clips = config.clip_seconds
            settings += [config.fps, *clips] if any(clips) else [config.fps, config.seconds]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            said = list(pool.map(self._said, self.members(part)))
        if config.filters != Filters():
            settings.append(config.filters.fingerprint())
        source = hashlib.sha256(json.dumps([settings, said]).encode()).hexdigest()
        video = config.video if self.source.has_videos else ""
        return store.Fingerprints(self.vocab.fingerprint, fingerprint, source, config.dtype, video)

    def _said(self, member: int) -> list | None:
        """What decides about a record apart from its pixels."""
        try:
            entry = self.source.entry(member)
        except image_folder.BadFile:
            return None
        columns = [entry.columns] if self.config.filters.columns else []
        if self.config.conversation:
            columns.append(entry.columns.get(self.config.conversation))
        return [entry.key, entry.caption, *columns]

    def documents(
        self, part: int, bad: progress.Bad, shown: progress.Progress
    ) -> tuple[list[store.Document], dict[str, int]]:
        """The documents of a part, in the order of the source, and how many were left out why."""
        config, name = self.config, parts.part_name(part, self.config.parts)
        planner = plan.Planner(
            self.source, config.sizes, self.tokenizer.batch, config.pieces, config.filters
        )
        planned = planner.plan(self.members(part))
        shown.plan(name, planned, len(self.members(part)), self.tokenizer.batch)
        for error in planned.bad:
            bad.add(error)
        read = reader.Reader(self.source, config.sizes, config.fps).read(planned.batches)
        documents = {}
        for usable, codes in _one_behind(self._start(read, bad)):
            for place, codes_thw in zip(usable, codes(), strict=True):
                try:
                    documents[place] = self._document(*place, usable[place], codes_thw)
                    shown.add(1, codes_thw.size)
                except image_folder.BadFile as error:
                    bad.add(error)
        return [documents[place] for place in sorted(documents)], planned.dropped

    def _start(self, read: Iterable, bad: progress.Bad) -> Iterator[tuple[dict, Callable]]:
        """Each batch: what is usable by record and start, and what waits for its codes, begun."""
        for batch, loaded in read:
            usable = {}
            for member, item in zip(batch.members, loaded, strict=True):
                if isinstance(item, image_folder.BadFile):
                    bad.add(item)
                else:
                    usable[member, batch.start] = item
            if usable and batch.size:
                yield usable, self.tokenizer.images(np.stack(list(usable.values())))
            elif usable:
                yield usable, self.tokenizer.video(*(item.x_THWC for item in usable.values()))

    def _document(
        self, member: int, start: float, item: np.ndarray | reader.Frames, codes_thw: np.ndarray
    ) -> store.Document:
        entry = self.source.entry(member)
        if codes_thw.max() >= self.vocab.codes:
            raise ValueError(
                f"{entry.key}: code {codes_thw.max()} does not fit a vocabulary of "
                f"{self.vocab.codes} codes; set codes to the tokenizer's codebook size"
            )
        text, turns = self._text(entry)
        if not isinstance(item, reader.Frames):
            return store.Document(entry.key, text, codes_thw, turns=turns)
        key = f"{entry.key}#{start:.3f}" if any(self.config.clip_seconds) else entry.key
        return store.Document(key, text, codes_thw, item.fps, len(item.x_THWC), turns)

    def _text(self, entry: sources.Entry) -> tuple[np.ndarray, np.ndarray | None]:
        """The ids of a caption, or those of a conversation and the lengths of its pieces."""
        column = self.config.conversation
        if not column:
            return np.array(self.vocab.encode(entry.caption), np.uint32), None
        if column not in entry.columns:
            raise image_folder.BadFile(f"{entry.key}: no column {column!r}")
        try:
            return chat.conversation(entry.columns[column], self.vocab, image=True)
        except chat.BadConversation as error:
            raise image_folder.BadFile(f"{entry.key}: {error}") from error


def _one_behind(items: Iterable) -> Iterator:
    """The items, each once the one after it is there."""
    last = []
    for item in items:
        yield from last
        last = [item]
    yield from last
