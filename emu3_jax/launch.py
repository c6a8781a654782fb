"""The one command: python -m emu3_jax.launch --config=configs/NAME.py [--config.field=value ...]

A config file returns a job, a dataclass with `run()`. Training the tokenizer, encoding, training
the decoder, generating, converting: each is a job, started the same way on a laptop or a pod.
What a user can cause ends with one line. The exit code says what to do next (exit_codes.py).

Several processes are one run where each has EMU3_NUM_PROCESSES, its own EMU3_PROCESS_ID and
JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), or where the scheduler of a TPU pod or Slurm says
so. In a pod of a JobSet, EMU3_SLICE_ID and EMU3_HOSTS_PER_SLICE stand for EMU3_PROCESS_ID, with
Kubernetes' own JOB_COMPLETION_INDEX. EMU3_INITIALIZATION_TIMEOUT, EMU3_HEARTBEAT_TIMEOUT and
EMU3_SHUTDOWN_TIMEOUT are in seconds.
"""

import contextlib
import os
import signal
import sys
import time

from emu3_jax import exit_codes

BEGAN = time.monotonic()

if __name__ == "__main__":  # before all that takes time; a container's first process has no default
    signal.signal(signal.SIGTERM, lambda *_: os._exit(exit_codes.TERMINATED))

import traceback  # noqa: E402
import warnings  # noqa: E402

import jax  # noqa: E402
from jax._src import distributed  # noqa: E402

from emu3_jax import config, ledger, preemption  # noqa: E402

EXPLICIT = ("EMU3_NUM_PROCESSES", "EMU3_PROCESS_ID", "JAX_COORDINATOR_ADDRESS")
POD = ("EMU3_SLICE_ID", "EMU3_HOSTS_PER_SLICE", "JOB_COMPLETION_INDEX")
TOLD = {
    exit_codes.USAGE: "error: {}",
    exit_codes.GAVE_UP: "gave up: {}",
    exit_codes.PREEMPTED: "preempted: {}; the same command goes on from there",
    exit_codes.INTERRUPTED: "\ninterrupted; the same command goes on from the last checkpoint",
    exit_codes.TRANSIENT: "failed: {}; the same command goes on from the last checkpoint",
}
LEAVING = 30  # seconds in which processes that come to the same end do so


def main(argv: list[str]) -> int:
    """Loads the configuration, joins the other processes if there are any, runs the job."""
    warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
    try:
        job = config.load(argv)
        join(os.environ)
        with preemption.heeded(job):
            ledger.loaded(BEGAN)
            job.run()
    except (Exception, preemption.Preempted, KeyboardInterrupt) as error:
        code = ledger.exit_code(error)
        if code == exit_codes.USAGE and os.environ.get("EMU3_JAX_TRACEBACK"):
            raise
        if code in (exit_codes.FAILED, exit_codes.TRANSIENT):
            traceback.print_exc()
        if code in TOLD:
            print(TOLD[code].format(error), file=sys.stderr)
        return code
    return exit_codes.DONE


def leave(code: int) -> None:
    """Ends the process, one of several without JAX's own farewell.

    That waits minutes for processes that died or hang, and then aborts with another code. Where all
    come to the same end, none leaves before: the first one is where the others meet. Threads are
    not waited for either: one may still wait for what another process failed to do.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    several = jax.distributed.is_initialized() and jax.process_count() > 1
    failed = code in (exit_codes.TRANSIENT, exit_codes.FAILED)
    if several and not failed:
        # where it fails, the others came to another end, which is theirs to tell
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client = distributed.global_state.client
            client.wait_at_barrier("emu3_jax_leaves", timeout_in_ms=LEAVING * 1000)
            jax.distributed.shutdown()
    if several or failed:
        os._exit(code)
    sys.exit(code)


def join(environ) -> None:
    """Makes this process one of a run's, if there are several; no device may be asked for before.

    Raises ValueError if the variables leave open which one of how many it is.
    """
    timeouts = dict(  # a large gang starts slowly, and waits while a broken node is replaced
        initialization_timeout=_number(environ, "EMU3_INITIALIZATION_TIMEOUT", 1800),
        heartbeat_timeout_seconds=_number(environ, "EMU3_HEARTBEAT_TIMEOUT", 100),
        shutdown_timeout_seconds=_number(environ, "EMU3_SHUTDOWN_TIMEOUT", 300),
    )
    if not {"EMU3_NUM_PROCESSES", "EMU3_PROCESS_ID", "EMU3_SLICE_ID"}.isdisjoint(environ):
        jax.distributed.initialize(**_place(environ), **timeouts)
    elif _many_processes(environ):
        try:
            jax.distributed.initialize(**timeouts)
        except ValueError as error:  # an address alone, and no scheduler that knows the rest
            reason = str(error).rstrip(".")
            raise ValueError(f"{reason}; set {', '.join(EXPLICIT)}") from None


def _place(environ) -> dict:
    """Which process this is, of how many, and where they meet, as JAX's arguments."""
    names = EXPLICIT
    if "EMU3_SLICE_ID" in environ and "EMU3_PROCESS_ID" not in environ:
        names = (EXPLICIT[0], *POD, EXPLICIT[2])
    if missing := [name for name in names if name not in environ]:
        raise ValueError(f"{missing[0]} is not set; each process needs {', '.join(names)}")
    count, *index = (_number(environ, name) for name in names[:-1])
    index = index[0] if len(index) == 1 else index[0] * index[1] + index[2]
    if index >= count:
        raise ValueError(f"EMU3_PROCESS_ID={index}: EMU3_NUM_PROCESSES={count} are counted from 0")
    address = environ["JAX_COORDINATOR_ADDRESS"]
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        raise ValueError(f"JAX_COORDINATOR_ADDRESS={address}: want process 0's HOST:PORT")
    here = host in ("localhost", "[::1]") or host.startswith("127.")
    return dict(
        coordinator_address=address, num_processes=count, process_id=index,
        cluster_detection_method="deactivate",
        # None is every address of the machine
        coordinator_bind_address=address if here else None,
    )  # fmt: skip


def _number(environ, name: str, default: int = 0) -> int:
    text = environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"{name}={text}: want a whole number")
    return int(text)


def _many_processes(environ) -> bool:
    """Whether the scheduler started more than one process, by the variables it sets."""
    return (
        "JAX_COORDINATOR_ADDRESS" in environ
        or "MEGASCALE_COORDINATOR_ADDRESS" in environ
        or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
        or _number(environ, "SLURM_NTASKS", 1) > 1
    )


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
