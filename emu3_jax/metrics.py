"""Training figures: RUN/metrics.jsonl, TensorBoard events and a line in the terminal."""

import json
import math
import pathlib
import time

import jax

from emu3_jax import chips, packages

# Figures that hang on how fast things went; all others are the same whenever a run is repeated.
TIMED = {"seconds_per_step", "data_wait", "goodput", "tokens_per_second", "mfu", "mfu_dense"}


class Metrics:
    """Writes the figures of a run from `start` on; what an interrupted run wrote beyond is cut.

    `steps` is the planned number, from which the time left is told, `book` the run's ledger. Of
    several processes, which all have the same figures, the first one writes.
    """

    def __init__(self, run_dir: str, name: str, start: int, steps: int, book):
        self._writes, self._book = jax.process_index() == 0, book
        if not self._writes:
            return
        import tensorboardX  # where PyTorch is installed it loads that, which takes seconds

        self._name, self._start, self._steps = name, start, steps
        path = pathlib.Path(run_dir) / "metrics.jsonl"
        kept = [r for r in read(run_dir) if r["step"] <= start]
        packages.write_whole(path, "".join(map(_json, kept)).encode())
        self._file = Lines(path)
        self._board = tensorboardX.SummaryWriter(str(run_dir), purge_step=start, max_queue=1000)
        self._clock, self._last = None, start
        chip = chips.chip(jax.devices()[0])
        self._peak = chip and chip.flops * jax.device_count()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._writes:
            self._file.close()
            if self._board_writes():
                self._board.close()

    def write(self, step: int, values: dict, about_rows: dict[str, float]) -> dict[str, float]:
        """Records and returns the figures of `step`; `values` may be on devices.

        `tokens` (per step) also gives tokens a second. `flops` and `flops_dense` (per step) give
        the shares `mfu` and `mfu_dense` of what all devices could do at their peak, where that is
        known (see chips.py): the FLOPs that the packing asks for, and those of rows that were one
        document each, as others count. The first call only starts the clock for rates, as its step
        includes compilation. `data_wait` is the share of the time since the call before that the
        loop stood still for its data, `goodput` that of the run's whole time in steps that count.
        What is not finite is null in the file.
        """
        record = dict(step=step, **{key: float(value) for key, value in values.items()})
        record |= about_rows
        self._book.mark(step)
        if self._writes:
            self._write(dict(record))
        return record

    def _write(self, record: dict[str, float]) -> None:
        step, waited = record["step"], self._book.seconds["data"]
        now = time.monotonic()
        if self._clock is not None:
            seconds_per_step = (now - self._clock) / (step - self._last)
            self._rate = seconds_per_step
            record["seconds_per_step"] = seconds_per_step
            record["data_wait"] = (waited - self._waited) / (now - self._clock)
            record["goodput"] = self._book.goodput()
            if "tokens" in record:
                record["tokens_per_second"] = record["tokens"] / seconds_per_step
            if self._peak:
                for flops, mfu in (("flops", "mfu"), ("flops_dense", "mfu_dense")):
                    if flops in record:
                        record[mfu] = record[flops] / seconds_per_step / self._peak
        self._clock, self._last, self._waited = now, step, waited
        self._file.write(_json(record))
        if self._board_writes():
            for key, value in record.items():
                if math.isfinite(value):
                    self._board.add_scalar(key, value, step)
        print(self._line(record), flush=True)

    def _board_writes(self) -> bool:
        """Whether TensorBoard's thread lives: a full disk ends it, and then its queue would fill up
        and hold us for ever. The file has all figures."""
        return self._board.file_writer.event_writer._worker.is_alive()

    def _line(self, record: dict[str, float]) -> str:
        step = record["step"]
        parts = [f"{self._name}  step {step}/{self._steps}"]
        shown = [key for key in record if key.startswith(("loss", "psnr", "usage"))]
        parts += [f"{key} {record[key]:.3f}" for key in shown]
        if record.get("skipped"):
            parts.append(f"skipped {record['skipped']:g}")
        if "tokens_per_second" in record:
            parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in record:
            parts.append(f"MFU {record['mfu']:.1%}")
        if "seconds_per_step" in record:
            parts.append(f"{time_left(record['seconds_per_step'] * (self._steps - step))} left")
        return "  ".join(parts)


class Lines:
    """A file that grows by lines; ones for which the disk has no room wait, and are told of."""

    def __init__(self, path: pathlib.Path):
        self._path, self._waiting, self._told = path, b"", False
        self._file = path.open("ab", buffering=0)

    def write(self, line: str) -> None:
        """Appends a line, after those that wait."""
        self._waiting += line.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._told:
                print(f"warning: {self._path}: {error.strerror}; its lines wait", flush=True)
        self._told = bool(self._waiting)

    def close(self) -> None:
        """Closes the file; lines that still wait are gone."""
        self._file.close()


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if jax.process_index() == 0:
        print(text, flush=True)


def read(run_dir: str) -> list[dict]:
    """The records of a run, oldest first, NaN for null; a line cut short by a crash is left out."""
    path = pathlib.Path(run_dir) / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        records.append({key: math.nan if x is None else x for key, x in record.items()})
    return records


def _json(record: dict[str, float]) -> str:
    finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
    return json.dumps(finite) + "\n"


def time_left(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
