"""How much of a run's wall time trained it: RUN/ledger.jsonl summed over all attempts.

An attempt is one start of the run's command. At any moment its time is in one span (ledger.py):

    start_up    until the first of the others: imports, meeting the other processes, restoring
    compile     tracing, lowering and compiling, within whatever it happens
    data        the loop stands still for rows; the devices may still be at the step before
    step        the loop hands steps to the devices and waits for them
    save        the loop stands still for a checkpoint
    other       what is none of these

Steps that an attempt took beyond the checkpoint from which a later one began are taken again, and
so are those that a rewind within an attempt undoes. Over all attempts there are therefore two more:

    lost        the time of those steps, which `step` then does not have; within the steps between
                two marks all are taken to have been equally long
    down        from an attempt's last record to the start of the next, by the wall clock: nothing
                ran, or an attempt that was killed did what it could not write down any more, which
                is no more than it does between two marks. A run that was done is not down.

They sum to the wall time of the run, from its first start to its last record. Goodput is the share
of `step`, where each step counts once: productive step time over all time, the definition of
Google's ml-goodput-measurement.
"""

import collections
import dataclasses
import itertools
import json
import math
import pathlib
import time

import numpy as np

from emu3_jax import exit_codes, metrics

FILE = "ledger.jsonl"
SPANS = ("start_up", "compile", "data", "step", "save", "other")
# After these ends it was not a failure that made somebody start the run again.
ORDERLY = (
    exit_codes.DONE, exit_codes.INTERRUPTED, *exit_codes.FATAL, *exit_codes.UNCOUNTED
)  # fmt: skip


@dataclasses.dataclass
class Goodput:
    """Job: prints where the wall time of the run in `run_dir` went, through all its restarts."""

    run_dir: str = ""

    def run(self) -> None:
        """Prints the table; ValueError where there is no ledger."""
        if not self.run_dir:
            raise ValueError("give --config.run_dir=RUN, the directory of a training run")
        attempts = read(self.run_dir)
        if not attempts:
            raise ValueError(
                f"{self.run_dir}: no {FILE} there; want the directory of a training run"
            )
        print(table(attempts))


@dataclasses.dataclass
class Stretch:
    """Steps taken one after the other, as far as they were marked.

    seconds   spent in steps by the attempt when each of `steps` was reached, the first one being
              where it began
    end       spent in steps when the stretch ended, or the last record was written
    """

    steps: list[int]
    seconds: list[float]
    end: float

    def beyond(self, step: float) -> tuple[int, float]:
        """(steps, seconds) after `step`; what came after the last mark is only in the seconds."""
        if step > self.steps[-1]:
            return 0, 0.0
        kept = float(np.interp(step, self.steps, self.seconds))
        return self.steps[-1] - max(int(step), self.steps[0]), self.end - kept


@dataclasses.dataclass
class Attempt:
    """One start of the run, as far as its records go.

    start, last   when it began and its last record was written, by the wall clock in s since 1970
    seconds       by span
    stretches     of steps: none if it ended before it knew where to begin, another with each rewind
    code, why     its exit code and what raised it; None where it was killed, or is still running
    """

    number: int
    start: float
    last: float
    seconds: dict[str, float]
    stretches: list[Stretch] = dataclasses.field(default_factory=list)
    devices: int = 0
    code: int | None = None
    why: str = ""

    @property
    def step(self) -> int | None:
        """Where it took its first step, or would have."""
        return self.stretches[0].steps[0] if self.stretches else None

    @property
    def end(self) -> str:
        """How it ended, for people."""
        if self.code is None:
            return "no end written: killed, hung or still running"
        meaning = exit_codes.MEANING.get(self.code, "")
        return f"{self.code}, {meaning}" + (f" ({self.why})" if self.why else "")

    def _add(self, record: dict) -> None:
        """Takes in a later record of this attempt; `seconds` are those so far."""
        self.last, self.seconds = record["time"], record["seconds"]
        stepped = self.seconds["step"]
        if self.stretches:
            self.stretches[-1].end = stepped
        match record["kind"]:
            case "begin":
                self.devices = record["devices"]
                self._start_stretch(record["step"], stepped)
            case "rewound":
                self._start_stretch(record["step"], stepped)
            case "mark":
                self.stretches[-1].steps.append(record["step"])
                self.stretches[-1].seconds.append(stepped)
            case "end":
                self.code, self.why = record["code"], record["why"]

    def _start_stretch(self, step: int, stepped: float) -> None:
        """Instead of one in which nothing was done, as where a checkpoint was damaged."""
        if self.stretches and self.stretches[-1].seconds == [self.stretches[-1].end]:
            self.stretches.pop()
        self.stretches.append(Stretch([step], [stepped], stepped))


def read(run_dir: str) -> list[Attempt]:
    """The attempts of a run, oldest first; lines cut short by a crash are left out."""
    path, attempts = pathlib.Path(run_dir) / FILE, {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        number, seconds = record["attempt"], record["seconds"]
        if record["kind"] == "start":
            began = record["time"] - sum(seconds.values())
            attempts[number] = Attempt(number, began, record["time"], seconds)
        elif number in attempts:  # by number: one that hangs may wake up when the next has begun
            attempts[number]._add(record)
    return list(attempts.values())


@dataclasses.dataclass
class Summary:
    """What all attempts together did.

    seconds      by span, `lost` and `down`; their sum is `total`
    lost_steps   marked steps that were or have to be taken again
    ends         how many attempts ended how
    """

    seconds: dict[str, float]
    total: float
    lost_steps: int
    ends: dict[str, int]

    @property
    def goodput(self) -> float:
        """The share of steps that count, each once, in all time."""
        return self.seconds["step"] / self.total if self.total else 0.0


def summary(attempts: list[Attempt]) -> Summary:
    """The sum over all attempts, as this file's head defines it."""
    seconds = {span: sum(attempt.seconds[span] for attempt in attempts) for span in SPANS}
    lost_steps, lost = 0, 0.0
    again = math.inf  # the first step that was taken again later
    for stretch in reversed([s for attempt in attempts for s in attempt.stretches]):
        steps, beyond = stretch.beyond(again)
        lost_steps, lost = lost_steps + steps, lost + beyond
        again = min(again, stretch.steps[0])
    seconds["step"] -= lost
    seconds["lost"] = lost
    seconds["down"] = sum(
        max(0.0, after.start - before.last)  # by a wall clock that somebody may have set back
        for before, after in itertools.pairwise(attempts)
        if before.code != exit_codes.DONE
    )
    ends = collections.Counter(attempt.end for attempt in attempts)
    return Summary(seconds, sum(seconds.values()), lost_steps, dict(ends))


def stuck(attempts: list[Attempt], step: int) -> int:
    """How many attempts in a row have got nowhere, up to one that begins at `step` now.

    One got nowhere if it failed and the next one did not begin later, so that it left no newer
    checkpoint. One that failed before it knew its step counts as well. An orderly end, and one
    after which only a person starts the run again, begin the count anew.
    """
    count = 0
    for attempt in reversed(attempts):
        if attempt.code in ORDERLY:
            break
        if attempt.step is not None:
            if attempt.step < step:
                break
            step = attempt.step
        count += 1
    return count


def table(attempts: list[Attempt]) -> str:
    """The summary and the attempts, for people."""
    whole = summary(attempts)
    total, useful = (metrics.time_left(s) for s in (whole.total, whole.seconds["step"]))
    lines = [f"goodput {whole.goodput:.1%}: of {total} since the first start, {useful} were steps "
             "that count", ""]  # fmt: skip
    for name, spent in sorted(whole.seconds.items(), key=lambda item: -item[1]):
        share = spent / whole.total if whole.total else 0.0
        lines.append(f"{name:11}{metrics.time_left(spent):>12}{share:>8.1%}")
    lines += ["", f"{whole.lost_steps:,} steps lost and taken again; the attempts ended so:"]
    lines += [f"{count:>6,} x {end}" for end, count in whole.ends.items()]
    lines += ["", "attempt  began             devices       time  steps, end"]
    for attempt in attempts:
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(attempt.start))
        spent = metrics.time_left(sum(attempt.seconds.values()))
        steps = [f"{stretch.steps[0]:,} to {stretch.steps[-1]:,}" for stretch in attempt.stretches]
        lines.append(
            f"{attempt.number:>7}  {began}  {attempt.devices:>7,}  {spent:>9}  "
            f"{', '.join(steps) or 'none'}; {attempt.end}"
        )
    return "\n".join(lines)
