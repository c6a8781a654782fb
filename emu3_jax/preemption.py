"""Notice that this run is about to lose its machine: SIGTERM, from a scheduler or a person.

A run of several processes stops at one step in all of them, whichever was told: JAX's coordination
service, which takes the signal over when the processes meet, agrees on it. A run of one process has
a handler of its own.
"""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
    """The run was told to stop, and has saved; the message says where."""


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
