"""The supervisor and the back end local: real processes, most of them shells that end as told."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from emu3_jax import metrics
from launch import local, spec, supervisor
from tests import test_processes

ROOT = pathlib.Path(__file__).parent.parent
file = test_processes.file  # a fixture


def shell(logs: pathlib.Path, script: str) -> list[str]:
    """A command; the script sees its process as $i and the number of its attempt as $n."""
    count = f"i=$EMU3_PROCESS_ID; n=$(ls {logs} | grep -c process-0); "
    return ["sh", "-c", count + script]


def plan(logs: pathlib.Path, *attempts: str) -> list[str]:
    """A command that ends in attempt n as word i of attempts[n - 1] says: a code, or -SIGNAL."""
    cases = ""
    for n, words in enumerate(attempts, 1):
        for i, word in enumerate(words.split()):
            ending = f"kill {word} $$" if word.startswith("-") else f"exit {word}"
            cases += f"{n}-{i}) {ending};; "
    return shell(logs, f"case $n-$i in {cases}*) exit 99;; esac")


def supervise(command: list[str], logs: pathlib.Path, processes: int = 2, **options) -> int:
    """Two processes, and no delays."""
    options = dict(devices=processes, longest_delay=0, patience=0.3) | options
    return supervisor.supervise(command, lambda restarts: processes, logs, **options)


def attempts(logs: pathlib.Path) -> int:
    return len(list(logs.glob("attempt-*-process-0.log")))


@pytest.mark.parametrize(
    "max_restarts, ends, code, needed",
    [
        (0, ["0 0"], 0, 1),
        # preemptions do not count, also where some were done or had not begun
        (0, ["42 42", "42 143", "0 42", "143 0", "0 0"], 0, 5),
        # another attempt would end the same, whatever else ended
        (9, ["2 2", "0 0"], 2, 1),
        (9, ["75 78", "0 0"], 78, 1),
        (9, ["42 2", "0 0"], 2, 1),
        # failures count
        (4, ["1 1", "75 0", "42 75", "134 134", "0 0"], 0, 5),
        (2, ["-KILL 75", "-SEGV 75", "-KILL 75", "0 0"], 137, 3),
        (0, ["1 0", "0 0"], 1, 1),
        # a preemption between failures gives none of them back
        (1, ["75 75", "42 42", "75 75", "0 0"], 75, 3),
    ],
)
def test_the_policy_of_exit_codes(max_restarts, ends, code, needed, tmp_path):
    """The supervisor ends with the code, after as many attempts as it takes."""
    assert supervise(plan(tmp_path, *ends), tmp_path, max_restarts=max_restarts) == code
    assert attempts(tmp_path) == needed


def test_what_it_says(tmp_path, capfd):
    """A line for each event, between which the first process speaks; files have all."""
    command = plan(tmp_path, "0 -KILL", "0 42", "0 99", "0 0")
    command[-1] = f"echo hello; echo from $EMU3_PROCESS_ID >&2; {command[-1]}"
    assert supervise(command, tmp_path, max_restarts=2) == 0
    logs = [tmp_path / f"attempt-00{n}-process-1.log" for n in (1, 2, 3, 4)]
    assert capfd.readouterr().out.replace("hello\nfrom 0\n", "") == (
        "attempt 1: process 1 ended with 137 (killed: out of memory, or too slow to stop), see "
        f"{logs[0]}; starting again (1 of 2 counted)\n"
        "attempt 2: process 1 ended with 42 (told to stop, and saved), see "
        f"{logs[1]}; starting again (not counted)\n"
        f"attempt 3: process 1 ended with 99, see {logs[2]}; starting again (2 of 2 counted)\n"
        "attempt 4: all steps are done\n"
    )
    assert [path.read_text() for path in logs] == 4 * ["hello\nfrom 1\n"]
    assert (tmp_path / "attempt-004-process-0.log").read_text() == "hello\nfrom 0\n"


def test_what_ends_it_for_good(tmp_path, capfd):
    assert supervise(plan(tmp_path, "0 78"), tmp_path) == 78
    assert supervise(plan(tmp_path, "", "0 1"), tmp_path, max_restarts=0) == 1
    log = tmp_path / "attempt-00{}-process-1.log"
    assert capfd.readouterr().out == (
        "attempt 1: process 1 ended with 78 (diverged, or many attempts without a new checkpoint), "
        f"see {log}; another attempt would end the same\n".format(1)
        + f"attempt 2: process 1 ended with 1 (an unforeseen exception), see {log}; "
        "all 0 restarts are used up\n".format(2)
    )


def alive(pid: int) -> bool:
    """Whether there is such a process, and not only its exit code."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(logs: pathlib.Path, count: int) -> list[int]:
    """What the processes of the first attempt printed: their ids, or those of what they started."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = [p.read_text().split() for p in sorted(logs.glob("attempt-001-*"))]
        if len(found) == count and all(found):
            return [int(pid) for words in found for pid in words]
        time.sleep(0.02)
    raise TimeoutError(f"{found} in {logs}")


def test_never_two_generations_at_once(tmp_path):
    """A process that hangs when another has failed is killed, with all that it has started."""
    command = shell(
        tmp_path,
        """
        if [ $n = 1 ]; then trap '' TERM; sleep 60 & echo $$ $!; [ $i = 1 ] && exit 75; wait; fi""",
    )
    before = []

    def on_start(children):
        if before:
            assert not any(alive(pid) for pid in before)
        else:
            before.extend(pids(tmp_path, 2))

    start = time.monotonic()
    assert supervise(command, tmp_path, on_start=on_start, max_restarts=1) == 0
    assert len(before) == 4 and attempts(tmp_path) == 2
    assert 0.3 < time.monotonic() - start < 10


def test_those_who_save_get_the_time_they_need(tmp_path):
    """Where a process was preempted, the others have the grace period, not the short patience."""
    command = shell(tmp_path, "[ $n = 2 ] || { [ $i = 1 ] || sleep 1; exit 42; }")
    assert supervise(command, tmp_path, max_restarts=0, patience=0.1, grace_seconds=30) == 0
    assert attempts(tmp_path) == 2


def test_too_slow_to_save_counts(tmp_path):
    command = shell(tmp_path, "[ $i = 1 ] || sleep 60; exit 42")
    assert supervise(command, tmp_path, max_restarts=0, grace_seconds=0.2) == 137


def send(*signals: int, after: float = 0.0):
    """Sends signals to the supervisor when the processes of an attempt say that they run."""

    def on_start(children):
        logs = pathlib.Path(os.readlink(f"/proc/{children[0].pid}/fd/1")).parent

        def later():
            pids(logs, len(children))
            for number in signals:
                time.sleep(after)
                os.kill(os.getpid(), number)

        threading.Thread(target=later).start()

    return on_start


SAVES = "trap 'kill $!; exit 42' TERM; sleep 60 & echo $$; wait"
HANGS = "trap '' TERM; echo $$; sleep 60"


@pytest.mark.parametrize(
    "script, signals, grace_seconds, code",
    [
        (SAVES, [signal.SIGTERM], 30, 42),
        (SAVES, [signal.SIGINT], 30, 130),
        ("echo $$; exec sleep 60", [signal.SIGTERM], 30, 143),
        (HANGS, [signal.SIGTERM], 0.3, 137),
        (HANGS, [signal.SIGINT, signal.SIGINT], 30, 130),
        ("trap 'kill $!; exit 0' TERM; sleep 60 & echo $$; wait", [signal.SIGTERM], 30, 0),
        ("trap 'kill $!; exit 78' TERM; sleep 60 & echo $$; wait", [signal.SIGTERM], 30, 78),
    ],
)
def test_told_to_stop(script, signals, grace_seconds, code, tmp_path):
    """All are told, waited for, and not started again; told twice, it does not wait."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    start = time.monotonic()
    options = dict(grace_seconds=grace_seconds, on_start=send(*signals, after=0.1))
    assert supervise(shell(tmp_path, script), tmp_path, **options) == code
    assert attempts(tmp_path) == 1 and time.monotonic() - start < 10
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_stop_between_attempts(number, code, tmp_path, capfd):
    command = shell(tmp_path, "echo $$; exit 75")
    assert supervise(command, tmp_path, longest_delay=60, on_start=send(number, after=0.1)) == code
    # the wait is 0.2 seconds
    assert capfd.readouterr().out.endswith("told to stop between two attempts\n")
    assert attempts(tmp_path) == 1


@pytest.mark.skipif(not supervisor._dying_with_us(), reason="only Linux kills children so")
def test_no_process_outlives_the_supervisor(tmp_path):
    """Not even when it is killed; the next supervisor goes on counting."""
    command = shell(tmp_path, "trap '' TERM; echo $$; sleep 60")
    code = f"""if True:
        from launch import supervisor
        supervisor.supervise({command!r}, lambda restarts: 2, {str(tmp_path)!r}, devices=2)
    """
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    running = pids(tmp_path, 2)
    child.kill()
    child.wait()
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in running) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in running)
    assert supervise(plan(tmp_path, "", "0 0"), tmp_path) == 0
    assert attempts(tmp_path) == 2


def test_one_supervisor_at_a_time(tmp_path):
    """Two would be two generations of one run."""

    def on_start(children):
        with pytest.raises(ValueError, match=(
            f"^{tmp_path}: process {os.getpid()} supervises this run already; "
            f"end it with kill -TERM {os.getpid()}$"
        )):  # fmt: skip
            supervise(["true"], tmp_path)

    assert supervise(["true"], tmp_path, on_start=on_start) == 0
    assert supervise(["true"], tmp_path) == 0


def test_each_process_knows_its_place_in_each_attempt(tmp_path):
    """The number of processes may change; the devices of all together do not."""
    command = shell(tmp_path, "env | grep -E '^(EMU3_|JAX_|XLA_)'; [ $n = 3 ] || exit 75")
    environ = os.environ | dict(
        XLA_FLAGS=f"--a=1 {supervisor.DEVICES}=8 --b=2", EMU3_HEARTBEAT_TIMEOUT="10"
    )
    code = supervisor.supervise(command, lambda restarts: 2**restarts, tmp_path, devices=4,
                                environ=environ, longest_delay=0)  # fmt: skip
    assert code == 0
    addresses = set()
    for attempt, count in ((1, 1), (2, 2), (3, 4)):
        logs = sorted(tmp_path.glob(f"attempt-00{attempt}-*"))
        assert len(logs) == count
        for index, log in enumerate(logs):
            values = dict(line.split("=", 1) for line in log.read_text().splitlines())
            assert values.pop("XLA_FLAGS") == f"--a=1 --b=2 {supervisor.DEVICES}={4 // count}"
            assert values["JAX_COORDINATOR_ADDRESS"].startswith("127.0.0.1:")
            addresses.add((attempt, values.pop("JAX_COORDINATOR_ADDRESS")))
            assert values.items() >= dict(
                EMU3_NUM_PROCESSES=str(count), EMU3_PROCESS_ID=str(index), JAX_PLATFORMS="cpu",
                EMU3_HEARTBEAT_TIMEOUT="10",
            ).items()  # fmt: skip
    assert len(addresses) == 3, "one for each attempt"


def test_devices_that_do_not_split(tmp_path):
    with pytest.raises(ValueError, match="^3 devices do not split over 2 processes$"):
        supervise(["true"], tmp_path, devices=3)


def test_attempts_that_end_quickly_are_started_ever_more_slowly(tmp_path):
    """Up to a limit."""
    starts = []
    options = dict(longest_delay=0.5, on_start=lambda _: starts.append(time.monotonic()))
    command = plan(tmp_path, "1 1", "42 42", "1 1", "0 0")
    assert supervise(command, tmp_path, **options) == 0
    waits = [late - early for early, late in itertools.pairwise(starts)]
    for wait, least in zip(waits, (0.2, 0.4, 0.5), strict=True):
        assert least <= wait < least + 0.3


def test_output_of_old_attempts_goes(tmp_path):
    for attempt in range(1, 31):
        (tmp_path / f"attempt-{attempt:03}-process-0.log").write_text("old")
    assert supervise(["true"], tmp_path) == 0
    assert attempts(tmp_path) == supervisor.KEPT
    assert (tmp_path / "attempt-031-process-1.log").exists()


def job(**fields) -> spec.Job:
    defaults = dict(name="a-job", config="configs/demo.py:decoder", overrides=("steps=7",),
                    env=dict(TOLD="it is"))  # fmt: skip
    return spec.Job(**defaults | fields)


def test_the_back_end_starts_the_command_of_the_job(tmp_path, monkeypatch):
    """As --dry-run shows it: the same words and variables, by hand or under the supervisor."""
    monkeypatch.delenv("XLA_FLAGS")
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$@" $EMU3_PROCESS_ID/$EMU3_NUM_PROCESSES $TOLD $XLA_FLAGS\n'
    )
    python.chmod(0o755)
    asked = job(
        storage=spec.Storage(run_dir=str(tmp_path / "run")),
        local=spec.Local(processes=2, devices=3, python=str(python)),
    )
    assert local.submit(asked) == 0
    logs = sorted((tmp_path / "run/logs").glob("*.log"))
    said = [path.read_text().strip() for path in logs]
    assert said == [
        f"-u -m emu3_jax.launch --config=configs/demo.py:decoder --config.run_dir={tmp_path}/run "
        f"--config.steps=7 {i}/2 it is {supervisor.DEVICES}=3" for i in range(2)
    ]  # fmt: skip
    (script,) = local.render(asked).values()
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert sorted(shown.stdout.splitlines()) == said


def test_the_back_end_has_no_accelerators():
    for do in (local.submit, local.render):
        with pytest.raises(ValueError, match="^accelerator 'v5p': --to=local has CPU devices only"):
            do(job(accelerator="v5p", topology="2x2x1"))


@pytest.mark.slow
def test_a_killed_process_of_a_real_run(file, tmp_path, monkeypatch):
    """Two processes train; one is killed after a checkpoint, and all goes on from there."""
    run_dir = tmp_path / "run"
    steps, killed = 8, []

    def on_start(children):
        def kill_one():
            while not (run_dir / "checkpoints" / "2").is_dir():
                time.sleep(0.02)
            killed.append(len(metrics.read(run_dir)))
            children[1].kill()

        if not killed:
            threading.Thread(target=kill_one, daemon=True).start()

    command = [sys.executable, "-m", "emu3_jax.launch", f"--config={file}",
               f"--config.run_dir={run_dir}", f"--config.steps={steps}"]  # fmt: skip
    monkeypatch.chdir(ROOT)
    environ = os.environ | dict(EMU3_INITIALIZATION_TIMEOUT="60", EMU3_HEARTBEAT_TIMEOUT="10")
    code = supervisor.supervise(
        command, lambda restarts: 2, run_dir / "logs", devices=8, environ=environ,
        max_restarts=1, longest_delay=0, patience=2, on_start=on_start,
    )  # fmt: skip
    assert code == 0 and killed[0] < steps
    assert attempts(run_dir / "logs") == 2
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
    assert (run_dir / "checkpoints" / str(steps)).is_dir()
    assert "goes on at step" in (run_dir / "logs/attempt-002-process-0.log").read_text()
