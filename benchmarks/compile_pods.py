"""What Emu3-8B's training step needs on TPU slices, compiled one after the other without a TPU.

    python -m benchmarks.compile_pods [--only WORD] [--timeout SECONDS]

Prints a table, a line as soon as its compilation ends, and one line of JSON with all that
emu3_jax/compile.py tells of each. A row is a process of its own, so that one that fails or takes
longer than the timeout does not end the others. `--only` takes the rows with this word in their
name or slice. Time: 3 to 4 CPU minutes and 3 GB a row; `auto` takes twice that.

v5e and v6e take 256 rows, one a chip, and so do two slices (two a chip); all else is as in the
configs. MaxText's peaks: version 0.2.5 compiled with jax 0.12.0.1 and libtpu 0.0.52 for the same
slice, mesh, rows and remat.
"""

import argparse
import json
import os
import subprocess
import sys
from typing import NamedTuple


class Row(NamedTuple):
    """A run, as in emu3_jax.compile.Compile, and the peak in GiB that MaxText has for it."""

    name: str
    topology: str
    set: str
    train: str = "configs/emu3_8b_stage1.py"
    maxtext_gib: float | None = None


FULL = "task.remat=full"
ROWS = (
    Row("stage 1, FSDP 64", "v5p:4x4x4", FULL, maxtext_gib=12.73),
    Row("the same, remat auto", "v5p:4x4x4", ""),
    Row("stage 1, FSDP 16 x tensor 4", "v5p:4x4x4", f"{FULL} mesh.fsdp=16 mesh.tensor=4"),
    Row("stage 1, FSDP 256", "v5e:16x16", f"{FULL} batch=256"),
    Row("stage 1, FSDP 256", "v6e:16x16", f"{FULL} batch=256"),
    Row("stage 1, data 2 x FSDP 64", "2*v5p:4x4x4", f"{FULL} batch=256 mesh.data=2"),
    Row("the same in two parts", "2*v5p:4x4x4", f"{FULL} batch=256 mesh.data=2 accumulate=2"),
    Row("stage 2, FSDP 8 x context 16", "v5p:4x4x8", FULL, "configs/emu3_8b_stage2.py", 9.96),
)
COLUMNS = {  # heading -> how a report's figure is found
    "remat": lambda x: x["remat"],
    "fits": lambda x: x["fits"],
    "peak GiB": lambda x: x["peak_hbm_gib"],
    "with all temporaries": lambda x: round(x["argument_gib"] + x["temp_gib"], 2),
    "executed/model": lambda x: x["executed_over_model_matmul"],
    "all-reduce GiB": lambda x: x["collective_gib_per_step"].get("all-reduce", 0),
    "reduce-scatter GiB": lambda x: x["collective_gib_per_step"].get("reduce-scatter", 0),
    "between slices GiB": lambda x: x["collective_gib_per_step"].get("between-slices", 0),
    "largest all-reduce MiB": lambda x: x["largest_all_reduce_mib"],
    "seconds": lambda x: x["compile_seconds"],
}


def main() -> None:
    """Prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--timeout", type=float, default=3600)
    flags = parser.parse_args()
    print("| " + " | ".join(["run", "slice", *COLUMNS, "MaxText's peak GiB"]) + " |")
    print("|---" * (len(COLUMNS) + 3) + "|", flush=True)
    reports = []
    for row in ROWS:
        if flags.only in f"{row.name} {row.topology}":
            reports.append(row._asdict() | compiled(row, flags.timeout))
            print(line(row, reports[-1]), flush=True)
    print(json.dumps(dict(benchmark="compile_pods", rows=reports)))


def compiled(row: Row, timeout: float) -> dict:
    """The compile report of a row, or the `error` that stands in its place."""
    fields = dict(train=row.train, topology=row.topology, set=row.set, advise=False)
    command = [sys.executable, "-m", "emu3_jax.launch", "--config=configs/compile_8b.py",
               *(f"--config.{key}={value}" for key, value in fields.items())]  # fmt: skip
    environ = os.environ | dict(JAX_PLATFORMS="cpu")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environ)
    except subprocess.TimeoutExpired:
        return dict(error=f"took longer than {timeout:g} s")
    if done.returncode:
        return dict(error=(done.stderr or done.stdout).strip()[-300:])
    return json.loads(done.stdout.splitlines()[-1])


def line(row: Row, report: dict) -> str:
    """A row of the table."""
    if "error" in report:
        figures = [" ".join(report["error"].split())] + ["-"] * (len(COLUMNS) - 1)
    else:
        figures = [str(find(report)) for find in COLUMNS.values()]
    return "| " + " | ".join([row.name, row.topology, *figures, str(row.maxtext_gib or "-")]) + " |"


if __name__ == "__main__":
    main()
