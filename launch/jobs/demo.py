"""The demo's decoder in two processes on this machine.

    make demo    (once: it draws the pictures and trains the tokenizer)
    python -m launch.submit --job=launch/jobs/demo.py --to=local

Starts configs/demo.py:decoder as two processes with one CPU device each, and starts them again
after a failure or a preemption, from the last checkpoint.
"""

from launch.spec import Job, Local, Storage


def get_job() -> Job:
    """Two processes."""
    return Job(
        name="demo",
        config="configs/demo.py:decoder",
        storage=Storage(run_dir="runs/demo_two/decoder"),
        local=Local(processes=2, devices=1),
    )
