"""How a process ends, and what whoever started it does then: the same on every back end.

Launchers read this file; it imports nothing.
"""

DONE = 0
FAILED = 1  # an exception that nobody foresaw
USAGE = 2  # what a user can cause: another attempt would end the same
PREEMPTED = 42  # told to stop, and all is saved
TRANSIENT = 75  # another process or the storage failed, or nothing moved; EX_TEMPFAIL of sysexits.h
GAVE_UP = 78  # diverged, or many attempts without progress; EX_CONFIG of sysexits.h
INTERRUPTED = 130  # by Ctrl-C
TERMINATED = 143  # by SIGTERM before there was anything to save

FATAL = (USAGE, GAVE_UP)  # never started again
UNCOUNTED = (PREEMPTED, TERMINATED)  # started again, however often
# Everything else is started again and counted: also 134 (JAX's coordination service aborts when a
# process is missing), 137 (killed: out of memory, or too slow to stop) and 139 (crashed).

MEANING = {
    DONE: "all steps are done",
    FAILED: "an unforeseen exception",
    USAGE: "the configuration or the data are wrong",
    PREEMPTED: "told to stop, and saved",
    TRANSIENT: "another process or the storage failed, or nothing moved",
    GAVE_UP: "diverged, or many attempts without a new checkpoint",
    INTERRUPTED: "interrupted from the keyboard",
    TERMINATED: "told to stop before anything was to be saved",
    134: "JAX's coordination service missed a process",
    137: "killed: out of memory, or too slow to stop",
    139: "crashed",
}


class GaveUp(Exception):
    """Another attempt would end the same: ends with GAVE_UP, and the message says why."""
