"""Ends a process in which nothing moves any more, and says where each of its threads stood.

A process that died is missed by the others at once; one that hangs, in a collective or in a read
from storage that never comes back, keeps a whole cluster waiting. Whoever started it starts it
again (exit_codes.TRANSIENT), and RUN/stacks-PROCESS.txt tells people where it hung.
"""

import collections
import contextlib
import faulthandler
import os
import pathlib
import threading
import time

from emu3_jax import exit_codes

KEPT = 50  # events
WRITING = 10  # seconds; what hangs may be the file system that the stacks are written to


class Watchdog:
    """While it is open, the process ends unless `pet` is called at least every `seconds`.

    `seconds` of 0 or less turn it off. `process` is the number of this one among the run's.

    It is a thread of this process: it sees what hangs in C code that has let go of Python's lock,
    as collectives, compilation and input do. Where the lock is never given back it can't run. The
    timer of faulthandler could, but would as well end a process that was stopped for so long
    (Ctrl-Z, and fg after lunch), which this one notices. Of several processes the others, which
    wait for the one with the lock, end by theirs.
    """

    def __init__(self, run_dir: str, seconds: float, process: int = 0):
        self._path = pathlib.Path(run_dir) / f"stacks-{process}.txt"
        self._seconds, self._process = seconds, process
        self._events = collections.deque(maxlen=KEPT)
        self._closed = threading.Event()

    def __enter__(self) -> "Watchdog":
        self.pet("the watchdog began")
        if self._seconds > 0:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        if self._seconds > 0:
            self._thread.join()

    def pet(self, event: str, within: float = 0) -> None:
        """Something has moved, as `event` says; the next is due within `seconds`.

        A larger `within`, in seconds too, gives the next one more time: compilation, say.
        """
        now = time.monotonic()
        self._last = now, max(within, self._seconds)
        self._events.append((now, event))

    def _watch(self) -> None:
        pause = self._seconds / 10
        awake = before = time.monotonic()
        while not self._closed.wait(pause):
            now = time.monotonic()
            if now - before > self._seconds / 2:  # so others did not run either: time starts anew
                awake = now
            before = now
            petted, limit = self._last
            if now - max(petted, awake) > limit:
                self._end(now, limit)

    def _end(self, now: float, limit: float) -> None:
        events = "".join(f"{now - at:12.1f} s ago  {event}\n" for at, event in self._events.copy())
        text = (
            f"{time.ctime()}: process {self._process} did nothing for {limit:g} s and ends with "
            f"{exit_codes.TRANSIENT}; its last events:\n{events}"
        )
        try:
            for write in (self._to_terminal, self._to_file):
                writer = threading.Thread(target=write, args=(text,), daemon=True)
                writer.start()
                writer.join(WRITING)
        finally:  # whatever is broken here
            os._exit(exit_codes.TRANSIENT)

    def _to_terminal(self, text: str) -> None:
        _write(2, text)  # not sys.stderr, which the thread that hangs may have locked

    def _to_file(self, text: str) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            _write(file.fileno(), text)


def _write(file: int, text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk, or no terminal
        os.write(file, text.encode())
        faulthandler.dump_traceback(file, all_threads=True)
        os.write(file, b"\n")
