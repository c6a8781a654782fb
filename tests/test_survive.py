"""What may happen to a run: nothing is lost, nothing bad is kept, and it ends when it must."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from emu3_jax import (
    checkpoint,
    divergence,
    exit_codes,
    goodput,
    integrity,
    metrics,
    optim,
    preemption,
    train,
)
from tests import toy

ROOT = pathlib.Path(__file__).parent.parent
GUARD = divergence.Guard(window=8, skips=2, rewinds=2)
BATCH = 8


def job(run_dir, bad: tuple[int, int] = (0, 0), **fields) -> train.Train:
    """Sixteen steps of a tiny decoder of one layer; the rows of steps `bad` are poisoned."""
    first, last = bad
    data = toy.Counting(poison=BATCH * first, poisoned=BATCH * (last - first)) if last else (
        toy.Counting())  # fmt: skip
    default = dict(
        task=toy.model(layers=1), data=data, run_dir=str(run_dir), steps=16, batch=BATCH,
        optimizer=optim.AdamW(rate=0.02, warmup=4), log_every=1, save_every=4, keep=9, guard=GUARD,
        mesh=toy.Single(),
    )  # fmt: skip
    return train.Train(**default | fields)


def figures(run_dir) -> list[dict[str, float]]:
    return [{k: v for k, v in r.items() if k not in metrics.TIMED} for r in metrics.read(run_dir)]


def weights(run_dir, step: int | None = None) -> list[np.ndarray]:
    return jax.tree.leaves(checkpoint.restore_model(str(run_dir), step)[1])


def test_a_step_that_is_not_finite_leaves_no_trace_in_the_weights(tmp_path, capsys):
    """It is counted, and told of; its figures are null in the file."""
    job(tmp_path / "run", bad=(5, 6), save_every=1, steps=7).run()
    for before, after in zip(weights(tmp_path / "run", 5), weights(tmp_path / "run", 6),
                             strict=True):  # fmt: skip
        np.testing.assert_array_equal(before, after)
    assert not np.array_equal(weights(tmp_path / "run", 6)[0], weights(tmp_path / "run", 7)[0])
    records = metrics.read(tmp_path / "run")
    assert [r["skipped"] for r in records] == [0, 0, 0, 0, 0, 1, 1]
    assert np.isnan(records[5]["loss"]) and np.isfinite(records[6]["loss"])
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"loss": null' in text and "NaN" not in text
    assert "step 7/7  loss" in capsys.readouterr().out


@pytest.fixture(scope="module")
def went_back(tmp_path_factory) -> pathlib.Path:
    """A run in which the rows of three steps are bad, one more than the guard lets pass."""
    run_dir = tmp_path_factory.mktemp("back") / "run"
    job(run_dir, bad=(5, 8)).run()
    return run_dir


def test_too_many_bad_steps_send_the_run_back_and_on_behind_them(went_back):
    """To the last checkpoint, with the rows of the step that would have followed."""
    (entry,) = json.loads((went_back / "rewinds.json").read_text())
    assert (entry["at"], entry["to"]) == (8, 4)
    assert entry["data"] == dict(step=4, row=BATCH * 8, batch=BATCH, origin=[4, BATCH * 8])
    records = metrics.read(went_back)
    assert [r["step"] for r in records] == list(range(1, 17))
    assert [r["skipped"] for r in records] == [0] * 4 + [3] * 12
    assert all(np.isfinite(r["loss"]) for r in records)
    (attempt,) = goodput.read(str(went_back))
    assert [stretch.steps[0] for stretch in attempt.stretches][-1] == 4
    assert goodput.summary([attempt]).lost_steps == 4


def test_going_back_is_repeatable_also_where_the_run_stops_just_then(
    went_back, tmp_path, monkeypatch
):
    """What has gone back goes on from there, with the same rows."""
    run_dir = tmp_path / "run"
    begin = train._Run._begin

    def stop(run, found):
        if (run_dir / "rewinds.json").exists():
            raise KeyboardInterrupt
        return begin(run, found)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train._Run, "_begin", stop)
        job(run_dir, bad=(5, 8)).run()
    job(run_dir, bad=(5, 8)).run()
    assert figures(run_dir) == figures(went_back)
    jax.tree.map(np.testing.assert_array_equal, weights(run_dir), weights(went_back))


def test_a_run_that_goes_back_in_vain_gives_up(tmp_path):
    """Each time one checkpoint further."""
    with pytest.raises(exit_codes.GaveUp) as error:
        job(tmp_path, bad=(9, 99)).run()
    told = json.loads((tmp_path / "rewinds.json").read_text())
    assert [entry["to"] for entry in told] == [8, 4]
    assert f"{tmp_path} diverged: 3 of the last 8 updates were left out" in str(error.value)
    assert "going back 2 times did not help" in str(error.value)


def test_a_save_that_fails_does_not_stop_training(tmp_path, monkeypatch, capsys):
    """It is made up for at the next step that is logged."""
    verify, calls = integrity.verify, []

    def fails_once(path, *place):
        calls.append(path.name)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        verify(path, *place)

    monkeypatch.setattr(integrity, "verify", fails_once)
    job(tmp_path, log_every=2).run()
    told = capsys.readouterr().out
    assert "warning: the save at step 8 failed (1 of 3 in a row): [Errno 28] No space" in told
    made = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert made[0] == 4 and made[-2:] == [12, 16] and len(made) >= 3 and 8 not in made


def test_attempts_that_get_nowhere_end(tmp_path):
    """As where a row kills the process each time."""

    class Failing(toy.Counting):
        def open(self, *args):
            raise RuntimeError("a defect")

    for _ in range(2):
        with pytest.raises(RuntimeError):
            job(tmp_path, data=Failing(), fruitless=2).run()
    with pytest.raises(exit_codes.GaveUp) as error:
        job(tmp_path, fruitless=2).run()
    assert str(error.value) == (
        f"{tmp_path}: 2 attempts in a row failed without a checkpoint after step 0; see their "
        "output, and start again when the cause is mended"
    )
    job(tmp_path, fruitless=2, steps=2).run()  # a person did


@pytest.mark.slow
def test_steps_may_be_replayed(went_back, tmp_path):
    """Which changes nothing where all is sound."""
    job(tmp_path, bad=(5, 8), replay_every=5).run()
    assert figures(tmp_path) == figures(went_back)


def test_an_unwritable_run_dir_is_told_at_once(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match=f"{tmp_path}/run can't be written to"):
        job(tmp_path / "run").run()


def test_stopped_before_the_first_step(tmp_path):
    """While it compiles, say: nothing is lost, so nothing is saved."""
    run = job(tmp_path)
    ready = train.Train.ready

    def told(self, device_mesh):
        os.kill(os.getpid(), signal.SIGTERM)
        return ready(self, device_mesh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Train, "ready", told)
        with pytest.raises(preemption.Preempted, match="is at step 0, as it was"):
            run.run()
    assert list((tmp_path / "checkpoints").iterdir()) == []


CONFIG = """
import dataclasses, os, pathlib, time

@dataclasses.dataclass
class Job:
    def run(self):
        pathlib.Path({began!r}).touch()
        try:
            time.sleep(60)
        except Exception:
            print("a job that goes on with the next record")

def get_config():
    if {slow}:
        pathlib.Path({began!r}).touch()
        time.sleep(60)
    return Job()
"""


@pytest.mark.parametrize("slow, code, said", [
    (True, exit_codes.TERMINATED, ""),
    (False, exit_codes.PREEMPTED, "preempted: told to stop; the same command goes on from there\n"),
])  # fmt: skip
def test_sigterm_before_and_in_a_job_that_does_not_train(slow, code, said, tmp_path):
    began = tmp_path / "began"
    (tmp_path / "job.py").write_text(CONFIG.format(began=str(began), slow=slow))
    child = subprocess.Popen(
        [sys.executable, "-m", "emu3_jax.launch", f"--config={tmp_path / 'job.py'}"], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not began.exists():
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err) == (code, "", said)


@pytest.mark.slow
def test_restoring_goes_past_damage(tmp_path, capsys):
    """The run that goes on from an older checkpoint is the same run."""
    job(tmp_path / "whole").run()
    job(tmp_path / "run", steps=16, keep=3).run()
    newest = tmp_path / "run" / "checkpoints" / "16"
    (newest / "state" / "_METADATA").unlink()
    dataclasses.replace(job(tmp_path / "run", keep=3)).run()
    assert "warning: checkpoint 16 is damaged and left out" in capsys.readouterr().out
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / "run"),
                 weights(tmp_path / "whole"))  # fmt: skip
