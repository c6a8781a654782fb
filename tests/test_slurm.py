"""The back end slurm: its script as a shell reads it, and on a real Slurm of two nodes."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from emu3_jax import metrics
from launch import slurm, spec
from tests import test_processes

ROOT = pathlib.Path(__file__).parent.parent
file = test_processes.file  # a fixture


def job(**fields) -> spec.Job:
    return spec.Job(**dict(name="a-job", config="configs/demo.py:decoder") | fields)


def script(asked: spec.Job) -> str:
    (text,) = slurm.render(asked).values()
    return text


def directives(text: str) -> list[str]:
    return re.findall("^#SBATCH --(.*)$", text, re.MULTILINE)


CONTAINER = spec.Slurm(
    partition="p", account="a b", container_image="/fs/image.sqsh", directory="/opt/emu3",
    container_mounts=("/fs", "/usr/local/gib"), setup=("source /a/b.sh", "export C='d e'"),
)  # fmt: skip
JOBS = {
    "cpu": job(nodes=2, env=dict(QUOTES="a 'b' \"c\" $d `e`")),
    "h200": job(accelerator="h200", nodes=32, storage=spec.Storage("/fs/run", xla_cache="/fs/c")),
    "one task": job(accelerator="h100", slurm=spec.Slurm(tasks=1, directory="/fs/emu3")),
    "container": job(accelerator="h200", storage=spec.Storage("/fs/my run"), slurm=CONTAINER,
                     capacity=spec.Capacity("reserved", "mine")),
}  # fmt: skip


def assert_shell(text: str, path: pathlib.Path, severity: str = "style") -> None:
    """It is a script of bash, in which shellcheck, where there is one, finds nothing."""
    path.write_text(text)
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        command = ["shellcheck", f"--severity={severity}", path]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.stdout == ""


@pytest.mark.parametrize("name", JOBS)
def test_the_script_is_a_shell_script(name, tmp_path):
    assert_shell(script(JOBS[name]), tmp_path / "slurm.sbatch", "warning")


def test_what_is_asked_of_slurm():
    """Whole nodes, a task for each GPU, signals in time, and one job at a time."""
    assert directives(script(JOBS["h200"])) == [
        "job-name=a-job", "dependency=singleton", "nodes=32", "ntasks-per-node=8", "gres=gpu:8",
        "mem=0", "time=24:00:00", "signal=TERM@300", "output=/fs/run/logs/slurm-%j.log",
        "open-mode=append", "exclusive", "requeue",
    ]  # fmt: skip
    assert {"nodes=2", "ntasks-per-node=1"} < {*directives(script(JOBS["cpu"]))}
    one = script(JOBS["one task"])
    assert {"ntasks-per-node=1", "chdir=/fs/emu3"} < {*directives(one)}
    assert "export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7\n" in one
    container = script(JOBS["container"])
    assert {"partition=p", "account='a b'", "reservation=mine",
            "output='/fs/my run/logs/slurm-%j.log'"} < {*directives(container)}  # fmt: skip
    assert "chdir" not in container
    for words in ("container-image=/fs/image.sqsh", "container-mounts=/fs,/usr/local/gib",
                  "container-workdir=/opt/emu3"):  # fmt: skip
        assert f" --{words} " in container


WRONG = {
    "accelerator 'v5p' is not to be had with Slurm; take one of h100, h100-mega, h200, cpu":
        dict(accelerator="v5p", topology="2x2x1"),
    "storage.bucket 'b': on Slurm, all paths are of a shared file system; "
    "set --job.storage.bucket=": dict(storage=spec.Storage(bucket="b")),
    "capacity.model 'spot' is a cloud's; on Slurm, choose by slurm.partition and set "
    "--job.capacity.model=on_demand": dict(capacity=spec.Capacity("spot")),
    "slurm.tasks = 4: JAX takes one GPU for each task, or all for a single one; take 0 (8 of them) "
    "or 1": dict(accelerator="h200", slurm=spec.Slurm(tasks=4)),
    "local.processes = 2 do not split over nodes = 3": dict(nodes=3),
    "storage.run_dir 'runs/a': with slurm.container_image, take the full path of a directory that "
    "slurm.container_mounts shows in the container":
        dict(storage=spec.Storage("runs/a"), slurm=spec.Slurm(container_image="i.sqsh")),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_slurm_does_not_have(message):
    with pytest.raises(ValueError) as raised:
        slurm.render(job(**WRONG[message]))
    assert str(raised.value) == message


def command_line(directory: pathlib.Path, name: str, text: str) -> None:
    """A command of this name that is a shell script."""
    (directory / name).write_text(f"#!/bin/bash\n{text}\n")
    (directory / name).chmod(0o755)


@pytest.fixture
def shell(tmp_path):
    """Runs the script as Slurm does, but that srun ends with a code; what it said, and its code.

    Where the job goes back into the queue, the shell is killed.
    """
    fakes = tmp_path / "bin"
    fakes.mkdir()
    command_line(fakes, "scontrol", 'echo "scontrol $*"; kill -KILL $PPID')
    command_line(fakes, "sleep", "exec /bin/sleep 0.05")

    def run(code: str, state: str = "RUNNING", **fields) -> tuple[list[str], int]:
        command_line(fakes, "srun", code)
        command_line(fakes, "squeue", f"echo {state}")
        asked = job(storage=spec.Storage(str(tmp_path)), **fields)
        (tmp_path / "logs").mkdir(exist_ok=True)
        environ = os.environ | dict(PATH=f"{fakes}:{os.environ['PATH']}", SLURM_JOB_ID="7")
        child = subprocess.run(["bash", "-c", script(asked)], env=environ, text=True,
                               capture_output=True)  # fmt: skip
        assert child.stderr == ""
        return child.stdout.splitlines(), child.returncode

    return run


REQUEUED = ["scontrol requeue 7"], -signal.SIGKILL


def test_the_script_goes_by_exit_codes(shell, tmp_path):
    """Preemptions do not use the restarts up, failures do, also between preemptions."""
    again = "ended with {}; starting again ({})"
    assert shell("exit 0") == (["all steps are done"], 0)
    for code in (2, 78):
        line = f"ended with {code}; another attempt would end the same"
        assert shell(f"exit {code}") == ([line], code)
    budget = dict(restart=spec.Restart(max_restarts=2))
    for code, count in (
        (42, "not counted"), (1, "1 of 2 counted"), (143, "not counted"), (137, "2 of 2 counted")
    ):  # fmt: skip
        said, ended = REQUEUED
        assert shell(f"exit {code}", **budget) == ([again.format(code, count), *said], ended)
    log = tmp_path / "logs/slurm-7.failures"
    line = f"ended with 75; all 2 restarts are used up, see {log}"
    assert shell("exit 75", **budget) == ([line], 75)
    assert [line.split()[-1] for line in log.read_text().splitlines()] == ["1", "137", "75"]


def test_slurm_itself_ends_the_job(shell):
    """Then it is not put back: it was cancelled, or Slurm does so."""
    assert shell("exit 42", state="COMPLETING") == (["ended with 42; Slurm is ending this job"], 42)


def test_the_shell_stays_when_told_to_stop(shell):
    """SIGTERM is for the processes, whose exit code counts; they may be told twice."""
    told = "kill -TERM $PPID; sleep 0.2; kill -TERM $PPID; sleep 0.2; exit 42"
    assert shell(told)[0][0] == "ended with 42; starting again (not counted)"
    assert shell(told.replace("42", "0")) == (["all steps are done"], 0)


def test_each_task_gets_the_command_and_its_variables(shell, tmp_path):
    """Through all quotes."""
    task = 'while [ "$1" != bash ]; do shift; done; "$@"'
    command_line(tmp_path / "bin", "python", 'printf "%s\\n" "$@"; echo "$QUOTES"; echo "$C"')
    quotes = JOBS["cpu"].env["QUOTES"]
    said, code = shell(
        task, env=JOBS["cpu"].env, overrides=("mesh.data=-1", "task.name=it's \"$5\""),
        slurm=spec.Slurm(setup=("true", "export C='d e'")),
    )  # fmt: skip
    assert code == 0
    assert said == [
        "-u", "-m", "emu3_jax.launch", "--config=configs/demo.py:decoder",
        f"--config.run_dir={tmp_path}", "--config.mesh.data=-1", "--config.task.name=it's \"$5\"",
        quotes, "d e", "all steps are done",
    ]  # fmt: skip


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def cluster(monkeypatch):
    """A real Slurm: a controller and two nodes, on loopback; its commands find it."""
    if not (shutil.which("slurmctld") and shutil.which("munged") and os.geteuid() == 0):
        pytest.skip("needs root and: apt-get install --no-install-recommends slurm-wlm munge")
    root = pathlib.Path(tempfile.mkdtemp(prefix="slurm"))  # a short path, for sockets
    host, (controller, *nodes) = socket.gethostname(), free_ports(3)
    socket_, key = root / "munge.socket", root / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    lines = [
        "ClusterName=test", f"SlurmctldHost={host}(127.0.0.1)", "SlurmUser=root",
        f"AuthInfo=socket={socket_}", f"SlurmctldPort={controller}", "ReturnToService=2",
        "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny",  # loopback alone
        f"StateSaveLocation={root}/state", f"SlurmdSpoolDir={root}/spool-%n",
        f"SlurmctldPidFile={root}/controller.pid", f"SlurmdPidFile={root}/%n.pid",
        "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "MpiDefault=none",
        "SelectType=select/cons_tres", "SlurmdParameters=config_overrides", "KillWait=60",
        *(f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2"
          for i, port in enumerate(nodes)),
        "PartitionName=p Nodes=n[0-1] Default=YES MaxTime=INFINITE",
    ]  # fmt: skip
    (root / "slurm.conf").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("SLURM_CONF", str(root / "slurm.conf"))
    daemons = [
        ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket_}",
         f"--pid-file={root}/munge.pid", f"--log-file={root}/munge.log",
         f"--seed-file={root}/munge.seed"],
        ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n0"], ["slurmd", "-D", "-N", "n1"],
    ]  # fmt: skip
    children = []
    try:
        for number, words in enumerate(daemons):
            with open(root / f"daemon-{number}.log", "wb") as log:
                children.append(subprocess.Popen(words, stdout=log, stderr=log))
            wait_for(lambda: socket_.exists())
        wait_for(lambda: told("sinfo", "-h", "-o", "%D %T") == "2 idle\n")
        yield root
    finally:
        for child in reversed(children):
            child.terminate()
            child.wait()
        shutil.rmtree(root)


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def told(*words: str) -> str:
    """What a command of Slurm prints."""
    return subprocess.run(words, capture_output=True, text=True).stdout


def task(number: str, rank: int) -> int:
    """The id of a rank's process of a job."""
    wanted = {f"SLURM_JOB_ID={number}", f"SLURM_PROCID={rank}", "SLURM_TASKS_PER_NODE=1(x2)"}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (path / "environ").read_text(errors="replace").split("\0")
            words = (path / "cmdline").read_text(errors="replace").split("\0")
            if wanted <= {*variables} and "emu3_jax.launch" in words:
                return int(path.name)
    raise LookupError(number)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_on_two_nodes(cluster, file, tmp_path, monkeypatch):
    """A rank is killed, all are preempted, and the run ends; another one is cancelled for good."""
    run_dir, steps = tmp_path / "a run", 60
    monkeypatch.chdir(tmp_path)  # where the script goes
    port, *_ = free_ports(1)
    asked = job(
        config=file, overrides=(f"steps={steps}", "save_every=20"), nodes=2,
        env=dict(
            XLA_FLAGS=os.environ["XLA_FLAGS"], EMU3_HEARTBEAT_TIMEOUT="10",
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",  # no name server knows the nodes
        ),
        storage=spec.Storage(str(run_dir)), local=spec.Local(processes=2, devices=4),
        restart=spec.Restart(max_restarts=1, initialization_timeout=60),
        slurm=spec.Slurm(directory=str(ROOT), time="30",
                         setup=(f"PATH={pathlib.Path(sys.executable).parent}:$PATH",)),
    )  # fmt: skip

    def state(number: str) -> str:
        return re.findall(r"JobState=(\w+)", told("scontrol", "show", "job", number))[0]

    def back_in_the_queue(number: str) -> None:
        """And started soon, where Slurm would wait for two minutes.

        Not in the second in which it ended: nodes would take it for the one that was revoked.
        """
        wait_for(lambda: state(number) == "PENDING", 120)
        told("scontrol", "update", f"jobid={number}", "starttime=now+3")

    def step() -> int:
        lines = (run_dir / "metrics.jsonl").exists() and metrics.read(run_dir)
        return lines[-1]["step"] if lines else 0

    assert slurm.submit(asked) == 0
    number = told("squeue", "-h", "-o", "%i").strip()
    log = run_dir / f"logs/slurm-{number}.log"
    wait_for((run_dir / "checkpoints/20").is_dir, 120)
    os.kill(task(number, 1), signal.SIGKILL)
    back_in_the_queue(number)
    wait_for(lambda: step() > 30, 120)
    told("scancel", "--signal=TERM", number)
    back_in_the_queue(number)
    wait_for(lambda: state(number) == "COMPLETED", 120)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
    assert (run_dir / f"checkpoints/{steps}").is_dir()
    said = re.findall("^ended with .*$", log.read_text(), re.MULTILINE)
    assert said == ["ended with 137; starting again (1 of 1 counted)",
                    "ended with 42; starting again (not counted)"]  # fmt: skip

    asked.overrides = (f"steps={100 * steps}", "save_every=1000")
    assert slurm.submit(asked) == 0
    number = told("squeue", "-h", "-o", "%i").strip()
    wait_for(lambda: step() > steps, 120)
    told("scancel", f"--name={asked.name}", "--user=root")
    wait_for(lambda: state(number) == "CANCELLED" and told("squeue", "-h") == "", 120)
    assert step() < 100 * steps and (run_dir / f"checkpoints/{step()}").is_dir(), "it has saved"
    log = run_dir / f"logs/slurm-{number}.log"
    assert "ended with 42; Slurm is ending this job" in log.read_text()
