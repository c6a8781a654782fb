"""What a user sees of each fault, and what is lost: a table, each row of a run that it happened to.

    python -m benchmarks.faults [--only WORD]

The small decoder of benchmarks/chaos.py trains in two processes under the local supervisor. Each
fault happens once, in the middle; the supervisor, or a person where it ends for good, goes on. At
the end the figures of every step must be those of a run that nothing happened to. Faults of the
disk need a tmpfs, and so root on Linux, those of the clock libfaketime (Debian: faketime); without,
they are left out and told of. Prints the table in Markdown and one line of JSON. Time: about 40 s a
fault on two cores.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

from benchmarks import chaos
from emu3_jax import metrics
from tests import test_checkpoint, test_processes

STEPS, INTERVAL, AT = 40, 10, 24  # the fault comes after step AT, four after a save
NOISE = re.compile(r"^\[Gloo\]|^\s*@ |^[EFWI]\d{4} |  step |weights, |goes on at")


class Fault(NamedTuple):
    """Something that `do(children, run_dir)` does to the first attempt, once step AT is told of.

    `between` is done after so many `attempts`, by a person where the supervisor ended. All happens
    `within` what is made of the run's folder.
    """

    name: str
    do: Callable
    between: Callable = lambda run_dir: None
    within: Callable = lambda folder: contextlib.nullcontext()
    attempts: int = 1


class Lacking(Exception):
    """This machine does not have what a fault needs."""


def _signal(number: int) -> Callable:
    return lambda children, run_dir: children[1].send_signal(number)


def _kill_all(children, run_dir) -> None:
    for child in children:
        child.send_signal(signal.SIGKILL)


def _damaged(how: Callable[[pathlib.Path], str]) -> Callable:
    """Damages the newest checkpoint once all processes were killed."""

    def between(run_dir: pathlib.Path) -> None:
        steps = [p for p in (run_dir / "checkpoints").iterdir() if p.name.isdecimal()]
        how(max(steps, key=lambda path: int(path.name)))

    return between


def _fill(children, run_dir: pathlib.Path) -> None:
    with contextlib.suppress(OSError), (run_dir.parent / "filler").open("wb", 0) as file:
        while True:
            file.write(bytes(4096))


def _unfill(run_dir: pathlib.Path) -> None:
    (run_dir.parent / "filler").unlink()


def _read_only(children, run_dir: pathlib.Path) -> None:
    """Covers the disk by itself, read-only: while files are open for writing, it stays as it is."""
    folder = str(run_dir.parent)
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


def _writable(run_dir: pathlib.Path) -> None:
    subprocess.run(["umount", "--lazy", str(run_dir.parent)], check=True)


def _delete_part(children, run_dir: pathlib.Path) -> None:
    store = run_dir.parent.parent / "stores" / "images"
    (store / "part-00001-of-00002").rename(store / "away")
    _kill_all(children, run_dir)  # what has been read stays in memory


def _restore_part(run_dir: pathlib.Path) -> None:
    store = run_dir.parent.parent / "stores" / "images"
    (store / "away").rename(store / "part-00001-of-00002")


@contextlib.contextmanager
def _disk(folder: pathlib.Path):
    """`folder` is a small disk of its own."""
    if os.geteuid():
        raise Lacking("root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def _clock(folder: pathlib.Path):
    """The wall clock of processes is as the file `clock` in `folder` says, within a second."""
    libraries = sorted(pathlib.Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not libraries:
        raise Lacking("libfaketime")
    (folder / "clock").write_text("+0")
    with mock.patch.dict(
        os.environ, LD_PRELOAD=str(libraries[0]), FAKETIME_TIMESTAMP_FILE=str(folder / "clock"),
        FAKETIME_CACHE_DURATION="1", FAKETIME_DONT_FAKE_MONOTONIC="1", NO_FAKE_STAT="1",
    ):  # fmt: skip
        yield


def _set_clock(by: str) -> Callable:
    return lambda children, run_dir: (run_dir.parent / "clock").write_text(by)


FAULTS = (
    Fault("SIGTERM to one process", _signal(signal.SIGTERM)),
    Fault("SIGKILL of one process", _signal(signal.SIGKILL)),
    Fault("SIGSTOP of one process (it hangs)", _signal(signal.SIGSTOP)),
    Fault("SIGKILL of all (power)", _kill_all),
    Fault("... newest checkpoint truncated", _kill_all, _damaged(test_checkpoint.truncated)),
    Fault("... a bit of it flipped", _kill_all, _damaged(test_checkpoint.flipped)),
    Fault("... its metadata missing", _kill_all, _damaged(test_checkpoint.lacking_metadata)),
    Fault("... its directory empty", _kill_all, _damaged(test_checkpoint.empty)),
    Fault("a part of a store deleted", _delete_part, _restore_part, attempts=2),
    Fault("the disk full", _fill, _unfill, _disk),
    Fault("the run directory read-only", _read_only, _writable, _disk),
    Fault("the clock set a day back", _set_clock("-1d"), within=_clock),
    Fault("the clock set a day forward", _set_clock("+1d"), within=_clock),
)  # fmt: skip


def happen(fault: Fault, root: pathlib.Path, whole: pathlib.Path) -> dict:
    """A run in which it happens; how it ended and what was told, by attempt."""
    folder = root / f"{random.randrange(10**9)}"
    folder.mkdir()
    run_dir, begun, struck = folder / "run", [], threading.Event()
    with fault.within(folder):

        def on_start(children):
            begun.append(children)
            if len(begun) == 1:
                threading.Thread(target=_strike, args=(fault, children, run_dir, struck),
                                 daemon=True).start()  # fmt: skip
            if len(begun) == fault.attempts + 1:
                fault.between(run_dir)

        codes = []
        while not codes or codes[-1] != 0:
            assert len(codes) < 4, codes
            codes.append(chaos.run(root / "stores", run_dir, STEPS, INTERVAL, lambda _: 2,
                                   on_start, folder.parent / f"{folder.name}-logs"))  # fmt: skip
        assert struck.is_set(), f"{fault.name}: it did not happen"
        found = chaos.differences(whole, run_dir)
        assert found["largest_relative_difference"] == 0 and found["same_bits"], (fault, found)
        ends = [child.returncode for child in begun[0]]
        return dict(fault=fault.name, ends=ends, again=chaos.again(run_dir),
                    told=_told(folder.parent / f"{folder.name}-logs"))  # fmt: skip


def _strike(fault: Fault, children, run_dir: pathlib.Path, struck: threading.Event) -> None:
    while not (records := metrics.read(run_dir)) or records[-1]["step"] < AT:
        time.sleep(0.02)
    fault.do(children, run_dir)
    struck.set()


def _told(logs: pathlib.Path) -> list[str]:
    """What was said beyond the usual, of the first process, without paths."""
    lines = [line for path in sorted(logs.glob("attempt-*-process-0.log"))
             for line in path.read_text(errors="replace").splitlines()]  # fmt: skip
    told = [re.sub(r"/\S*/(?=\S)", "", line) for line in lines if not NOISE.search(line)]
    return [line for line in dict.fromkeys(told) if line.startswith(
        ("warning", "error", "failed", "preempted", "gave up", "checkpoint"))]  # fmt: skip


def main(only: str, root: pathlib.Path) -> list[dict]:
    """Each fault, one after the other."""
    (root / "stores").mkdir()
    test_processes.write_stores(root / "stores")
    whole = root / "whole"
    quiet = lambda children: None  # noqa: E731
    assert chaos.run(root / "stores", whole, STEPS, INTERVAL, lambda _: 2, quiet,
                     root / "whole-logs") == 0  # fmt: skip
    rows = []
    for fault in FAULTS:
        if only not in fault.name:
            continue
        try:
            rows.append(happen(fault, root, whole))
        except Lacking as lacking:
            print(f"left out, as it needs {lacking}: {fault.name}", flush=True)
            continue
        print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    lines = ["| fault | the processes end with | what the user sees | steps taken again |",
             "|---|---|---|---|"]  # fmt: skip
    for row in rows:
        ends = ", ".join(str(128 - code if code < 0 else code) for code in row["ends"])
        told = "<br>".join(f"`{line[:160]}`" for line in row["told"]) or "the supervisor's line"
        lines.append(f"| {row['fault']} | {ends} | {told} | {row['again']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults with this in their name")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = main(options.only, pathlib.Path(folder))
        print(table(rows))
        print(json.dumps(rows))
