"""The ledger: where each attempt's wall time goes, in RUN/ledger.jsonl.

goodput.py says what the spans are and sums them over all attempts. Time is taken by a clock that
nobody can set; each record also has the wall clock's, for the time between attempts.
"""

import json
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import jax

from emu3_jax import exit_codes, goodput, metrics, preemption, replay

_loading = 0.0  # seconds; see loaded()


def loaded(since: float) -> None:
    """Says that the job runs now, in a process that began at `since`, by time.monotonic().

    The time until now becomes start-up of the next attempt, the first one of this process.
    """
    global _loading
    _loading = time.monotonic() - since


class Ledger:
    """The record of one attempt, a context manager around it.

    Only the process that `writes`, the first one if it isn't said, has the file; the others keep
    time for themselves. To be used by the thread that opened it.
    """

    def __init__(
        self, run_dir: str, writes: bool | None = None, *,
        clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time,
    ):  # fmt: skip
        self._run_dir, self._writes = run_dir, writes
        self._clock, self._wall = clock, wall

    def __enter__(self) -> "Ledger":
        global _loading
        self._switched = self._charged = self._clock()
        self._seconds = dict.fromkeys(goodput.SPANS, 0.0) | {"start_up": _loading}
        _loading = 0.0
        self._span, self._compiled = "start_up", []
        self._kept = self._before = 0.0
        self._moved = False
        if self._writes is None:  # asked here, as JAX may begin to look for devices: start-up
            self._writes = jax.process_index() == 0
        self._history = goodput.read(self._run_dir) if self._writes else []
        self._file = _open(pathlib.Path(self._run_dir) / goodput.FILE) if self._writes else None
        self._number = self._history[-1].number + 1 if self._history else 1
        self._record("start")
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._compile)
        return self

    def __exit__(self, kind, error, _) -> None:
        jax.monitoring.unregister_event_duration_listener(self._compile)
        self._record("end", code=exit_code(error), why=kind.__name__ if kind else "")
        if self._file:
            self._file.close()

    def begin(self, step: int) -> int:
        """The attempt is to go on at `step`; to be told before that is restored.

        Returns how many attempts in a row have got nowhere before this one (goodput.stuck); 0 where
        it has got on itself, and went back.
        """
        self._record("begin", step=step, processes=jax.process_count(), devices=jax.device_count())
        self._look_back()
        return 0 if self._moved else goodput.stuck(self._history, step)

    def mark(self, step: int) -> None:
        """`step` steps are done. What a killed attempt did after its last mark is not known."""
        self._moved = True
        self._record("mark", step=step)

    def rewound(self, step: int) -> None:
        """The attempt goes back to `step` by itself: what it did after that is lost."""
        self._moved = True
        self._record("rewound", step=step)
        self._look_back()

    def span(self, name: str) -> "_Span":
        """A context whose time counts as `name`, one of goodput.SPANS, and not as what is around.

        What is around all spans is start_up before the first one, and other after it.
        """
        return _Span(self, name)

    def timed(self, batches: Iterable) -> Iterator:
        """The batches; the time that the loop waits for each counts as data."""
        batches, data = iter(batches), self.span("data")
        while True:
            with data:
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @property
    def seconds(self) -> dict[str, float]:
        """The time of this attempt until now, by span."""
        self._charge()
        return dict(self._seconds)

    def goodput(self) -> float:
        """That of all attempts until now; cheap."""
        seconds = self.seconds
        total = self._before + sum(seconds.values())
        return (self._kept + seconds["step"]) / total if total else 0.0

    def _look_back(self) -> None:
        """Sums what was before, of which from here on no more is lost than is now."""
        seconds = self.seconds
        past = goodput.summary(goodput.read(self._run_dir) if self._writes else [])
        self._kept = past.seconds["step"] - seconds["step"]
        self._before = past.total - sum(seconds.values()) if past.total else 0.0

    def _record(self, kind: str, **values) -> None:
        """Writes a line, in which seconds are those since the attempt began."""
        seconds = {name: round(spent, 3) for name, spent in self.seconds.items()}
        if self._file:
            record = dict(kind=kind, attempt=self._number, **values)
            record |= dict(time=round(self._wall(), 3), seconds=seconds)
            self._file.write(json.dumps(record) + "\n")
        self._compiled.clear()

    def _charge(self) -> float:
        now = self._clock()
        self._seconds[self._span] += now - self._charged
        self._charged = now
        return now

    def _switch(self, name: str) -> str:
        """Time counts as `name` from now on; returns as what it did before."""
        self._switched = self._charge()
        before, self._span = self._span, name
        return before

    def _compile(self, event: str, seconds: float, **_) -> None:
        """Moves the seconds that have just been spent on compilation out of the current span.

        JAX tells of tracing, lowering and compiling when each is over. One may have happened within
        another, whose seconds then include its own; and JAX goes by the wall clock.
        """
        ours = event.startswith("/jax/core/compile/") and event.endswith("_duration")
        if not ours or threading.get_ident() != self._thread:
            return
        now = self._charge()
        start = min(max(now - seconds, self._switched), now)
        moved = now - start
        while self._compiled and self._compiled[-1][0] > start:
            moved -= self._compiled.pop()[1]
        self._compiled.append((now, now - start))
        self._seconds[self._span] -= max(moved, 0.0)
        self._seconds["compile"] += max(moved, 0.0)


class _Span:
    """Written out, as contextlib's are several times slower and each step has a few."""

    __slots__ = ("_ledger", "_name", "_around")

    def __init__(self, ledger: Ledger, name: str):
        self._ledger, self._name = ledger, name

    def __enter__(self) -> None:
        self._around = self._ledger._switch(self._name)

    def __exit__(self, *_) -> None:
        self._ledger._switch("other" if self._around == "start_up" else self._around)


def exit_code(error: BaseException | None) -> int:
    """The exit code of a process that this ends.

    Of several processes an error of JAX's is taken to be another one's, as in a collective that one
    died in; not where memory ran out here.
    """
    if isinstance(error, jax.errors.JaxRuntimeError):
        ours = not jax.distributed.is_initialized() or "RESOURCE_EXHAUSTED" in str(error)
        return exit_codes.FAILED if ours else exit_codes.TRANSIENT
    codes = {
        type(None): exit_codes.DONE,
        preemption.Preempted: exit_codes.PREEMPTED,
        KeyboardInterrupt: exit_codes.INTERRUPTED,
        ValueError: exit_codes.USAGE,
        exit_codes.GaveUp: exit_codes.GAVE_UP,
        (OSError, replay.Corrupted): exit_codes.TRANSIENT,
    }
    return next((code for kind, code in codes.items() if isinstance(error, kind)),
                exit_codes.FAILED)  # fmt: skip


def _open(path: pathlib.Path) -> metrics.Lines:
    """The file to append to, where a line cut short by a crash is ended."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = metrics.Lines(path)
    except OSError as error:
        raise ValueError(f"{path.parent} can't be written to: {error.strerror}") from None
    with path.open("rb") as written:
        written.seek(max(0, written.seek(0, os.SEEK_END) - 1))
        if written.read() not in (b"", b"\n"):
            file.write("\n")
    return file
