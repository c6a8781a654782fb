"""Notice that this run is about to lose its machine: SIGTERM, from a scheduler or a person.

Training saves and stops, which a run of several processes does at one step in all of them,
whichever was told: JAX's coordination service, which takes the signal over when the processes meet,
agrees on it. A run of one process has a handler of its own. Every other job is made of parts that
are each written at once, and stops wherever it is.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class Preempted(BaseException):
    """The run was told to stop; the message says what is saved. No Exception, which a job may catch
    to go on with the next record."""


@contextlib.contextmanager
def heeded(job) -> Iterator[None]:
    """Within, SIGTERM raises Preempted in the main thread.

    Not in one of several processes whose job has `stops_together`: the handler would replace that
    of JAX, which tells the others.
    """
    together = jax.distributed.is_initialized() and getattr(job, "stops_together", False)
    if together or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None is a handler not of Python


def _raise(*_) -> None:
    raise Preempted("told to stop")


class Notice:
    """While it is open, SIGTERM does not end the process but makes `reached` true."""

    def __enter__(self) -> "Notice":
        self._told, self._before = False, None
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self, step: int) -> bool:
        """Whether to save and stop now; to be asked by all processes after each step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._told

    def _tell(self, *_) -> None:
        self._told = True
