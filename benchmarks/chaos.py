"""A run whose processes are killed at random moments must end as if nothing had happened.

    python -m benchmarks.chaos [--kills 100] [--interval 20] [--seed 0] [--elastic]

Trains a small decoder on a mixture of stores through the local supervisor, undisturbed and then
with SIGKILL to a random process each time a random moment comes: while it starts, between steps,
amid a save. After that many kills it may finish. Both runs must have the same figures at every step
and the same bits in the last checkpoint. With `--elastic` every 10th attempt has another number of
processes, 1 and 4 in turn: then losses must agree to 1e-5.

Prints a line for each kill and one line of JSON: kills by moment, the most steps that were taken
again after one, and in how many checkpoint intervals. Time: about 15 s a kill on two cores.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import threading
import time

import numpy as np

from emu3_jax import checkpoint, goodput, integrity, mesh, metrics, train
from launch import supervisor
from tests import test_processes

DEVICES = 4
MOMENTS = {"start-up": 0.15, "a save": 0.25, "steps": 0.6}  # when to kill, and how often
STARTING = 6  # seconds that a process takes to its first step, about


def get_config(root: str) -> train.Train:
    """The run on the stores in `root`; steps, save_every and run_dir are the caller's."""
    return dataclasses.replace(
        test_processes.job("Mesh", root), mesh=mesh.Mesh(data=2, fsdp=2), keep=2, fruitless=20,
        xla_cache=f"{root}/xla",
    )  # fmt: skip


@dataclasses.dataclass
class Chaos:
    """Kills a random process of each attempt until it has done so `kills` times.

    `run_dir` is the run's, `interval` the steps between its checkpoints.
    """

    run_dir: pathlib.Path
    interval: int
    kills: int
    random: random.Random
    done: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def on_start(self, children) -> None:
        """Chooses when to kill one of an attempt's processes, and does so in the background."""
        if self.done.total() < self.kills:
            threading.Thread(target=self._kill, args=(children,), daemon=True).start()

    def _kill(self, children) -> None:
        moment = self.random.choices(list(MOMENTS), list(MOMENTS.values()))[0]
        victim, share = self.random.randrange(len(children)), self.random.random()
        begin, first = time.monotonic(), self._step()
        while all(child.poll() is None for child in children):
            if self._is(moment, first, share, time.monotonic() - begin):
                children[victim].send_signal(signal.SIGKILL)
                self.done[moment] += 1
                print(f"killed process {victim} of {len(children)} at step {self._step()}, amid "
                      f"{moment} ({self.done.total()} of {self.kills})", flush=True)  # fmt: skip
                return
            time.sleep(0.005)

    def _is(self, moment: str, first: int, share: float, seconds: float) -> bool:
        if moment == "start-up":
            return seconds >= share * STARTING
        after = self._step() - first
        if moment == "a save":
            saving = list((self.run_dir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
            return after > 0 and bool(saving)
        return after >= 1 + share * 1.5 * self.interval

    def _step(self) -> int:
        """The last step that was told of; with log_every=1, the last one but one."""
        records = metrics.read(self.run_dir)
        return records[-1]["step"] if records else 0


def run(stores, run_dir, steps: int, interval: int, processes, on_start, logs=None) -> int:
    """Supervises the run on `stores` in `run_dir` to its end; the exit code."""
    command = [
        sys.executable, "-m", "emu3_jax.launch", f"--config={__file__}:{stores}",
        f"--config.run_dir={run_dir}", f"--config.steps={steps}",
        f"--config.save_every={interval}",
    ]  # fmt: skip
    environ = os.environ | dict(
        EMU3_HEARTBEAT_TIMEOUT="10", EMU3_SHUTDOWN_TIMEOUT="10", EMU3_INITIALIZATION_TIMEOUT="60",
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0", JAX_DEFAULT_MATMUL_PRECISION="highest",
        XLA_FLAGS="--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
    )  # fmt: skip
    return supervisor.supervise(
        command, processes, logs or run_dir / "logs", devices=DEVICES, environ=environ,
        max_restarts=10_000, longest_delay=0, patience=1, on_start=on_start,
    )  # fmt: skip


def elastic(restarts: int) -> int:
    """Two processes; every 10th time 1 or 4 of them, in turn."""
    return 2 if restarts % 10 != 9 else (1, 4)[restarts // 10 % 2]


def differences(one: pathlib.Path, other: pathlib.Path) -> dict:
    """How far the figures of two runs are apart, relatively, and whether their last bits are."""
    worst, pairs = 0.0, list(zip(metrics.read(one), metrics.read(other), strict=True))
    for a, b in pairs:
        assert a["step"] == b["step"] and a.keys() - metrics.TIMED == b.keys() - metrics.TIMED
        for key in a.keys() - metrics.TIMED:
            worst = max(worst, abs(a[key] - b[key]) / max(1e-30, abs(a[key])))
    last = [integrity.read_about(path / "checkpoints" / str(int(pairs[-1][0]["step"])))
            for path in (one, other)]  # fmt: skip
    weights = [checkpoint.restore_model(str(path))[1]["embed"] for path in (one, other)]
    same = last[0]["fingerprints"] == last[1]["fingerprints"] and np.array_equal(*weights)
    return dict(steps=len(pairs), largest_relative_difference=worst, same_bits=same)


def again(run_dir: pathlib.Path) -> int:
    """The most steps that an attempt took a second time because the one before was killed."""
    attempts = [a for a in goodput.read(str(run_dir)) if a.stretches]
    ends = [max(s.steps[-1] for s in attempt.stretches) for attempt in attempts]
    starts = [attempt.step for attempt in attempts]
    return max((end - start for end, start in zip(ends, starts[1:], strict=False)), default=0)


def main(kills: int, interval: int, seed: int, is_elastic: bool, root: pathlib.Path) -> dict:
    """Both runs; the figures. AssertionError if they do not end alike."""
    test_processes.write_stores(root)
    steps = max(2, kills) * interval
    whole = root / "undisturbed"
    assert run(root, whole, steps, interval, lambda _: 2, lambda _: None) == 0
    chaos = Chaos(root / "chaos", interval, kills, random.Random(seed))
    begin = time.monotonic()
    code = run(root, root / "chaos", steps, interval, elastic if is_elastic else lambda _: 2,
               chaos.on_start)  # fmt: skip
    assert code == 0, code
    found = differences(whole, root / "chaos")
    repeated = again(root / "chaos")
    result = dict(
        kills=chaos.done.total(), **{f"amid {moment}": n for moment, n in chaos.done.items()},
        elastic=is_elastic, interval=interval, **found, most_steps_again=repeated,
        intervals_again=round(repeated / interval, 2), seconds=round(time.monotonic() - begin),
        goodput=round(goodput.summary(goodput.read(str(root / "chaos"))).goodput, 3),
    )  # fmt: skip
    assert found["largest_relative_difference"] <= (1e-5 if is_elastic else 0), found
    assert found["same_bits"] or is_elastic, found
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--interval", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--elastic", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(main(options.kills, options.interval, options.seed, options.elastic,
                              pathlib.Path(folder))))  # fmt: skip
