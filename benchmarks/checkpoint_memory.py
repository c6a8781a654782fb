"""How much host memory a save, its read-back and a restore take beyond the arrays themselves.

    python -m benchmarks.checkpoint_memory [--arrays 8] [--mib 64]

Arrays of `--mib` MiB, each cut over eight CPU devices, are saved, read back and restored, each time
in a process of its own, whose peak resident memory is compared with what it had before. Prints one
line of JSON, in MiB: the state, what one device holds of it (a shard), and the extra of each stage.
CPU devices have their arrays in the host's memory, so what is restored is taken off as well.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

MIB = 2**20
STAGES = ("save", "read back", "restore")


def measure(stage: str, directory: str, arrays: int, mib: int) -> float:
    """The extra MiB of a stage, in this process."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    import jax
    import numpy as np

    from emu3_jax import checkpoint, integrity, mesh, train
    from tests import toy

    device_mesh = mesh.Mesh().make()
    layout = mesh.sharding(device_mesh, "DF")
    shape = (8 * mib, MIB // 32)  # of float32: 8 * mib * 32 Ki * 4 bytes
    job = train.Train(toy.model(), toy.Counting())
    with jax.set_mesh(device_mesh), checkpoint.Checkpoints(directory) as saved:
        if stage == "read back":
            with _Peak() as peak:
                integrity.verify(pathlib.Path(directory, "checkpoints", "1"), 0, 1)
            return peak.extra
        like = {f"w{i}": jax.ShapeDtypeStruct(shape, "float32", sharding=layout)
                for i in range(arrays)}  # fmt: skip
        if stage == "restore":
            with _Peak() as peak:
                made = saved.restore(1, like)
                jax.block_until_ready(made)
            return peak.extra - sum(x.nbytes for x in made.values()) / MIB
        rng = np.random.default_rng(0)
        made = {name: jax.make_array_from_callback(
            shape, layout, lambda at: rng.random((shape[0] // 8, shape[1]), np.float32))
            for name in like}  # fmt: skip
        jax.block_until_ready(made)
        with _Peak() as peak:
            saved.save(1, made, job, {}, wait=True)
        return peak.extra


class _Peak:
    """The most resident memory within, beyond that at its beginning, in MiB, looked at often."""

    def __enter__(self) -> "_Peak":
        self._begin, self._most, self._ends = _resident(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ends.set()
        self._thread.join()
        self.extra = self._most - self._begin

    def _watch(self) -> None:
        while not self._ends.is_set():
            self._most = max(self._most, _resident())
            time.sleep(0.002)


def _resident() -> float:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def main(arrays: int, mib: int) -> dict:
    """Each stage in a process of its own, on the same checkpoint."""
    figures = dict(state=arrays * mib, shard=arrays * mib / 8, largest_piece=mib / 8)
    with tempfile.TemporaryDirectory() as directory:
        for stage in STAGES:
            command = [sys.executable, "-m", "benchmarks.checkpoint_memory", "--arrays",
                       str(arrays), "--mib", str(mib), "--stage", stage, directory]  # fmt: skip
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            figures[stage] = round(float(said.splitlines()[-1]))
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arrays", type=int, default=8)
    parser.add_argument("--mib", type=int, default=64, help="of each array")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("directory", nargs="?", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        print(measure(options.stage, options.directory, options.arrays, options.mib))
    else:
        print(json.dumps(main(options.arrays, options.mib)))
