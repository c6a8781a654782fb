"""A checkpoint counts once it has been read back; a damaged one is named, and left out."""

import json
import os
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu3_jax import checkpoint, config, fingerprint, integrity, mesh, train
from tests import toy

JOB = train.Train(toy.model(), toy.Counting())
DATA = dict(step=0, row=0, batch=32, origin=[0, 0])


def state(step: int, device_mesh, dims: str = "DF") -> dict:
    """A cut array, one of another type, one that is whole everywhere, a count."""
    layout, whole = mesh.sharding(device_mesh, dims), mesh.sharding(device_mesh, "")
    w = np.random.default_rng(step).normal(size=(64, 96)).astype(np.float32)
    return dict(
        params=dict(w=jax.device_put(w, layout), b=jax.device_put(w[0], whole)),
        optimizer=(dict(mu=jax.device_put(w.astype(jnp.bfloat16), layout)), jnp.int32(step)),
    )


def abstract(like) -> dict:
    """What `restore` wants to know of a state."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)


@pytest.fixture(scope="module")
def device_mesh():
    made = mesh.Mesh(data=2, fsdp=2, tensor=2).make()
    with jax.set_mesh(made):
        yield made


@pytest.fixture(scope="module")
def three(device_mesh, tmp_path_factory) -> pathlib.Path:
    """A run with checkpoints 1, 2 and 3."""
    run_dir = tmp_path_factory.mktemp("three") / "run"
    with checkpoint.Checkpoints(str(run_dir), keep=3) as saved:
        for step in (1, 2, 3):
            saved.save(step, state(step, device_mesh), JOB, DATA)
    return run_dir


@pytest.fixture
def run_dir(three, tmp_path) -> pathlib.Path:
    """A copy, to be damaged."""
    return shutil.copytree(three, tmp_path / "run")


def steps(run_dir) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def largest(path: pathlib.Path) -> pathlib.Path:
    """The file with the most of the arrays, of those that are read."""
    files = (path / "state").glob("ocdbt.process_*/d/*")
    return max(files, key=lambda file: (file.stat().st_size, file.name))


def restored(run_dir, device_mesh) -> tuple[int, dict]:
    """The newest whole checkpoint, as a run goes on from it."""
    with checkpoint.Checkpoints(str(run_dir), keep=3) as saved:
        before = None
        while found := saved.newest(before):
            before = found[0]
            made = saved.restore(found[0], abstract(state(0, device_mesh)))
            if made is not None:
                return found[0], made
    raise AssertionError("none")


def assert_is(made: dict, step: int, device_mesh) -> None:
    jax.tree.map(np.testing.assert_array_equal, made, state(step, device_mesh))


def test_a_checkpoint_comes_back_on_any_mesh(three):
    other = mesh.Mesh(fsdp=8).make()
    with jax.set_mesh(other):
        step, made = restored(three, other)
        assert_is(made, 3, other)
    assert step == 3 and made["params"]["w"].sharding.shard_shape((64, 96)) == (8, 96)


def test_what_a_checkpoint_says_of_itself(three):
    path = three / "checkpoints" / "3"
    about = integrity.read_about(path)
    assert about["step"] == 3 and about["data"] == DATA
    assert config.from_json(about["config"]) == JOB
    assert about["types"] == {"params.w": "float32", "params.b": "float32",
                              "optimizer.0.mu": "bfloat16", "optimizer.1": "int32"}  # fmt: skip
    marker = json.loads((path / "verified" / "0-of-1.json").read_text())
    assert marker["sums"] == about["fingerprints"]


def truncated(path):
    file = largest(path)
    os.truncate(file, file.stat().st_size - 1)
    return f"{file} has {file.stat().st_size:,} bytes, not {file.stat().st_size + 1:,}"


def flipped(path):
    file = largest(path)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    return f"{file} has other contents than when it was read back"


def lacking_a_file(path):
    file = largest(path)
    file.unlink()
    return f"{file} is missing"


def lacking_metadata(path):
    (path / "state" / "_METADATA").unlink()
    return f"{path / 'state' / '_METADATA'} is missing"


def without_about(path):
    shutil.rmtree(path / "about")
    return f"{path / 'about' / 'metadata'} is no readable JSON"


def garbled_about(path):
    (path / "about" / "metadata").write_text('{"step": 3')
    return f"{path / 'about' / 'metadata'} is no readable JSON"


def empty(path):
    shutil.rmtree(path)
    path.mkdir()
    return f"{path / 'about' / 'metadata'} is no readable JSON"


def unverified_and_flipped(path):
    """Nobody read it back, so that no file's contents are known."""
    shutil.rmtree(path / "verified")
    return flipped(path).partition(" has")[0].partition("/state")[0]


DAMAGES = (truncated, flipped, lacking_a_file, lacking_metadata, without_about, garbled_about,
           empty, unverified_and_flipped)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    damage, run_dir, device_mesh, capsys
):
    """It makes way for the one that will be written at its step."""
    reason = damage(run_dir / "checkpoints" / "3")
    step, made = restored(run_dir, device_mesh)
    assert step == 2
    assert_is(made, 2, device_mesh)
    told = capsys.readouterr().out
    assert told.startswith(f"warning: checkpoint 3 is damaged and left out: {reason}"), told
    assert f"checkpoint 3 is now in {run_dir / 'broken'}\n" in told
    assert steps(run_dir) == ["1", "2"] and (run_dir / "broken" / "3").is_dir()


def test_two_damaged_checkpoints(run_dir, device_mesh):
    truncated(run_dir / "checkpoints" / "3")
    empty(run_dir / "checkpoints" / "2")
    assert restored(run_dir, device_mesh)[0] == 1
    assert steps(run_dir) == ["1"]


def test_damaged_checkpoints_alone_are_no_new_start(run_dir, device_mesh):
    """Weeks of training are not begun anew because of a file; nothing is moved."""
    reasons = [flipped(run_dir / "checkpoints" / str(step)) for step in (3, 2, 1)]
    with (
        checkpoint.Checkpoints(str(run_dir)) as saved,
        pytest.raises(ValueError) as error,
    ):
        saved.newest()
    assert str(error.value) == (
        f"{run_dir / 'checkpoints'}: no checkpoint can be used: {'; '.join(reasons)}; move them "
        "away to start anew"
    )
    assert steps(run_dir) == ["1", "2", "3"]


def test_arrays_that_come_back_otherwise_are_left_out(run_dir, device_mesh, monkeypatch, capsys):
    """As where memory is at fault, between a file that is whole and the devices."""
    of = fingerprint.of
    monkeypatch.setattr(fingerprint, "of", lambda tree: of(tree) | (
        {"params.w": 1} if int(tree["optimizer"][1]) == 3 else {}))  # fmt: skip
    assert restored(run_dir, device_mesh)[0] == 2
    path = run_dir / "checkpoints" / "3"
    assert f"{path}: params.w was restored otherwise than it was saved" in capsys.readouterr().out


def test_a_save_that_was_not_read_back_is_read_when_it_is_needed(run_dir, device_mesh):
    """An attempt may end right after Orbax is done."""
    shutil.rmtree(run_dir / "checkpoints" / "3" / "verified")
    assert restored(run_dir, device_mesh)[0] == 3
    assert integrity.verified(run_dir / "checkpoints" / "3")


def test_what_a_killed_attempt_leaves_is_removed(run_dir, device_mesh):
    (run_dir / "checkpoints" / "4.orbax-checkpoint-tmp-17" / "state").mkdir(parents=True)
    shutil.copytree(run_dir / "checkpoints" / "1", run_dir / "checkpoints" / ".deleted-1")
    assert restored(run_dir, device_mesh)[0] == 3
    assert steps(run_dir) == ["1", "2", "3"]


def test_shares_of_several_processes(run_dir):
    """Together they are what one process finds; a process of another number may be missing."""
    path = run_dir / "checkpoints" / "3"
    (one,) = (path / "verified").iterdir()
    want = json.loads(one.read_text())
    one.unlink()
    integrity.verify(path, 1, 3)
    integrity.verify(path, 0, 2)
    assert not integrity.verified(path)
    assert integrity.damage(path) == f"{path / 'verified'} lacks what was read back"
    integrity.verify(path, 1, 2)
    assert integrity.verified(path) and integrity.damage(path, (0, 1)) == ""
    shares = [json.loads((path / "verified" / f"{i}-of-2.json").read_text()) for i in range(2)]
    assert shares[0]["files"] | shares[1]["files"] == want["files"]
    assert not shares[0]["files"].keys() & shares[1]["files"].keys()
    for name, total in want["sums"].items():
        assert sum(share["sums"][name] for share in shares) % 2**32 == total


def test_which_checkpoints_stay(device_mesh, tmp_path):
    with checkpoint.Checkpoints(str(tmp_path), keep=2, keep_every=4) as saved:
        for step in range(2, 15, 2):
            saved.save(step, state(step, device_mesh), JOB, DATA)
            saved.finish()
            assert len(steps(tmp_path)) <= 2 + step // 4
    assert steps(tmp_path) == ["12", "14", "4", "8"]


@pytest.fixture
def full(monkeypatch):
    """Files can't grow beyond 4 KB, as on a full disk, while it says so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(on: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if on else soft, hard))

    yield limit
    limit(False)


def test_a_save_that_fails_is_told_and_tried_again(device_mesh, tmp_path, full, capsys):
    with checkpoint.Checkpoints(str(tmp_path), failures=3) as saved:
        saved.save(1, state(1, device_mesh), JOB, DATA)
        saved.finish()
        full(True)
        saved.save(2, state(2, device_mesh), JOB, DATA)
        saved.finish()
        assert saved.wanted and steps(tmp_path) == ["1"]
        full(False)
        saved.save(3, state(3, device_mesh), JOB, DATA)
        saved.finish()
        assert not saved.wanted and steps(tmp_path) == ["1", "3"]
    told = capsys.readouterr().out
    assert told.startswith("warning: the save at step 2 failed (1 of 3 in a row): ")
    assert "File too large" in told and told.count("\n") == 1


def test_too_many_failed_saves_end_the_run(device_mesh, tmp_path, full, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "RETRY", 0.01)
    with (
        pytest.raises(OSError, match="checkpoints: 2 saves in a row failed: .*File too large"),
        checkpoint.Checkpoints(str(tmp_path), failures=2) as saved,
    ):
        full(True)
        saved.save(1, state(1, device_mesh), JOB, DATA, wait=True)
    assert steps(tmp_path) == []


def test_a_save_that_reads_back_otherwise_has_failed(device_mesh, tmp_path, monkeypatch, capsys):
    """As where the storage, or the way there, changes a bit."""
    partial = fingerprint.partial
    with checkpoint.Checkpoints(str(tmp_path)) as saved:
        with monkeypatch.context() as patch:
            patch.setattr(fingerprint, "partial", lambda *args: partial(*args) ^ 1)
            saved.save(1, state(1, device_mesh), JOB, DATA)
            saved.finish()
        assert saved.wanted and steps(tmp_path) == []
        saved.save(1, state(1, device_mesh), JOB, DATA)
    assert steps(tmp_path) == ["1"]
    assert "reads otherwise than it was on the devices" in capsys.readouterr().out


def test_going_back_removes_what_came_after(run_dir):
    with checkpoint.Checkpoints(str(run_dir)) as saved:
        saved.forget(after=1)
        assert saved.newest()[0] == 1 and saved.newest(before=1) is None
    assert steps(run_dir) == ["1"]


def test_moments_of_another_type_are_restored(run_dir, device_mesh):
    """What is cast has other bits; all else is compared."""
    made = state(3, device_mesh)
    made["optimizer"][0]["mu"] = made["optimizer"][0]["mu"].astype(jnp.float32)
    with checkpoint.Checkpoints(str(run_dir)) as saved:
        found = saved.restore(3, abstract(made))
    jax.tree.map(np.testing.assert_array_equal, found, made)


def test_a_url_is_no_run_dir():
    with pytest.raises(ValueError) as error:
        checkpoint.Checkpoints("gs://bucket/run")
    assert str(error.value) == (
        "run_dir gs://bucket/run is a URL; mount the bucket (gcsfuse, say) and take its path"
    )


def test_a_model_is_read_from_a_whole_checkpoint(run_dir, capsys):
    """And of a damaged one that is asked for, the reason is told."""
    reason = truncated(run_dir / "checkpoints" / "3")
    task, params, variables, step = checkpoint.restore_model(str(run_dir))
    assert (task, variables, step) == (JOB.task, {}, 2)
    assert params["w"].shape == (64, 96)
    assert reason in capsys.readouterr().out
    with pytest.raises(ValueError) as error:
        checkpoint.restore_model(str(run_dir), 3)
    assert str(error.value) == f"checkpoint 3 is damaged: {reason}"
    shutil.rmtree(run_dir / "checkpoints" / "2" / "verified")
    flipped(run_dir / "checkpoints" / "2")
    assert checkpoint.restore_model(str(run_dir))[-1] == 1
