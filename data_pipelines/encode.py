"""Images and videos become a token store: read, resized as Emu3 does, encoded, part by part.

Every process writes parts of its own and needs no other. A part is planned (plan.py), read ahead by
threads (reader.py) and encoded on the devices of the process (encoder.py), which get a batch before
the codes of the one before are fetched. What a part holds follows from the list, the files and the
configuration, not from when it was made or after how many interruptions.

Legend: B images of a batch, T frames, H rows, W columns, C colours of pixels; t h w the grid of
codes.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import jax
import numpy as np

from data_pipelines import encoder, image_folder, parts, plan, reader, store
from emu3_jax import metrics
from emu3_jax import vocab as vocabulary
from tokenizer import convert

_WAIT = 2.0  # seconds between two looks at whether the other processes are done


@dataclasses.dataclass
class Encode:
    """Job: encodes the images and videos of a list, with their captions, into a token store.

    images, list      as ImageFolder takes them; videos are told by the names of their files
    tokenizer, dtype  a directory that tokenizer.convert.load reads, and what to compute in
    vocab, codes      ranks file of the captions ("emu3": Emu3's) and number of visual codes
    directory         the store
    tokens            visual codes that a device encodes at once; memory grows with them. An image
                      of 512x512 pixels has 4,096
    parts             of the store; complete ones are skipped, so an interrupted job goes on
    worker, workers   this process writes parts worker, worker + workers, ...; with workers 0, these
                      are its number in a run of several processes and their count
    min_pixels, max_pixels, factor   images are resized to an area in this range, both sides to
                      multiples of `factor`, the tokenizer's pixels a code
    aspects           0: every image keeps its shape, as Emu3 has it; else see plan.Sizes
    fps, seconds      frames a second that videos are read at and how much of them (0: all)
    video             "clips": each 4 frames by themselves, as Emu3's script has it, or "stream"
    max_bad           how many bad files a part may skip; each is named on stderr and counted
    licence           of the images, for store.json
    """

    images: str = "runs/images"
    list: str = "captions.jsonl"
    tokenizer: str = "runs/tokenizer"
    dtype: str = "float32"
    vocab: str = "emu3"
    codes: int = 32768
    directory: str = "runs/store"
    tokens: int = 4096
    parts: int = 1
    worker: int = 0
    workers: int = 0
    min_pixels: int = 512 * 512
    max_pixels: int = 1024 * 1024
    factor: int = 8
    aspects: int = 0
    fps: float = 24.0
    seconds: float = 5.0
    video: str = "clips"
    max_bad: int = 100
    licence: str = ""

    @property
    def sizes(self) -> plan.Sizes:
        """The sizes of what is encoded."""
        return plan.Sizes(self.min_pixels, self.max_pixels, self.factor, self.aspects)

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

    Raises StoreError if the store holds parts of another tokenizer, vocabulary, list, dtype or
    video mode, ValueError for too many bad files.
    """
    folder = image_folder.ImageFolder(config.images, config.list)
    if not 1 <= config.parts <= len(folder):
        raise ValueError(f"{config.parts} parts for {len(folder)} files; take 1 to {len(folder)}")
    work = _Work(config, folder, tokenizer, vocab)
    made_with = {part: work.made_with(part, fingerprint) for part in _parts(config)}
    paths = {part: store.part_path(config.directory, part, config.parts) for part in made_with}
    missing = [part for part in paths if not parts.is_complete(paths[part], made_with[part])]
    if not missing:
        print(f"{config.directory}: encoded ({len(paths)} of {config.parts} parts here)")
    progress = _Progress(config.directory, sum(len(work.members(part)) for part in missing))
    for part in missing:
        bad = _Bad(config, progress)
        documents = work.documents(part, bad, progress)
        parts.write(paths[part], documents, made_with[part], len(bad.messages))
        skipped = f", {len(bad.messages)} bad skipped" if bad.messages else ""
        print(f"{paths[part]}: {len(documents)} documents{skipped}", flush=True)
    return _finish(config)


def _parts(config: Encode) -> range:
    """The parts of this process."""
    if config.worker == config.workers == 0:
        return range(jax.process_index(), config.parts, jax.process_count())
    if not 0 <= config.worker < config.workers:
        raise ValueError(
            f"worker {config.worker} of workers {config.workers}; they are counted from 0"
        )
    return range(config.worker, config.parts, config.workers)


def _finish(config: Encode) -> bool:
    source = str(pathlib.Path(config.images) / config.list)
    return store.finish(config.directory, config.parts, source, config.licence)


@dataclasses.dataclass
class _Work:
    """All that the parts of a store are made of."""

    config: Encode
    folder: image_folder.ImageFolder
    tokenizer: Encoder
    vocab: vocabulary.Vocab

    @functools.cached_property
    def has_videos(self) -> bool:
        """Whether any part has a video."""
        return any(plan.is_video(entry["file"]) for entry in self.folder.entries)

    def members(self, part: int) -> range:
        """The files of a part: a contiguous stretch of the list."""
        count, parts = len(self.folder), self.config.parts
        return range(part * count // parts, (part + 1) * count // parts)

    def made_with(self, part: int, fingerprint: str) -> store.Fingerprints:
        """As whose work a part counts; `source` is its files by name, captions and resizing."""
        config = self.config
        settings = [config.min_pixels, config.max_pixels, config.factor, config.aspects]
        settings += [config.fps, config.seconds] if self.has_videos else []
        entries = [self.folder.entries[i] for i in self.members(part)]
        pairs = [[entry["file"], _caption(entry)] for entry in entries]
        source = hashlib.sha256(json.dumps([settings, pairs]).encode()).hexdigest()
        video = config.video if self.has_videos else ""
        return store.Fingerprints(self.vocab.fingerprint, fingerprint, source, config.dtype, video)

    def documents(self, part: int, bad: "_Bad", progress: "_Progress") -> list[store.Document]:
        """The documents of a part, in the order of the list."""
        config, name = self.config, parts.part_name(part, self.config.parts)
        batches, unusable = plan.make(
            self.folder, self.members(part), config.sizes, self.tokenizer.batch
        )
        progress.plan(name, batches, self.tokenizer.batch)
        for error in unusable:
            bad.add(error)
        read = reader.Reader(self.folder, config.sizes, config.fps, config.seconds).read(batches)
        documents = {}
        for usable, codes in _one_behind(self._start(read, bad)):
            for member, codes_thw in zip(usable, codes(), strict=True):
                documents[member] = self._document(member, usable[member], codes_thw)
                progress.add(1, codes_thw.size)
        return [documents[member] for member in sorted(documents)]

    def _start(self, read: Iterable, bad: "_Bad") -> Iterator[tuple[dict, Callable]]:
        """Each batch: what is usable by member, and what waits for its codes, already begun."""
        for batch, loaded in read:
            usable = {}
            for member, item in zip(batch.members, loaded, strict=True):
                if isinstance(item, image_folder.BadFile):
                    bad.add(item)
                else:
                    usable[member] = item
            if usable and batch.size:
                yield usable, self.tokenizer.images(np.stack(list(usable.values())))
            elif usable:
                yield usable, self.tokenizer.video(usable[batch.members[0]].x_THWC)

    def _document(
        self, member: int, item: np.ndarray | reader.Frames, codes_thw: np.ndarray
    ) -> store.Document:
        entry = self.folder.entries[member]
        if codes_thw.max() >= self.vocab.codes:
            raise ValueError(
                f"{entry['file']}: code {codes_thw.max()} does not fit a vocabulary of "
                f"{self.vocab.codes} codes; set codes to the tokenizer's codebook size"
            )
        text = np.array(self.vocab.encode(_caption(entry)), np.uint32)
        if isinstance(item, reader.Frames):
            return store.Document(entry["file"], text, codes_thw, item.fps, len(item.x_THWC))
        return store.Document(entry["file"], text, codes_thw)


def _caption(entry: dict) -> str:
    return entry["caption"] if "caption" in entry else ""


def _one_behind(items: Iterable) -> Iterator:
    """The items, each once the one after it is there."""
    last = []
    for item in items:
        yield from last
        last = [item]
    yield from last


class _Bad:
    """Files that a part skips: names each, and ends the job when there are too many."""

    def __init__(self, config: Encode, progress: "_Progress"):
        self.messages = []
        self._config, self._progress = config, progress

    def add(self, error: image_folder.BadFile) -> None:
        print(f"skipped: {error}", file=sys.stderr)
        self.messages.append(str(error))
        self._progress.add(1, 0)
        config = self._config
        if len(self.messages) > config.max_bad:
            raise ValueError(
                image_folder.too_many_bad(config.images, self.messages, config.max_bad, "file")
            )


class _Progress:
    """A line for each plan, and one every few seconds: files done, rates, time left."""

    def __init__(self, name: str, total: int):
        self._name, self._total, self._done, self._tokens = name, total, 0, 0
        self._start = self._printed = time.time()

    def plan(self, part: str, batches: list[plan.Batch], most: Callable[[int, int], int]) -> None:
        """How well the batches of a part are filled, on which its speed depends."""
        images = [batch for batch in batches if batch.size]
        sizes = {batch.size for batch in images}
        places = sum(most(*batch.size) for batch in images)
        full = sum(len(batch.members) for batch in images) / max(1, places)
        print(
            f"{self._name}  {part}: {len(images)} batches, {full:.0%} full, in {len(sizes)} sizes,"
            f" {len(batches) - len(images)} videos",
            flush=True,
        )

    def add(self, files: int, tokens: int) -> None:
        """Counts files that are done."""
        self._done += files
        self._tokens += tokens
        now = time.time()
        if now - self._printed < 5:
            return
        self._printed = now
        files_per_second, tokens_per_second = (
            count / (now - self._start) for count in (self._done, self._tokens)
        )
        left = metrics.time_left((self._total - self._done) / files_per_second)
        print(
            f"{self._name}  {self._done}/{self._total} files  {files_per_second:.3g} files/s  "
            f"{tokens_per_second:,.0f} tokens/s  {left} left",
            flush=True,
        )
