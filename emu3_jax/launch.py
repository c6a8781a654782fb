"""The one command: python -m emu3_jax.launch --config=configs/NAME.py [--config.field=value ...]

A config file returns a job, a dataclass with `run()`. Training the tokenizer, encoding, training
the decoder, generating, converting: each is a job, started the same way on a laptop or a pod.
What a user can cause ends with one line and exit code 2, divergence with 78, training that SIGTERM
told to stop, once it has saved, with 42.

Several processes are one run where each has EMU3_NUM_PROCESSES, its own EMU3_PROCESS_ID and
JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), or where the scheduler of a TPU pod or Slurm says
so. EMU3_INITIALIZATION_TIMEOUT, EMU3_HEARTBEAT_TIMEOUT and EMU3_SHUTDOWN_TIMEOUT are in seconds.
"""

import os
import sys
import warnings

import jax

from emu3_jax import config, exit_codes, preemption

EXPLICIT = ("EMU3_NUM_PROCESSES", "EMU3_PROCESS_ID", "JAX_COORDINATOR_ADDRESS")


def main(argv: list[str]) -> int:
    """Loads the configuration, joins the other processes if there are any, runs the job."""
    warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
    try:
        job = config.load(argv)
        join(os.environ)
        job.run()
    except ValueError as error:
        if os.environ.get("EMU3_JAX_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"diverged: {error}", file=sys.stderr)
        return 78
    except preemption.Preempted as notice:
        print(f"preempted: {notice}; the same command goes on from there", file=sys.stderr)
        return exit_codes.PREEMPTED
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def join(environ) -> None:
    """Makes this process one of a run's, if there are several; no device may be asked for before.

    Raises ValueError if the variables leave open which one of how many it is.
    """
    timeouts = dict(  # a large gang starts slowly, and waits while a broken node is replaced
        initialization_timeout=_number(environ, "EMU3_INITIALIZATION_TIMEOUT", 1800),
        heartbeat_timeout_seconds=_number(environ, "EMU3_HEARTBEAT_TIMEOUT", 100),
        shutdown_timeout_seconds=_number(environ, "EMU3_SHUTDOWN_TIMEOUT", 300),
    )
    if "EMU3_NUM_PROCESSES" in environ or "EMU3_PROCESS_ID" in environ:
        jax.distributed.initialize(**_place(environ), **timeouts)
    elif _many_processes(environ):
        try:
            jax.distributed.initialize(**timeouts)
        except ValueError as error:  # an address alone, and no scheduler that knows the rest
            reason = str(error).rstrip(".")
            raise ValueError(f"{reason}; set {', '.join(EXPLICIT)}") from None


def _place(environ) -> dict:
    """Which process this is, of how many, and where they meet, as JAX's arguments."""
    if missing := [name for name in EXPLICIT if name not in environ]:
        raise ValueError(f"{missing[0]} is not set; each process needs {', '.join(EXPLICIT)}")
    count, index = (_number(environ, name) for name in EXPLICIT[:2])
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
    sys.exit(main(sys.argv[1:]))
