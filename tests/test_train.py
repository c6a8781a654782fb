"""The trainer on a tiny job: golden curve, exact resume, and what stops it."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest

from emu3_jax import (
    checkpoint,
    config,
    data,
    hlo,
    mesh,
    metrics,
    optim,
    params,
    preemption,
    train,
    update,
)
from tests import toy
from tokenizer import vq
from tokenizer.train import TokenizerTask

GOLDEN = pathlib.Path(__file__).parent / "golden" / "decoder.txt"
STEPS, SAVE_EVERY, INTERRUPTED = 20, 5, 13


def job(run_dir, **fields) -> train.Train:
    """Twenty steps of the tiny decoder with dropout over eight devices."""
    default = dict(
        task=toy.model(dropout=0.1),
        data=toy.Counting(),
        run_dir=str(run_dir),
        steps=STEPS,
        batch=8,
        optimizer=optim.AdamW(rate=0.02, warmup=4),
        seed=3,
        log_every=1,
        save_every=SAVE_EVERY,
    )
    return train.Train(**default | fields)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """A run that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("finished")
    job(run_dir).run()
    return run_dir


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> pathlib.Path:
    """The same run, interrupted at step 13 while a line of metrics was being written."""
    run_dir = tmp_path_factory.mktemp("interrupted")
    write = metrics.Metrics.write

    def interrupt(log, step, *figures):
        found = write(log, step, *figures)
        if step == INTERRUPTED:
            raise KeyboardInterrupt
        return found

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(metrics.Metrics, "write", interrupt)
        job(run_dir).run()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "lo')
    return run_dir


def resumed(interrupted: pathlib.Path, run_dir: pathlib.Path, **fields) -> pathlib.Path:
    """Continues a copy as another process would: from what is on the disk."""
    shutil.copytree(interrupted, run_dir)
    again = config.from_json(json.loads((run_dir / "config.json").read_text()))
    dataclasses.replace(again, run_dir=str(run_dir), **fields).run()
    return run_dir


def figures(run_dir) -> list[dict[str, float]]:
    """What metrics.jsonl says, without the times."""
    return [{k: v for k, v in r.items() if k not in metrics.TIMED} for r in metrics.read(run_dir)]


def test_loss_curve_is_the_golden_one(finished):
    curve = "".join(f"{r['step']} {r['loss']:.6f}\n" for r in metrics.read(finished))
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(curve)
    got, want = (np.array([line.split() for line in text.splitlines()], float)
                 for text in (curve, GOLDEN.read_text()))  # fmt: skip
    np.testing.assert_allclose(got, want, rtol=1e-4, err_msg=(
        "The loss of the tiny decoder changed. That is right only if a commit changes the "
        "computation on purpose (model, optimizer, data order, random numbers) and says so; then "
        "run the test once with UPDATE_GOLDEN=1 and commit the new curve with it."
    ))  # fmt: skip
    assert want[-1, 1] < want[0, 1] - 0.5  # it learns


def test_resume_is_exact(finished, interrupted, tmp_path, capsys):
    """Every figure and every bit of the weights, as if nothing had happened."""
    assert [r["step"] for r in metrics.read(interrupted)] == list(range(1, INTERRUPTED + 1))
    run_dir = resumed(interrupted, tmp_path / "run")
    assert f"{run_dir}: goes on at step 10\n" in capsys.readouterr().out
    assert figures(run_dir) == figures(finished)
    assert len(figures(run_dir)) == STEPS and "gradient_norm" in figures(run_dir)[0]
    # what was written beyond the checkpoint is cut, not repeated, and the half line is gone
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    for got, want in zip(*(jax.tree.leaves(checkpoint.restore_model(str(path))[1])
                           for path in (run_dir, finished)), strict=True):  # fmt: skip
        np.testing.assert_array_equal(got, want)


def test_sigterm_saves_and_stops(finished, tmp_path, monkeypatch):
    """Wherever it is; then it goes on as if nothing had happened."""
    write = metrics.Metrics.write

    def terminate(log, step, *figures):
        if step == INTERRUPTED:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(log, step, *figures)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(metrics.Metrics, "write", terminate)
        with pytest.raises(preemption.Preempted, match=f"{tmp_path} is saved at step (14|15)$"):
            job(tmp_path).run()
    assert signal.getsignal(signal.SIGTERM) == before
    last = metrics.read(tmp_path)[-1]["step"]
    assert (tmp_path / "checkpoints" / str(last)).is_dir() and last in (14, 15)
    job(tmp_path).run()
    assert figures(tmp_path) == figures(finished)


def test_resume_on_another_mesh(finished, interrupted, tmp_path):
    other = mesh.Mesh(data=2, fsdp=1, context=2, tensor=2)
    run_dir = resumed(interrupted, tmp_path / "run", mesh=other)
    losses, want = ([r["loss"] for r in metrics.read(path)] for path in (run_dir, finished))
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    for got, one in zip(*(jax.tree.leaves(checkpoint.restore_model(str(path))[1])
                          for path in (run_dir, finished)), strict=True):  # fmt: skip
        np.testing.assert_allclose(got, one, rtol=0, atol=1e-5 * np.abs(one).max())


def test_a_completed_run_says_so(finished, capsys):
    before = (finished / "metrics.jsonl").read_text()
    job(finished).run()
    assert capsys.readouterr().out == f"{finished}: trained (20 steps)\n"
    assert (finished / "metrics.jsonl").read_text() == before


def test_what_a_run_leaves(finished, interrupted):
    """Its configuration, the newest checkpoints and no others, and what made them."""
    kept = sorted(int(path.name) for path in (finished / "checkpoints").iterdir())
    assert kept == [15, 20]
    assert sorted(int(p.name) for p in (interrupted / "checkpoints").iterdir()) == [5, 10]
    asked = config.to_json(job(finished))
    assert json.loads((finished / "config.json").read_text()) == asked
    about = json.loads((finished / "checkpoints/20/about/metadata").read_text())
    assert about["step"] == 20 and about["config"] == asked
    assert about["data"] == dict(step=20, row=160, batch=8, origin=[0, 0])
    assert about["packages"]["jax"] == jax.__version__
    assert list(finished.glob("events.out.tfevents.*"))


def test_restore_model(finished):
    task, params, variables, step = checkpoint.restore_model(str(finished))
    assert task == toy.model(dropout=0.1) and step == 20 and variables == {}
    declared = jax.tree.map(lambda p: p.shape, task.params())
    assert jax.tree.map(np.shape, params) == declared
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
    _, earlier, _, step = checkpoint.restore_model(str(finished), 15)
    assert step == 15
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, earlier)
    assert min(jax.tree.leaves(moved)) > 0
    with pytest.raises(ValueError) as error:
        checkpoint.restore_model(str(finished), 10)
    assert str(error.value) == f"{finished}: no complete checkpoint (asked for step 10)"
    with pytest.raises(ValueError) as error:
        checkpoint.restore_model(str(finished / "nowhere"))
    assert str(error.value) == (
        f"{finished / 'nowhere'}: no checkpoints/ there; train the model first"
    )


def test_another_task_in_the_same_run_is_refused_and_other_changes_are_told(
    interrupted, tmp_path, capsys
):
    run_dir = shutil.copytree(interrupted, tmp_path / "run")
    with pytest.raises(ValueError) as error:
        job(run_dir, task=toy.model(dropout=0.1, ffn=32)).run()
    assert str(error.value) == (
        f"{run_dir} was trained with task ffn = 24, now 32; "
        "take another run_dir, or the task as it was"
    )
    job(run_dir, seed=4, steps=11).run()
    assert f"{run_dir}: changed since the checkpoint: seed = 3, now 4" in capsys.readouterr().out


def test_initial_weights_of_another_run(finished, tmp_path):
    """A step of rate 0 leaves them as they came, on any mesh."""
    still = dict(steps=1, optimizer=optim.AdamW(rate=0.0), mesh=mesh.Mesh(data=8, fsdp=1))
    job(tmp_path / "new", initial=str(finished), **still).run()
    _, theirs, _, _ = checkpoint.restore_model(str(finished))
    _, ours, _, _ = checkpoint.restore_model(str(tmp_path / "new"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    with pytest.raises(ValueError, match="holds a model of other sizes; make the task fit it"):
        job(tmp_path / "odd", initial=str(finished), task=toy.model(ffn=32)).run()


def test_a_batch_that_does_not_split(tmp_path):
    with pytest.raises(ValueError) as error:
        job(tmp_path, batch=12).run()
    assert str(error.value) == (
        "batch 12 does not split over data*fsdp = 8; take a multiple of 8"
    )


def test_step_s_takes_rows_s_times_batch():
    """From any start, laid out over the mesh, read by any number of threads."""
    opened = toy.Counting().open(4)
    rows, device_mesh = opened.dataset, mesh.Mesh(data=2, fsdp=2, context=2).make()
    with jax.set_mesh(device_mesh):
        batches, again = (list(data.batches(opened, 3, 6, device_mesh, readers=n)) for n in (1, 5))
    assert len(batches) == 3
    for step, batch in enumerate(batches, start=3):
        want = toy.stack([rows[step * 4 + i] for i in range(4)])
        assert batch.keys() == want.keys()
        for name, array in batch.items():
            assert array.sharding.shard_shape(array.shape) == (1, 8)
            assert array.dtype == want[name].dtype
            np.testing.assert_array_equal(array, want[name], err_msg=name)
            np.testing.assert_array_equal(array, again[step - 3][name])


def test_the_learning_rate_rises_and_falls():
    schedule = optim.AdamW(rate=0.5, warmup=10, final=0.1).schedule(110)
    rates = [float(schedule(step)) for step in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(rates, [0, 0.25, 0.5, 0.5 * (0.1 + 0.9 / 2), 0.05], rtol=1e-6)
    assert float(optim.AdamW(rate=0.5, warmup=100).schedule(1)(0)) == 0.5


def test_norms_do_not_decay_and_gradients_are_clipped():
    """With zero gradients only decay moves weights; a gradient is cut to the norm `clip`."""
    weights = dict(matrix=np.full((2, 2), 2, np.float32), norm=np.full(2, 2, np.float32))
    adamw = optim.AdamW(rate=0.5, warmup=0, weight_decay=0.1, clip=1.0, eps=1.0, b1=0.0)
    optimizer = adamw.make(10, dict(matrix=True, norm=False))
    state = optimizer.init(weights)
    updates, _ = optimizer.update(jax.tree.map(np.zeros_like, weights), state, weights)
    np.testing.assert_allclose(updates["matrix"], -0.5 * 0.1 * 2, rtol=1e-6)
    np.testing.assert_array_equal(updates["norm"], 0)
    large, larger = (dict(matrix=np.full((2, 2), g, np.float32), norm=np.zeros(2, np.float32))
                     for g in (1e3, 1e6))  # fmt: skip
    got, same = (optimizer.update(grads, state, weights)[0] for grads in (large, larger))
    # clipped to 0.5 each; Adam's first step is then g / (|g| + eps)
    np.testing.assert_allclose(got["matrix"], -0.5 * (0.5 / 1.5 + 0.2), rtol=1e-5)
    np.testing.assert_allclose(got["matrix"], same["matrix"], rtol=1e-5)


def test_time_left():
    assert [metrics.time_left(seconds) for seconds in (0, 59.6, 61, 3600, 36_061)] == [
        "0:00", "1:00", "1:01", "1:00:00", "10:01:01"]  # fmt: skip


def two_steps(device_mesh, model, **fields) -> tuple[dict, dict]:
    """State and metrics after two steps on given rows."""
    run = train.Train(model, toy.Counting(), batch=8, steps=10, **fields)
    with jax.set_mesh(device_mesh):
        state, step_fn = run.make()(run.seed), run.step_fn()
        batches = data.batches(run.data.open(8), 0, 2, device_mesh, run.accumulate)
        for step, batch in enumerate(batches):
            state, values = step_fn(state, batch, step)
    return jax.tree.map(np.asarray, (state, values))


@pytest.mark.parametrize(
    "sizes, context",
    [(dict(data=2, fsdp=2, context=2), "gather"),
     (dict(data=2, fsdp=1, context=2, tensor=2), "ring"),
     (dict(fsdp=1), "gather")],
)  # fmt: skip
def test_a_batch_in_parts_is_the_batch(sizes, context):
    """Though the parts weigh differently: rows differ in their padding and vision."""
    devices = jax.devices()[: 8 if len(sizes) > 1 else 1]
    device_mesh = mesh.Mesh(**sizes).make(devices)
    model = toy.model(dropout=0.0, context=context)
    whole, parts = (two_steps(device_mesh, model, accumulate=count) for count in (1, 2))
    for key in ("loss", "gradient_norm", "tokens"):
        np.testing.assert_allclose(parts[1][key], whole[1][key], rtol=1e-5, err_msg=key)
    for got, want in zip(*(jax.tree.leaves(state["params"]) for state, _ in (parts, whole)),
                         strict=True):  # fmt: skip
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_gradients_cross_data_once_however_many_parts():
    """From the compiled step: each part's are summed into the pieces that fsdp cuts weights into,
    and these pieces over data at the end."""
    device_mesh, received = mesh.Mesh(data=4, fsdp=2).make(), {}
    for count in (2, 4):
        run = train.Train(toy.model(dropout=0.0), toy.Counting(), batch=32, accumulate=count)
        with jax.set_mesh(device_mesh):
            compiled = run.step_fn().lower(*run.arguments(device_mesh)).compile()
        received[count] = hlo.read(compiled.as_text()).collective_bytes
    assert received[4]["reduce-scatter"] == 2 * received[2]["reduce-scatter"] > 0
    piece = 4 * params.count(run.task.params()) / 2
    once = 2 * piece * 3 / 4  # what a ring of 4 receives to sum it
    for count in (2, 4):  # and norms, counts and losses
        assert once <= received[count]["all-reduce"] < 1.1 * once
    assert received[4]["all-gather"] < 2 * received[2]["all-gather"]  # weights, of each part


def test_parts_of_like_rows_drop_differently_along_data():
    row = toy.pack([list(range(3, 9)), list(range(20, 29))], 16)
    losses = []
    for count in (1, 2):
        run = train.Train(toy.model(dropout=0.5), None, accumulate=2)
        with jax.set_mesh(mesh.Mesh(data=count, fsdp=1).make(jax.devices()[:count])):
            batch = {name: mesh.place(x, "BT") for name, x in toy.stack([row] * 2 * count).items()}
            state, key = run.make()(0), jax.random.key(1)
            _, _, values = jax.jit(lambda state, batch, key, task=run.task: update.gradients(
                task, state, batch, key, 2))(state, batch, key)
        losses.append(float(values["loss"]))
    assert abs(losses[0] - losses[1]) > 1e-3


def test_a_tokenizers_batch_in_parts():
    """Mean loss of the halves, one after the other: batch norm's record passes on between them."""
    config = vq.VQConfig(codebook_size=16, width=8, multipliers=(1, 2), res_blocks=1,
                         attention_levels=(1,), norm_groups=4)  # fmt: skip
    task = TokenizerTask(config, buffer_rows=64)
    image_BHWC = jax.random.uniform(jax.random.key(1), (8, 16, 16, 3), minval=-1)
    with jax.set_mesh(mesh.Mesh().make(jax.devices()[:1], task.axis_type)):
        params, variables = jax.jit(task.init)(jax.random.key(0))
        state, key = dict(params=params, variables=variables), jax.random.key(2)
        _, after, values = jax.jit(
            lambda batch: update.gradients(task, state, batch, key, 2))(dict(image=image_BHWC))
        loss, losses = jax.jit(task.loss), []
        for half in (image_BHWC[:4], image_BHWC[4:]):
            value, (variables, _) = loss(params, variables, dict(image=half), key)
            losses.append(value)
    np.testing.assert_allclose(values["loss"], np.mean(losses), rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
                 after, variables)  # fmt: skip


def test_parts_that_do_not_split(tmp_path):
    with pytest.raises(ValueError) as error:
        job(tmp_path, batch=8, accumulate=2).run()
    assert str(error.value) == (
        "batch 8 does not split in 2 parts over data*fsdp = 8; take a multiple of 16"
    )


def test_the_moving_average_is_kept_and_loaded(tmp_path):
    device_mesh = mesh.Mesh().make()
    (one, _), (two, _) = (two_steps(device_mesh, toy.model(), ema=ema) for ema in (0.0, 0.75))
    assert "ema" not in one
    with jax.set_mesh(device_mesh):
        first = job(tmp_path, task=toy.model(), seed=0).make()(0)["params"]
    for old, last, average in zip(*(jax.tree.leaves(tree) for tree in
                                    (first, two["params"], two["ema"])), strict=True):  # fmt: skip
        # between the start, which weighs 0.75^2, and the last of two updates, which weighs 0.25
        np.testing.assert_array_less(np.abs(average - last).max(), np.abs(old - last).max())
    run = job(tmp_path / "run", ema=0.75, steps=2, save_every=1)
    run.run()
    _, params, _, _ = checkpoint.restore_model(run.run_dir)
    with jax.set_mesh(device_mesh), checkpoint.Checkpoints(run.run_dir) as saved:
        state = saved.restore(2, run.abstract_state(device_mesh))
    np.testing.assert_array_equal(params["embed"], np.asarray(state["ema"]["embed"]))
    assert np.abs(params["embed"] - np.asarray(state["params"]["embed"])).max() > 0
    after = update.initial_weights(run.task, run.run_dir, state)
    np.testing.assert_array_equal(after["ema"]["embed"], after["params"]["embed"])


@pytest.mark.parametrize(
    "fields", [dict(moments="bfloat16"), pytest.param(dict(offload=True), marks=pytest.mark.slow)]
)
def test_moments_in_less_or_other_memory(fields):
    """bfloat16 moves weights by nearly the same; the host's memory changes no bit."""
    device_mesh = mesh.Mesh().make()
    plain, kept = (two_steps(device_mesh, toy.model(), optimizer=optim.AdamW(rate=0.01, warmup=0,
                                                                             **options))
                   for options in ({}, fields))  # fmt: skip
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), plain[0]["params"],
                         kept[0]["params"])  # fmt: skip
    worst = max(jax.tree.leaves(moved))
    assert worst == 0 if "offload" in fields else 0 < worst < 0.01 * 0.1
    run = train.Train(toy.model(), toy.Counting(), optimizer=optim.AdamW(**fields))
    with jax.set_mesh(device_mesh):
        moments = jax.tree.leaves(run.make()(0)["optimizer"])
    big = [x for x in moments if x.ndim]
    if "offload" in fields:
        assert {x.sharding.memory_kind for x in big} == {"pinned_host"}
    else:
        assert {x.dtype.name for x in big} == {"bfloat16"}


def test_a_step_is_dispatched_before_the_last_ones_metrics_are_read(tmp_path, monkeypatch):
    told = []
    step_fn, write = train.Train.step_fn, metrics.Metrics.write

    def telling(self):
        step = step_fn(self)
        return lambda state, batch, at: (told.append(f"step {at + 1}"), step(state, batch, at))[1]

    monkeypatch.setattr(train.Train, "step_fn", telling)
    monkeypatch.setattr(metrics.Metrics, "write", lambda self, step, *rest: (
        told.append(f"metrics {step}"), write(self, step, *rest))[1])  # fmt: skip
    job(tmp_path, steps=3, save_every=3).run()
    assert told == ["step 1", "step 2", "metrics 1", "step 3", "metrics 2", "metrics 3"]


def test_initial_weights_with_another_padding_of_the_vocabulary(finished):
    """The padding is cut or filled; a model of another vocabulary is refused."""
    other = toy.model(dropout=0.1, vocab_multiple=32)
    with jax.set_mesh(mesh.Mesh().make()):
        state = job(finished, task=other).make()(0)
        found = update.initial_weights(other, str(finished), state)["params"]
        _, params, _, _ = checkpoint.restore_model(str(finished))
        assert found["embed"].shape == (64, 16) and found["head"].shape == (16, 64)
        np.testing.assert_array_equal(np.asarray(found["head"])[:, :48], params["head"])
        back = toy.model(dropout=0.1).adapted(jax.tree.map(np.asarray, found))
        np.testing.assert_array_equal(back["embed"], params["embed"])
        larger = toy.model(vocab=60)
        with pytest.raises(ValueError, match="holds a model of other sizes"):
            update.initial_weights(larger, str(finished), job(finished, task=larger).make()(0))
