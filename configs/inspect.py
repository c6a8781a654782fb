"""What the model of a training run sees, as a page; and whether a store is as it was written.

    python -m emu3_jax.launch --config=configs/inspect.py --config.train=configs/FILE.py[:STAGE] \\
        [--config.tokenizer=DIR] [--config.rows=8] [--config.step=12000] \\
        [--config.directory=runs/inspect]
    python -m emu3_jax.launch --config=configs/inspect.py:verify --config.store=DIR

Hardware: any; with Emu3's tokenizer a picture of 512x512 pixels takes a minute on a CPU. Time:
seconds, and what the reading of the store takes for verify, which tells how much is left. Expected
result: inspect.html, by itself, with the rows of the step, and the same statistics printed; verify
prints each damaged column of each part and ends with exit code 2 if there is one. After `make demo`

    python -m emu3_jax.launch --config=configs/inspect.py --config.tokenizer=runs/demo/tokenizer

shows what the demo's decoder was trained on.
"""

from data_pipelines.inspect import Inspect
from data_pipelines.verify import Verify

JOBS = {"rows": Inspect, "verify": Verify}


def get_config(job: str = "rows") -> Inspect | Verify:
    """The page's job, or "verify"; ValueError names them."""
    if job not in JOBS:
        raise ValueError(f"no job {job!r}; take one of {', '.join(JOBS)}")
    return JOBS[job]()
