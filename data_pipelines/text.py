"""Text becomes a token store: read as a stream, tokenised by threads, part by part.

A part is made without any other, so processes need nothing of each other, and a part that was
interrupted is begun again. What it holds follows from the source and the configuration, not from
when it was made or by how many threads. In memory are the ids of one part and a few batches of
text: choose `parts` so that a part has no more than about 1 GB.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from data_pipelines import chat, parts, store, text_files
from emu3_jax import metrics
from emu3_jax import vocab as vocabulary

Record, BadText = text_files.Record, text_files.BadText
_WAIT = 2.0  # seconds between two looks at whether the other processes are done
_BATCH = 1 << 18  # characters that a thread tokenises at once


class Source(Protocol):
    """What a store of text is made from, cut into parts that are the same on every host."""

    name: str
    unit: str  # what sizes count

    def size(self, part: int, parts: int) -> int:
        """How much a part has to read, 0 where that is unknown."""

    def made_of(self, part: int, parts: int) -> Any:
        """What the records of a part follow from, as JSON values."""

    def read(self, part: int, parts: int) -> Iterable[Record | BadText]:
        """The records of a part, always in the same order."""


@dataclasses.dataclass
class TextStore:
    """What all jobs have that write a store of text.

    directory         the store
    vocab, codes      ranks file ("emu3": Emu3's) and number of visual codes of the vocabulary
    parts             of the store; complete ones are skipped, so an interrupted job goes on
    worker, workers   this process writes parts worker, worker + workers, ...; with workers 0, these
                      are its number in a run of several processes and their count
    min_ids, max_ids  documents of fewer or more ids are left out, and counted as "short" and "long"
                      (max_ids 0: of any length)
    max_bad           how many bad records a part may skip; each is named on stderr and counted
    licence           of the text, for store.json
    """

    directory: str = "runs/text"
    vocab: str = "emu3"
    codes: int = 32768
    parts: int = 1
    worker: int = 0
    workers: int = 0
    min_ids: int = 1
    max_ids: int = 0
    max_bad: int = 100
    licence: str = ""

    def encode(self, source: Source, directory: str) -> None:
        """Writes the missing parts of this process, and waits for those of the run's others.

        Raises StoreError if the store holds parts of another source, configuration or vocabulary,
        ValueError for too many bad records.
        """
        vocab = vocabulary.Vocab.load(self.vocab, self.codes)
        complete = encode(self, source, directory, vocab)
        while not complete and not self.workers:
            time.sleep(_WAIT)  # JAX ends a run's processes soon after the first one has left
            complete = store.finish(directory, self.parts, source.name, self.licence)


@dataclasses.dataclass
class EncodeText(TextStore):
    """Job: text files become a store of text documents and conversations.

    texts, files   the files of a directory that match a pattern
    field          of .jsonl lines and .parquet rows: it holds a text, or a conversation in one of
                   the forms that chat.py reads
    documents      what a document of any other file is: "file", "blank" (what stands between blank
                   lines) or "line"
    """

    texts: str = "runs/texts"
    files: str = "**/*.jsonl"
    field: str = "text"
    documents: str = "file"

    def run(self) -> None:
        """Writes the store."""
        source = text_files.TextFiles(self.texts, self.files, self.field, self.documents)
        self.encode(source, self.directory)


def encode(config: TextStore, source: Source, directory: str, vocab: vocabulary.Vocab) -> bool:
    """What `TextStore.encode` does in this process; is the store complete?"""
    if config.parts < 1:
        raise ValueError(f"{config.parts} parts; take at least 1")
    mine = parts.mine(config.parts, config.worker, config.workers)
    made_with = {part: _made_with(config, source, part, vocab) for part in mine}
    paths = {part: store.part_path(directory, part, config.parts) for part in made_with}
    missing = [part for part in paths if not parts.is_complete(paths[part], made_with[part])]
    if not missing:
        print(f"{directory}: encoded ({len(paths)} of {config.parts} parts here)")
    total = sum(source.size(part, config.parts) for part in missing)
    progress = _Progress(directory, source.unit, total)
    for part in missing:
        bad, dropped = _Bad(source.name, config.max_bad), collections.Counter()
        read = source.read(part, config.parts)
        documents = list(_documents(config, read, vocab, bad, dropped, progress))
        parts.write(paths[part], documents, made_with[part], len(bad.messages), dict(dropped))
        counts = [f"{len(documents)} documents", f"{len(bad.messages)} bad skipped"]
        counts += [f"{number} {reason} dropped" for reason, number in sorted(dropped.items())]
        shown = [count for count in counts if not count.startswith("0 bad")]
        print(f"{paths[part]}: {', '.join(shown)}", flush=True)
    return store.finish(directory, config.parts, source.name, config.licence)


def _made_with(
    config: TextStore, source: Source, part: int, vocab: vocabulary.Vocab
) -> store.Fingerprints:
    made_of = [config.min_ids, config.max_ids, source.made_of(part, config.parts)]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    return store.Fingerprints(vocabulary=vocab.fingerprint, source=digest)


def _documents(
    config: TextStore,
    read: Iterable[Record | BadText],
    vocab: vocabulary.Vocab,
    bad: "_Bad",
    dropped: collections.Counter,
    progress: "_Progress",
) -> Iterator[store.Document]:
    """The documents to keep, in the order of the records; counts all others."""

    def tokenise(batch: list[Record | BadText]) -> list[tuple]:
        return [(r, None if isinstance(r, BadText) else _document(r, vocab)) for r in batch]

    for batch in _ahead(tokenise, _batches(read)):
        for record, document in batch:
            if document is None:
                bad.add(record)
                continue
            progress.add(record.size, len(document.text))
            if len(document.text) < config.min_ids:
                dropped["short"] += 1
            elif 0 < config.max_ids < len(document.text):
                dropped["long"] += 1
            else:
                yield document


def _document(record: Record, vocab: vocabulary.Vocab) -> store.Document:
    if isinstance(record.value, str):
        return store.Document(record.key, np.array(vocab.encode(record.value), np.uint32))
    ids, turns = chat.encode(record.value, vocab, image=False)
    return store.Document(record.key, ids, turns=turns)


def _batches(records: Iterable[Record | BadText]) -> Iterator[list[Record | BadText]]:
    batch, characters = [], 0
    for record in records:
        batch.append(record)
        characters += 64 if isinstance(record, BadText) else _characters(record) + 64
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    yield batch


def _characters(record: Record) -> int:
    if isinstance(record.value, str):
        return len(record.value)
    return sum(len(question) + len(answer) for question, answer in record.value)


def _ahead(function: Callable, items: Iterable) -> Iterator:
    """`function` of each item in order, computed by threads a few items ahead."""
    threads, waiting = os.cpu_count() or 1, collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _Bad:
    """Records that a part skips: names each, and ends the job when there are too many."""

    def __init__(self, name: str, limit: int):
        self.messages = []
        self._name, self._limit = name, limit

    def add(self, error: BadText) -> None:
        print(f"skipped: {error}", file=sys.stderr)
        self.messages.append(str(error))
        if len(self.messages) > self._limit:
            raise ValueError(
                f"{self._name} has more than max_bad = {self._limit} bad records in a part, the "
                f"last: {error}; repair it or raise max_bad"
            )


class _Progress:
    """A line every few seconds: how much is read, rates, time left."""

    def __init__(self, name: str, unit: str, total: int):
        self._name, self._unit, self._total = name, unit, total
        self._documents, self._done, self._ids = 0, 0.0, 0
        self._start = self._printed = time.time()

    def add(self, size: float, ids: int) -> None:
        """Counts a document."""
        self._documents += 1
        self._done += size
        self._ids += ids
        now = time.time()
        if now - self._printed < 5:
            return
        self._printed = now
        seconds = now - self._start
        line = f"{self._name}  {self._documents:,} documents  {self._ids / seconds:,.0f} ids/s"
        if self._total and self._done:
            left = max(0, self._total - self._done) * seconds / self._done
            share = self._done / self._total
            line += f"  {share:.0%} of {self._total:,} {self._unit}"
            line += f"  {metrics.time_left(left)} left"
        print(line, flush=True)
