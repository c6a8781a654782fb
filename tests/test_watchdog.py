"""The watchdog, in processes of their own, which load no JAX."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from emu3_jax import exit_codes

ROOT = pathlib.Path(__file__).parent.parent
LIMIT = 0.5  # seconds


@pytest.fixture
def start(tmp_path):
    """Starts a script under a watchdog named dog, which is killed at the end."""
    children = []

    def start(script: str, seconds: float = LIMIT) -> subprocess.Popen:
        head = (
            "import sys, time\nfrom emu3_jax import watchdog\n"
            f"with watchdog.Watchdog({str(tmp_path / 'run')!r}, {seconds}, process=3) as dog:\n"
            "    print('open', flush=True)\n"
        )
        body = "".join(f"    {line}\n" for line in script.splitlines())
        child = subprocess.Popen(
            [sys.executable, "-c", f"{head}{body}\nassert 'jax' not in sys.modules"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        children.append(child)
        assert child.stdout.readline() == "open\n"
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


HANGS = """\
def hang():
    time.sleep(60)
for step in range(60):
    dog.pet(f"step {step}")
hang()"""


def test_a_process_that_hangs_ends_and_says_where(start, tmp_path):
    child = start(HANGS)
    _, said = child.communicate(timeout=30)
    assert child.returncode == exit_codes.TRANSIENT
    written = (tmp_path / "run" / "stacks-3.txt").read_text()
    assert said.splitlines()[:51] == written.splitlines()[:51]
    assert "in hang" in said
    assert "process 3 did nothing for 0.5 s and ends with 75" in written
    assert "in hang" in written and "in _watch" in written  # every thread
    assert "s ago  step 59\n" in written and "s ago  step 10\n" in written
    assert "step 9\n" not in written  # the last 50


def test_stacks_of_an_attempt_before_are_kept(start, tmp_path):
    for _ in range(2):
        start("time.sleep(60)", seconds=0.1).communicate(timeout=30)
    written = (tmp_path / "run" / "stacks-3.txt").read_text()
    assert written.count("did nothing for 0.1 s") == 2


def test_it_ends_also_where_the_stacks_cannot_be_written(start, tmp_path):
    (tmp_path / "run").write_text("no directory")
    child = start("time.sleep(60)", seconds=0.1)
    _, said = child.communicate(timeout=30)
    assert child.returncode == exit_codes.TRANSIENT and "did nothing" in said


def test_a_process_that_moves_lives(start, tmp_path):
    child = start("for step in range(12):\n    dog.pet('step')\n    time.sleep(0.1)")
    assert child.wait(timeout=30) == 0
    assert not (tmp_path / "run").exists()


def test_an_event_may_give_the_next_more_time(start):
    child = start("dog.pet('compiles', within=60)\ntime.sleep(1.2)\ndog.pet('step')")
    assert child.wait(timeout=30) == 0
    child = start("dog.pet('compiles', within=60)\ndog.pet('step')\ntime.sleep(60)")
    assert child.wait(timeout=30) == exit_codes.TRANSIENT


def test_time_in_which_the_process_was_stopped_does_not_count(start):
    """It begins anew after that."""
    child = start("time.sleep(60)")
    child.send_signal(signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)
    time.sleep(2 * LIMIT)
    woken = time.monotonic()
    child.send_signal(signal.SIGCONT)
    assert child.wait(timeout=30) == exit_codes.TRANSIENT
    assert time.monotonic() - woken >= LIMIT


def test_it_can_be_off(start):
    child = start("time.sleep(0.6)", seconds=0)
    assert child.wait(timeout=30) == 0
