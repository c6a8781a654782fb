"""Several processes are one run: the same losses, one set of files, checkpoints for any number."""

import dataclasses
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

import jax
import numpy as np
import pytest

from data_pipelines import documents, mixture, parts, store
from emu3_jax import launch, mesh, metrics, optim, train
from emu3_jax import vocab as vocabulary
from tests import toy

ROOT = pathlib.Path(__file__).parent.parent
STEPS, SAVE_EVERY = 4, 2
CONFIG = """
from tests import test_processes

def get_config(mesh="Mesh"):
    return test_processes.job(mesh, {root!r})
"""
RANKS = {bytes([i]): i for i in range(256)}
VOCAB = vocabulary.Vocab(RANKS, codes=16)


@dataclasses.dataclass
class Apart(mesh.Mesh):
    """The rows of a process lie apart in a batch, as on TPU, where axes follow the torus."""

    def make(self, devices=None, **fields) -> jax.sharding.Mesh:
        """The devices in two halves: every other one, and those between."""
        devices = jax.devices() if devices is None else devices
        return super().make([*devices[::2], *devices[1::2]], **fields)


def job(kind: str, root: str) -> train.Train:
    """Four steps of the tiny decoder with dropout over eight devices, on a mixture of stores."""
    components = (
        mixture.Component(f"{root}/images", documents.Layout("caption_either", 0.2)),
        mixture.Component(f"{root}/texts", documents.Layout("text")),
    )
    return train.Train(
        # one layer and one tile: few collectives, each of which takes 20 ms between processes
        task=toy.model(dropout=0.1, layers=1, vocab=VOCAB.size, first_visual=VOCAB.visual,
                       loss_tile=VOCAB.size),
        data=mixture.Mixture(components, f"{root}/ranks", codes=16, length=32, window=3),
        steps=STEPS,
        batch=8,
        optimizer=optim.AdamW(rate=0.02, warmup=4),
        mesh=dict(Mesh=mesh.Mesh, Apart=Apart)[kind](data=2, fsdp=2, context=2),
        seed=3,
        log_every=1,
        save_every=SAVE_EVERY,
    )  # fmt: skip


def write_stores(root: pathlib.Path) -> None:
    """Two parts of images with captions, and as many of texts."""
    rng = np.random.default_rng(0)
    vocabulary.save_ranks(RANKS, root / "ranks")
    for name, tokenizer in (("images", "t"), ("texts", "")):
        for part in range(2):
            stored = []
            for i in range(20):
                text = rng.integers(0, 256, rng.integers(1, 9)).astype(np.uint32)
                codes = rng.integers(0, 16, (1, *rng.integers(1, 4, 2))).astype(np.uint16)
                stored.append(store.Document(str(i), text, codes if tokenizer else None))
            made = store.Fingerprints(VOCAB.fingerprint, tokenizer)
            parts.write(store.part_path(root / name, part, 2), stored, made)
        store.finish(root / name, 2, "", "")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    """The config file that all processes read."""
    root = tmp_path_factory.mktemp("configs")
    write_stores(root)
    (root / "job.py").write_text(CONFIG.format(root=str(root)))
    return str(root / "job.py")


def run(
    file: str, processes: int, run_dir: pathlib.Path, *overrides: str, meanwhile=lambda _: None
) -> list[tuple]:
    """(exit code, stdout, stderr) of each process; they share eight devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("count=8", f"count={8 // processes}")
    environ = os.environ | dict(
        XLA_FLAGS=flags, JAX_DEFAULT_MATMUL_PRECISION="highest",
        JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", EMU3_NUM_PROCESSES=str(processes),
        EMU3_INITIALIZATION_TIMEOUT="60", EMU3_HEARTBEAT_TIMEOUT="10", EMU3_SHUTDOWN_TIMEOUT="30",
    )  # fmt: skip
    command = [sys.executable, "-m", "emu3_jax.launch", f"--config={file}",
               f"--config.run_dir={run_dir}", *overrides]  # fmt: skip
    children, outputs = [], []
    try:
        for index in range(processes):
            outputs.append([tempfile.TemporaryFile("w+") for _ in ("stdout", "stderr")])
            children.append(subprocess.Popen(
                command, cwd=ROOT, env=environ | dict(EMU3_PROCESS_ID=str(index)),
                stdout=outputs[-1][0], stderr=outputs[-1][1],
            ))  # fmt: skip
        meanwhile(children)
        codes = [child.wait(timeout=200) for child in children]
    finally:
        for child in children:
            child.kill()  # JAX's handler of SIGTERM would only take note
            child.wait()
    for stream in sum(outputs, []):
        stream.seek(0)
    texts = [[stream.read() for stream in streams] for streams in outputs]
    return [(code, out, err) for code, (out, err) in zip(codes, texts, strict=True)]


def trained(file: str, processes: int, run_dir: pathlib.Path, *overrides: str) -> str:
    """What the first process printed in a run of which the others said nothing.

    Gloo tells of its connections on any stdout, several threads in one line.
    """
    results = run(file, processes, run_dir, *overrides)
    assert [code for code, _, _ in results] == [0] * processes, results
    said, *others = [out for _, out, _ in results]
    for out in others:
        assert str(run_dir) not in out and "step" not in out
    return said


@pytest.fixture(scope="module")
def alone(file, tmp_path_factory) -> pathlib.Path:
    """The run of one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    assert launch.main([f"--config={file}", f"--config.run_dir={run_dir}"]) == 0
    return run_dir


@pytest.fixture(scope="module")
def two(file, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """The run of two processes, and what it printed."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    return run_dir, trained(file, 2, run_dir)


@pytest.fixture
def stopped(two, tmp_path) -> pathlib.Path:
    """A copy of the run of two processes, as if it had stopped at its first checkpoint."""
    run_dir = shutil.copytree(two[0], tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints" / str(STEPS))
    return run_dir


def assert_same(run_dir: pathlib.Path, alone: pathlib.Path) -> None:
    """The same figures at the same steps, each step once."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    for got, want in zip(metrics.read(run_dir), metrics.read(alone), strict=True):
        names = want.keys() - metrics.TIMED
        assert got.keys() - metrics.TIMED == names >= {"loss", "gradient_norm", "tokens"}
        for key in names:
            np.testing.assert_allclose(got[key], want[key], rtol=1e-5, err_msg=key)


def test_two_processes_are_as_one(two, alone):
    """Also in what they print and leave."""
    run_dir, said = two
    assert_same(run_dir, alone)
    steps = [f"{step}/{STEPS}" for step in range(1, STEPS + 1)]
    assert re.findall(r"step (\d/\d)  loss", said) == steps
    assert said.count(f"{run_dir}: 18,192 weights, {STEPS} steps of 8 rows\n") == 1
    left = sorted(path.name.partition(".out.")[0] for path in run_dir.iterdir())
    assert left == ["checkpoints", "config.json", "events", "ledger.jsonl", "metrics.jsonl"]
    saved = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert saved == [str(SAVE_EVERY), str(STEPS)]


@pytest.mark.slow
def test_a_ring_through_four_processes(file, alone, tmp_path):
    """Two processes have the same rows, each other positions of them."""
    ring = ("--config.mesh.data=1", "--config.mesh.context=4", "--config.task.context=ring")
    trained(file, 4, tmp_path / "run", *ring)
    assert_same(tmp_path / "run", alone)


def test_one_process_goes_on_where_two_stopped(file, stopped, alone):
    assert launch.main([f"--config={file}", f"--config.run_dir={stopped}"]) == 0
    assert_same(stopped, alone)


@pytest.mark.slow
def test_four_processes_go_on_where_two_stopped(file, stopped, alone):
    """With rows that lie apart: each has its part of the first ones and of others."""
    said = trained(f"{file}:Apart", 4, stopped)
    assert said.count(f"{stopped}: goes on at step {SAVE_EVERY}\n") == 1
    assert_same(stopped, alone)


def test_sigterm_to_one_process_stops_all_at_one_step(file, tmp_path):
    """They save that step and end with 42."""
    run_dir = tmp_path / "run"

    def terminate(children):
        while not (run_dir / "metrics.jsonl").exists() or len(metrics.read(run_dir)) < 2:
            time.sleep(0.05)
            assert all(child.poll() is None for child in children)
        children[1].send_signal(signal.SIGTERM)

    results = run(file, 2, run_dir, "--config.steps=5000", meanwhile=terminate)
    step = metrics.read(run_dir)[-1]["step"]
    told = f"preempted: {run_dir} is saved at step {step}; the same command goes on from there\n"
    assert all(code == 42 and err.endswith(told) for code, _, err in results), results
    assert (run_dir / "checkpoints" / str(step)).is_dir() and step < 5000


def test_what_a_user_causes_ends_all_processes(file, tmp_path):
    """After they met, too."""
    message = "error: batch 10 does not split over data*fsdp = 4; take a multiple of 4\n"
    for code, _, err in run(file, 2, tmp_path / "run", "--config.batch=10"):
        assert (code, err) == (2, message)


EXPLICIT = dict(
    EMU3_NUM_PROCESSES="4", EMU3_PROCESS_ID="3", JAX_COORDINATOR_ADDRESS="127.0.0.1:8476"
)


@pytest.fixture
def environ(monkeypatch):
    """Sets the variables of a run and no others."""
    for name in (*EXPLICIT, "MEGASCALE_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES", "SLURM_NTASKS",
                 "EMU3_JAX_TRACEBACK"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)

    def choose(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return choose


NEEDED = "each process needs EMU3_NUM_PROCESSES, EMU3_PROCESS_ID, JAX_COORDINATOR_ADDRESS"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(EMU3_PROCESS_ID=None), f"EMU3_PROCESS_ID is not set; {NEEDED}"),
        (dict(EMU3_NUM_PROCESSES=None), f"EMU3_NUM_PROCESSES is not set; {NEEDED}"),
        (dict(JAX_COORDINATOR_ADDRESS=None), f"JAX_COORDINATOR_ADDRESS is not set; {NEEDED}"),
        (dict(EMU3_PROCESS_ID="4"), "EMU3_PROCESS_ID=4: EMU3_NUM_PROCESSES=4 are counted from 0"),
        (dict(EMU3_PROCESS_ID="-1"), "EMU3_PROCESS_ID=-1: want a whole number"),
        (dict(EMU3_PROCESS_ID=""), "EMU3_PROCESS_ID=: want a whole number"),
        (dict(EMU3_NUM_PROCESSES="four"), "EMU3_NUM_PROCESSES=four: want a whole number"),
        (dict(JAX_COORDINATOR_ADDRESS="node-0"),
         "JAX_COORDINATOR_ADDRESS=node-0: want process 0's HOST:PORT"),
        (dict(EMU3_HEARTBEAT_TIMEOUT="1m"), "EMU3_HEARTBEAT_TIMEOUT=1m: want a whole number"),
        (dict.fromkeys(EXPLICIT) | dict(SLURM_NTASKS="2(x3)"),
         "SLURM_NTASKS=2(x3): want a whole number"),
    ],
)  # fmt: skip
def test_variables_that_leave_a_process_without_a_place(file, change, message, environ, capsys):
    environ(**{name: value for name, value in (EXPLICIT | change).items() if value is not None})
    assert launch.main([f"--config={file}"]) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_an_address_alone_where_no_scheduler_knows_the_rest(file):
    command = [sys.executable, "-m", "emu3_jax.launch", f"--config={file}"]
    environ = os.environ | dict(JAX_COORDINATOR_ADDRESS="127.0.0.1:8476")
    result = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, (
        "error: Number of processes must be defined; set EMU3_NUM_PROCESSES, EMU3_PROCESS_ID, "
        "JAX_COORDINATOR_ADDRESS\n"))  # fmt: skip


@pytest.mark.parametrize(
    "address, bound",
    [("127.0.0.1:8476", True), ("localhost:8476", True), ("[::1]:8476", True), ("n-0:80", False)],
)
def test_a_place_and_how_long_to_wait(address, bound, environ, monkeypatch):
    """The EMU3 variables go before a scheduler's; loopback is all that listens on loopback."""
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kwargs: joined.append(kwargs))
    environ(**EXPLICIT | dict(JAX_COORDINATOR_ADDRESS=address), SLURM_NTASKS="2",
            EMU3_HEARTBEAT_TIMEOUT="10")  # fmt: skip
    launch.join(os.environ)
    assert joined == [dict(
        coordinator_address=address, coordinator_bind_address=address if bound else None,
        num_processes=4, process_id=3, cluster_detection_method="deactivate",
        initialization_timeout=1800, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=300,
    )]  # fmt: skip


def test_a_config_asks_for_no_device():
    """Else it could not be read before the processes have met."""
    code = """if True:
        import pathlib
        from emu3_jax import config
        for path in pathlib.Path("configs").glob("[a-z]*.py"):
            config.load([f"--config={path}"])
    """
    environ = os.environ | dict(JAX_PLATFORMS="none such")  # making a backend fails
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, check=True)
