"""What a long job over many files says meanwhile: how far it is, and which files it skips."""

import sys
import time
from collections.abc import Callable

from data_pipelines import image_folder, plan
from emu3_jax import metrics


class Progress:
    """A line for each plan, and one every few seconds: files done, rates, time left."""

    def __init__(self, name: str, total: int):
        self._name, self._total, self._done, self._tokens = name, total, 0, 0
        self._start = self._printed = time.time()

    def plan(
        self, part: str, planned: plan.Plan, members: int, most: Callable[[int, int], int]
    ) -> None:
        """Says how well the batches of a part are filled, on which its speed depends.

        Where videos of its `members` became several pieces or none, the total changes.
        """
        dropped = sum(planned.dropped.values())
        self._total += planned.count + len(planned.bad) + dropped - members
        images = [batch for batch in planned.batches if batch.size]
        sizes = {batch.size for batch in images}
        places = sum(most(*batch.size) for batch in images)
        full = sum(len(batch.members) for batch in images) / max(1, places)
        print(
            f"{self._name}  {part}: {len(images)} batches, {full:.0%} full, in {len(sizes)} sizes,"
            f" {len(planned.batches) - len(images)} videos",
            flush=True,
        )
        for reason, count in sorted(planned.dropped.items()):
            print(f"{self._name}  {part}: {count} left out: {reason}", flush=True)
        self.add(dropped, 0)

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
        left = metrics.time_left((self._total - self._done) / max(files_per_second, 1e-9))
        tokens = f"{tokens_per_second:,.0f} tokens/s  " if self._tokens else ""
        print(
            f"{self._name}  {self._done}/{self._total} files  {files_per_second:.3g} files/s  "
            f"{tokens}{left} left",
            flush=True,
        )


class Bad:
    """Files that a part skips: names each, and ends the job when there are too many."""

    def __init__(self, source: str, most: int, progress: Progress):
        self.messages = []
        self._source, self._most, self._progress = source, most, progress

    def add(self, error: image_folder.BadFile) -> None:
        """Skips one. ValueError if that are more than `most`."""
        print(f"skipped: {error}", file=sys.stderr)
        self.messages.append(str(error))
        self._progress.add(1, 0)
        if len(self.messages) > self._most:
            message = image_folder.too_many_bad(self._source, self.messages, self._most, "file")
            raise ValueError(message)
