"""Near-duplicate images of a source: found by a perceptual hash, listed for Filters to leave out.

Hashes are made part by part by any number of processes. Whoever finds that all parts are there
joins them, so the list is the same however many processes there were and whatever interrupted them.
Hashes do not depend on `distance`: to try another one is a matter of seconds.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import time

import numpy as np

from data_pipelines import entries, image_folder, parts, perceptual_hash, progress, sources

FAR = 12  # bits: from there on, unlike pictures are too near each other
_AT_ONCE = 256  # images that the threads are given
_WAIT = 2.0  # seconds between two looks at whether the other processes are done


@dataclasses.dataclass
class Duplicates:
    """Job: writes DIRECTORY/duplicates.jsonl, which Filters takes.

    A line is {"key", "of", "distance"}: an image to leave out; the first one of the source that
    stays and is near it; in how many of 64 bits they differ. Of the images that stay no two are
    within `distance`. Videos are passed over.

    source     of the images, as Encode has it
    directory  of the list, and of one file of hashes a part
    distance   bits that may differ, nearly always an even number. Within 6 are pictures scaled
               or compressed anew, or cut by a hundredth of their sides. Of bits that are evenly
               spread, 6 or fewer differ by chance in one of 7e10 pairs, 8 in one of 1e9, 10 in one
               of 4e7; real pictures are that near more often
    parts      of the source; those that have been hashed are skipped, so an interrupted job goes on
    worker, workers   this process hashes parts worker, worker + workers, ...; with workers 0, these
               are its number in a run of several processes and their count
    max_bad    how many bad images a part may skip; each is named on stderr and counted
    """

    source: sources.Opens = dataclasses.field(default_factory=sources.Images)
    directory: str = "runs/duplicates"
    distance: int = 6
    parts: int = 1
    worker: int = 0
    workers: int = 0
    max_bad: int = 100

    def run(self) -> None:
        """Hashes the missing parts of this process, and waits for those of the run's others.

        Raises ValueError for a source or settings that cannot be used, for hashes that were made
        of other images, for too many bad ones.
        """
        source = self.source.open()
        if not 1 <= self.parts <= len(source):
            raise ValueError(f"{self.parts} parts for {len(source)} images; take 1 to that many")
        if not 0 <= self.distance < FAR:
            raise ValueError(f"distance is {self.distance}; take 0 to {FAR - 1} of the 64 bits")
        _hash_missing(self, source)
        while not (complete := _finish(self, source)) and not self.workers:
            time.sleep(_WAIT)  # JAX ends a run's processes soon after the first one has left
        if not complete:
            print(f"{self.directory}: parts are missing; the last worker writes the list")


def _hash_missing(config: Duplicates, source: sources.Source) -> None:
    """Writes the files of hashes that this process owes."""
    mine = parts.mine(config.parts, config.worker, config.workers)
    paths = {part: _path(config, part) for part in mine}
    members = {part: parts.members(len(source), part, config.parts) for part in paths}
    missing = [part for part, path in paths.items() if not path.exists()]
    pathlib.Path(config.directory).mkdir(parents=True, exist_ok=True)
    shown = progress.Progress(config.directory, sum(len(members[part]) for part in missing))
    for part, path in paths.items():
        keys = [_key(source, i) for i in members[part]]
        made_of = hashlib.sha256(json.dumps(keys).encode()).hexdigest()
        info = parts.read_json(path)
        if info is None:
            bad = progress.Bad(config.source.name, config.max_bad, shown)
            hashes = _hash(source, members[part], bad, shown)
            record = {"source": made_of, "bad": len(bad.messages), "hashes": hashes}
            parts.write_json(path, record)
        elif info["source"] != made_of:
            raise ValueError(
                f"{path} has hashes of source {info['source'][:12]}, but {config.source.name} is "
                f"{made_of[:12]}; remove {config.directory}"
            )
    if not missing:
        print(f"{config.directory}: hashed ({len(paths)} of {config.parts} parts here)")


def _path(config: Duplicates, part: int) -> pathlib.Path:
    return pathlib.Path(config.directory, f"{parts.part_name(part, config.parts)}.json")


def _key(source: sources.Source, index: int) -> str:
    """Of a record; "" if not even its entry can be read."""
    try:
        return source.entry(index).key
    except image_folder.BadFile:
        return ""


def _hash(
    source: sources.Source, members: range, bad: progress.Bad, shown: progress.Progress
) -> list[int | None]:
    """The hashes of a part, None for what is bad or no image."""

    def one(index: int) -> int | None | image_folder.BadFile:
        try:
            if entries.is_video(source.entry(index).key):
                return None
            image_HWC = image_folder.read_image(source.file(index))
            return int(perceptual_hash.hash_image(image_HWC))
        except image_folder.BadFile as error:
            return error

    hashes = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for begin in range(0, len(members), _AT_ONCE):
            for found in pool.map(one, members[begin : begin + _AT_ONCE]):
                if isinstance(found, image_folder.BadFile):
                    bad.add(found)
                    hashes.append(None)
                else:
                    shown.add(1, 0)
                    hashes.append(found)
    return hashes


def _finish(config: Duplicates, source: sources.Source) -> bool:
    """Writes the list if all parts are there; are they?"""
    paths = [_path(config, part) for part in range(config.parts)]
    if not all(path.exists() for path in paths):
        return False
    infos = [parts.read_json(path) for path in paths]
    hashes = [value for info in infos for value in info["hashes"]]
    number_N = np.array([i for i, value in enumerate(hashes) if value is not None], np.int64)
    hash_N = np.array([value for value in hashes if value is not None], np.uint64)
    stays_N = perceptual_hash.nearest_earlier(hash_N, config.distance)
    gone_N = np.flatnonzero(stays_N != np.arange(len(hash_N)))
    lines = []
    for gone in gone_N.tolist():
        stays = int(stays_N[gone])
        record = {
            "key": source.entry(number_N[gone]).key,
            "of": source.entry(number_N[stays]).key,
            "distance": (int(hash_N[gone]) ^ int(hash_N[stays])).bit_count(),
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    path = pathlib.Path(config.directory, "duplicates.jsonl")
    parts.write_text(path, "".join(lines))
    bad = sum(info["bad"] for info in infos)
    skipped = f", {bad} bad skipped" if bad else ""
    print(f"{path}: {len(lines)} near-duplicates among {len(hash_N)} images{skipped}", flush=True)
    return True
