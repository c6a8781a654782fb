"""Where the wall time of a training run went, over all its restarts, as a table.

    python -m emu3_jax.launch --config=configs/goodput.py --config.run_dir=RUN

Hardware: any; RUN may still be training. Time: seconds. Expected result: seconds and shares of
start-up, compilation, waiting for data, steps, saving, steps that were lost and taken again, and of
the time between attempts; then each attempt and how it ended. emu3_jax/goodput.py says what each of
them is.
"""

from emu3_jax.goodput import Goodput


def get_config() -> Goodput:
    """The job; --config.run_dir is asked for."""
    return Goodput()
