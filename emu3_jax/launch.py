"""The one command: python -m emu3_jax.launch --config=configs/NAME.py [--config.field=value ...]

A config file returns a job, a dataclass with `run()`. Training the tokenizer, encoding, training
the decoder, generating, converting: each is a job, started the same way on a laptop or a pod.
What a user can cause ends with one line and exit code 2, divergence with 78.
"""

import os
import sys
import warnings

import jax

from emu3_jax import config


def main(argv: list[str]) -> int:
    """Loads the configuration, joins the other processes if there are any, runs the job."""
    warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
    try:
        job = config.load(argv)
        if _many_processes(os.environ):
            jax.distributed.initialize()
        job.run()
    except ValueError as error:
        if os.environ.get("EMU3_JAX_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"diverged: {error}", file=sys.stderr)
        return 78
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _many_processes(environ) -> bool:
    """Whether the scheduler started more than one process, by the variables it sets."""
    return (
        "JAX_COORDINATOR_ADDRESS" in environ
        or "MEGASCALE_COORDINATOR_ADDRESS" in environ
        or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
        or int(environ.get("SLURM_NTASKS", "1")) > 1
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
