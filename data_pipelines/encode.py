"""Images become a token store: read, resized as Emu3 does, encoded, written part by part.

Legend: B images of a batch, H rows, W columns, C colours of pixels; h rows, w columns of codes.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import PIL.Image

from data_pipelines import image_folder, parts, store
from emu3_jax import metrics
from emu3_jax import vocab as vocabulary
from tokenizer import convert, pixels

_READ_AHEAD = 64


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, x_BHWC: Any) -> Any:
        """Pixels in [-1, 1] to codes_Bhw."""


@dataclasses.dataclass
class Encode:
    """Job: encodes the images of a list, with their captions, into the token store `directory`.

    images, list      as ImageFolder takes them
    tokenizer         a directory that tokenizer.convert.load reads
    vocab, codes      ranks file of the captions ("emu3": Emu3's) and number of visual codes
    batch             images of one size that are encoded together
    parts             of the store; complete ones are skipped, so an interrupted job goes on
    worker, workers   this process writes parts worker, worker + workers, ...; all may run at once
    min_pixels, max_pixels, factor   images are resized to an area in this range, both sides to
                      multiples of `factor`, the tokenizer's pixels a code
    max_bad           how many bad images a part may skip; each is named on stderr and counted
    licence           of the images, for store.json
    """

    images: str = "runs/images"
    list: str = "captions.jsonl"
    tokenizer: str = "runs/tokenizer"
    vocab: str = "emu3"
    codes: int = 32768
    directory: str = "runs/store"
    batch: int = 16
    parts: int = 1
    worker: int = 0
    workers: int = 1
    min_pixels: int = 512 * 512
    max_pixels: int = 1024 * 1024
    factor: int = 8
    max_bad: int = 100
    licence: str = ""

    def run(self) -> None:
        """Writes the missing parts of this worker, or says that the store is complete."""
        vq = convert.load(self.tokenizer)
        vocab = vocabulary.Vocab.load(self.vocab, self.codes)
        encode(self, vq, convert.fingerprint(vq), vocab)


def encode(config: Encode, vq: Encoder, fingerprint: str, vocab: vocabulary.Vocab) -> None:
    """What `Encode.run` does, for a tokenizer and a vocabulary that are already in memory.

    Raises StoreError if the store holds parts of another tokenizer, vocabulary or list, ValueError
    for too many bad images.
    """
    folder = image_folder.ImageFolder(config.images, config.list)
    if not 1 <= config.parts <= len(folder):
        raise ValueError(f"{config.parts} parts for {len(folder)} images; take 1 to {len(folder)}")
    prints = {
        part: store.Fingerprints(vocab.fingerprint, fingerprint, _source(config, folder, part))
        for part in range(config.worker, config.parts, config.workers)
    }
    paths = {part: store.part_path(config.directory, part, config.parts) for part in prints}
    missing = [part for part in prints if not parts.is_complete(paths[part], prints[part])]
    if not missing:
        _finish(config)
        print(f"{config.directory}: encoded ({len(prints)} of {config.parts} parts here)")
        return
    progress = _Progress(config.directory, sum(len(_members(config, folder, p)) for p in missing))
    for part in missing:
        codes, bad = _encode_part(config, vq, folder, _members(config, folder, part), progress)
        written = [_document(folder.entries[i], codes[i], vocab) for i in sorted(codes)]
        parts.write(paths[part], written, prints[part], len(bad))
        skipped = f", {len(bad)} bad images skipped" if bad else ""
        print(f"{paths[part]}: {len(written)} images{skipped}", flush=True)
    _finish(config)


def _members(config: Encode, folder: image_folder.ImageFolder, part: int) -> range:
    """The images of a part: a contiguous stretch of the list."""
    count = len(folder)
    return range(part * count // config.parts, (part + 1) * count // config.parts)


def _source(config: Encode, folder: image_folder.ImageFolder, part: int) -> str:
    """Fingerprint of what a part is read from: its files by name, captions and resizing."""
    settings = [config.min_pixels, config.max_pixels, config.factor]
    entries = [folder.entries[i] for i in _members(config, folder, part)]
    pairs = [[entry["file"], _caption(entry)] for entry in entries]
    return hashlib.sha256(json.dumps([settings, pairs]).encode()).hexdigest()


def _encode_part(
    config: Encode,
    vq: Encoder,
    folder: image_folder.ImageFolder,
    members: range,
    progress: "_Progress",
) -> tuple[dict[int, np.ndarray], list[str]]:
    """codes_hw by index in the list, and the messages of bad images."""
    codes, bad = {}, []
    waiting = collections.defaultdict(list)
    for index, image in _read(config, folder, members):
        if isinstance(image, image_folder.BadImage):
            print(f"skipped: {image}", file=sys.stderr)
            bad.append(str(image))
            if len(bad) > config.max_bad:
                raise ValueError(image_folder.too_many_bad(config.images, bad, config.max_bad))
            continue
        group = waiting[image.shape]
        group.append((index, image))
        if len(group) == config.batch:
            codes |= _encode_batch(vq, waiting.pop(image.shape), config.batch)
            progress.add(config.batch)
    for group in waiting.values():
        codes |= _encode_batch(vq, group, config.batch)
        progress.add(len(group))
    return codes, bad


def _read(
    config: Encode, folder: image_folder.ImageFolder, members: Sequence[int]
) -> Iterator[tuple[int, Any]]:
    """(index, resized image or BadImage) in order, read ahead by threads."""

    def read(index):
        try:
            return _resize(folder[index], config)
        except image_folder.BadImage as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        ahead = collections.deque()
        for index in members:
            ahead.append((index, pool.submit(read, index)))
            if len(ahead) > _READ_AHEAD:
                first, job = ahead.popleft()
                yield first, job.result()
        for first, job in ahead:
            yield first, job.result()


def _resize(record: image_folder.Record, config: Encode) -> np.ndarray:
    height, width, _ = record.image_HWC.shape
    limits = config.factor, config.min_pixels, config.max_pixels
    try:
        height, width = pixels.smart_resize(height, width, *limits)
    except ValueError as error:
        raise image_folder.BadImage(f"{record.key}: {error}") from error
    if record.image_HWC.shape[:2] == (height, width):
        return record.image_HWC
    image = PIL.Image.fromarray(record.image_HWC)
    return np.asarray(image.resize((width, height), PIL.Image.Resampling.BICUBIC))


def _encode_batch(
    vq: Encoder, group: list[tuple[int, np.ndarray]], batch: int
) -> dict[int, np.ndarray]:
    # A short batch is filled up with its last image: one compiled program a size.
    images = [image for _, image in group]
    x_BHWC = np.stack(images + images[-1:] * (batch - len(images))).astype(np.float32) / 127.5 - 1
    codes_Bhw = np.asarray(vq.encode(x_BHWC))
    return {index: codes_hw for (index, _), codes_hw in zip(group, codes_Bhw, strict=False)}


def _document(entry: dict, codes_hw: np.ndarray, vocab: vocabulary.Vocab) -> store.Document:
    if codes_hw.max() >= vocab.codes:
        raise ValueError(
            f"{entry['file']}: code {codes_hw.max()} does not fit a vocabulary of {vocab.codes} "
            "codes; set codes to the tokenizer's codebook size"
        )
    text = np.array(vocab.encode(_caption(entry)), np.uint32)
    return store.Document(entry["file"], text, codes_hw[None])


def _caption(entry: dict) -> str:
    return entry["caption"] if "caption" in entry else ""


def _finish(config: Encode) -> None:
    source = str(pathlib.Path(config.images) / config.list)
    store.finish(config.directory, config.parts, source, config.licence)


class _Progress:
    """A line every few seconds: images done, rate, time left."""

    def __init__(self, name: str, total: int):
        self._name, self._total, self._done = name, total, 0
        self._start = self._printed = time.time()

    def add(self, images: int) -> None:
        self._done += images
        now = time.time()
        if now - self._printed < 5:
            return
        self._printed = now
        rate = self._done / (now - self._start)
        left = metrics.time_left((self._total - self._done) / rate)
        print(
            f"{self._name}  {self._done}/{self._total} images  {rate:.0f} images/s  {left} left",
            flush=True,
        )
