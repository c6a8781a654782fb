"""Training figures: RUN/metrics.jsonl, TensorBoard events and a line in the terminal."""

import json
import pathlib
import time
from collections.abc import Iterable, Iterator

import jax

from emu3_jax import chips


class Metrics:
    """Writes the figures of a run from `start` on; what an interrupted run wrote beyond is cut.

    `steps` is the planned number, from which the time left is told. Of several processes, which all
    have the same figures, the first one writes.
    """

    def __init__(self, run_dir: str, name: str, start: int, steps: int):
        self._writes, self._waited = jax.process_index() == 0, 0.0
        if not self._writes:
            return
        import tensorboardX  # where PyTorch is installed it loads that, which takes seconds

        self._name, self._start, self._steps = name, start, steps
        self._path = pathlib.Path(run_dir) / "metrics.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read(run_dir) if r["step"] <= start]
        self._path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = self._path.open("a")
        self._board = tensorboardX.SummaryWriter(str(run_dir), purge_step=start)
        self._clock, self._last = None, start
        chip = chips.chip(jax.devices()[0])
        self._peak = chip and chip.flops * jax.device_count()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._writes:
            self._file.close()
            self._board.close()

    def timed(self, batches: Iterable) -> Iterator:
        """The batches; how long the loop waits for each counts as `data_wait`."""
        batches = iter(batches)
        while True:
            asked = time.time()
            batch = next(batches, None)
            self._waited += time.time() - asked
            if batch is None:
                return
            yield batch

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records the figures of `step`; `tokens` (per step) also gives tokens a second.

        `flops` and `flops_dense` (per step) give the shares `mfu` and `mfu_dense` of what all
        devices could do at their peak, where that is known (see chips.py): the FLOPs that the
        packing asks for, and those of rows that were one document each, as others count. The
        first call only starts the clock for rates, as its step includes compilation. `data_wait` is
        the share of the time since the call before that the loop stood still for its data.
        """
        if not self._writes:
            return
        now = time.time()
        record = dict(step=step, **values)
        if self._clock is not None:
            seconds_per_step = (now - self._clock) / (step - self._last)
            self._rate = seconds_per_step
            record["seconds_per_step"] = seconds_per_step
            record["data_wait"] = self._waited / (now - self._clock)
            if "tokens" in values:
                record["tokens_per_second"] = values["tokens"] / seconds_per_step
            if self._peak:
                for flops, mfu in (("flops", "mfu"), ("flops_dense", "mfu_dense")):
                    if flops in values:
                        record[mfu] = values[flops] / seconds_per_step / self._peak
        self._clock, self._last, self._waited = now, step, 0.0
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for key, value in record.items():
            self._board.add_scalar(key, value, step)
        print(self._line(record), flush=True)

    def _line(self, record: dict[str, float]) -> str:
        step = record["step"]
        parts = [f"{self._name}  step {step}/{self._steps}"]
        shown = [key for key in record if key.startswith(("loss", "psnr", "usage"))]
        parts += [f"{key} {record[key]:.3f}" for key in shown]
        if "tokens_per_second" in record:
            parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in record:
            parts.append(f"MFU {record['mfu']:.1%}")
        if "seconds_per_step" in record:
            parts.append(f"{time_left(record['seconds_per_step'] * (self._steps - step))} left")
        return "  ".join(parts)


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if jax.process_index() == 0:
        print(text, flush=True)


def read(run_dir: str) -> list[dict]:
    """The records of a run, oldest first; a line cut short by a crash is left out."""
    path = pathlib.Path(run_dir) / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def time_left(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
