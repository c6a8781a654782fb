"""Steps that are left out: which ones, that they leave nothing behind, and when they are too many.

W steps that are looked back on  B rows  D width
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu3_jax import divergence, mesh, optim, update
from emu3_jax.divergence import Guard


def judged(guard: Guard, losses, norms=None) -> tuple[list[bool], dict]:
    """(which of the steps are left out, figures after each)."""
    losses = jnp.asarray(losses, jnp.float32)
    norms = jnp.ones_like(losses) if norms is None else jnp.asarray(norms, jnp.float32)

    def one(seen, inputs):
        ok, seen = divergence.judge(guard, seen, *inputs)
        return seen, (~ok, divergence.figures(seen))

    inputs = losses, norms, jnp.arange(len(losses))
    _, (out, figures) = jax.jit(lambda: jax.lax.scan(one, divergence.init(guard), inputs))()
    return np.flatnonzero(out).tolist(), jax.tree.map(np.asarray, figures)


NOISE = np.random.default_rng(0).normal(size=200)


def test_what_is_not_finite_is_left_out_and_counted():
    losses, norms = 3 + NOISE[:40], np.ones(40)
    losses[[0, 7]], norms[[9, 30]] = np.nan, [np.inf, -np.inf]
    losses[20], norms[21] = 1e30, 1e30  # far too large, but nobody asked
    out, figures = judged(Guard(window=12, skips=2), losses, norms)
    assert out == [0, 7, 9, 30]
    assert figures["skipped"][-1] == 4
    assert figures["skipped_recently"][[0, 8, 9, 11, 12, 19, 21, 29, 30]].tolist() == [
        1, 2, 3, 3, 2, 1, 0, 0, 1]  # fmt: skip
    exceeded = [Guard(window=12, skips=2).exceeded(dict(skipped_recently=count))
                for count in figures["skipped_recently"]]  # fmt: skip
    assert np.flatnonzero(exceeded).tolist() == [9, 10, 11]


@pytest.mark.parametrize("spike, left_out", [(5.0, False), (7.0, True), (-50.0, False)])
@pytest.mark.parametrize("place", ["loss", "norm"])
def test_a_spike_is_far_above_the_last_ones(spike, left_out, place):
    """In standard deviations of the window; what is far below is welcome."""
    values = 3 + 0.1 * NOISE[:100]
    mean, spread = values[60:92].mean(), values[60:92].std()
    values[92] = mean + spike * spread
    inputs = dict(losses=values) if place == "loss" else dict(losses=np.ones(100), norms=values)
    out, _ = judged(Guard(6.0, window=32), **inputs)
    assert out == ([92] if left_out else [])


def test_no_spike_before_a_quarter_of_the_window_is_known():
    losses = 3 + 0.1 * NOISE[:64]
    for at, left_out in ((7, False), (8, True)):
        values = losses.copy()
        values[at] = 100
        assert (at in judged(Guard(6.0, window=32), values)[0]) == left_out


def test_a_window_without_noise_has_room_for_some():
    losses = np.full(64, 2.0)
    losses[[40, 50]] = 2.0 * (1 + 0.005), 2.0 * (1 + 0.02)
    assert judged(Guard(6.0, window=32), losses)[0] == [50]


def test_what_is_left_out_is_no_measure_of_what_follows():
    """So a level that has risen for good is too many steps before it becomes the usual one."""
    losses = 3 + 0.1 * NOISE[:80]
    losses[50] = 1e6
    losses[60:] += 3
    guard = Guard(6.0, window=32)
    out, figures = judged(guard, losses)
    assert out == [50, *range(60, 80)]
    exceeded = [guard.exceeded(dict(skipped_recently=n)) for n in figures["skipped_recently"]]
    assert exceeded.index(True) == 60 + 9


@pytest.mark.parametrize("skips, window", [(-1, 8), (8, 8)])
def test_a_budget_that_is_never_exceeded(skips, window):
    with pytest.raises(ValueError) as error:
        divergence.init(Guard(skips=skips, window=window))
    assert str(error.value) == (
        f"guard.skips = {skips} of the last guard.window = 8 steps are never exceeded; take fewer, "
        "0 or more, or a longer window"
    )


@dataclasses.dataclass
class Line(update.Task):
    """Fits y = x w; its variables are the last batch's mean and the number of the step."""

    def init(self, key):
        return dict(w_D=jnp.ones(3)), dict(mean=jnp.zeros(()), done=jnp.zeros((), jnp.int32))

    def loss(self, params, variables, batch, key):
        loss = jnp.square(batch["x_BD"] @ params["w_D"] - batch["y_B"]).mean()
        return loss, (variables | dict(mean=batch["x_BD"].mean()), {})

    def after_update(self, params, variables, step, key):
        return params, variables | dict(done=step + 1)


STEPS, NAN, SPIKE = 14, 4, 11


@pytest.fixture(scope="module")
def trained():
    """(states, figures, the last state as after going back, layouts of both) of some steps.

    A row of one is not a number, those of a later one are far too large.
    """
    task, guard, device_mesh = Line(), Guard(6.0, window=32, skips=1), mesh.Mesh(data=8).make()
    optimizer = optim.AdamW(rate=0.1, warmup=0, offload=True).make(STEPS + 1, None)
    rng, states, figures = np.random.default_rng(0), [], []
    with jax.set_mesh(device_mesh):
        init = functools.partial(update.init, task, optimizer, ema=0.9, guard=guard)
        step = functools.partial(update.train_step, task, optimizer, 0, ema=0.9, guard=guard)
        step_fn, state = jax.jit(step, donate_argnums=0), jax.jit(init)(0)
        for at in range(STEPS):
            states.append(jax.tree.map(np.asarray, state))
            x_BD = rng.normal(size=(16, 3)).astype(np.float32) * (1e3 if at == SPIKE else 1)
            batch = dict(x_BD=x_BD, y_B=x_BD @ np.array([3, -3, 5], np.float32))
            batch["y_B"][2] += np.nan if at == NAN else 0
            put = {name: mesh.place(x, "B" + "." * (x.ndim - 1)) for name, x in batch.items()}
            state, values = step_fn(state, put, at)
            figures.append(jax.tree.map(float, values))
        assert step_fn._cache_size() == 1
        fresh = divergence.fresh(state, 5)
    states.append(jax.tree.map(np.asarray, state))
    layouts = [jax.tree.map(lambda x: x.sharding, tree) for tree in (state, fresh)]
    return states, figures, jax.tree.map(np.asarray, fresh), layouts


@pytest.mark.parametrize("part", ["params", "optimizer", "ema", "variables"])
def test_what_is_left_out_changes_nothing(trained, part):
    """Neither weights, moments in the host's memory, the optimizer's count, the moving average nor
    variables, but for those that follow from the step's number."""
    states, figures, _, _ = trained
    assert np.isnan(figures[NAN]["loss"]) and np.isnan(figures[NAN]["gradient_norm"])
    assert 1e5 < figures[SPIKE]["loss"] < np.inf
    for at in range(STEPS):
        before, after = (jax.tree.leaves(state[part]) for state in states[at : at + 2])
        same = [np.array_equal(x, y) for x, y in zip(before, after, strict=True)]
        if part == "variables":
            assert (states[at][part]["done"], states[at + 1][part]["done"]) == (at, at + 1)
            same.remove(False)
        assert set(same) == {at in (NAN, SPIKE)}, at
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(states[-1]))


def test_metrics_tell_how_many_were_left_out(trained):
    _, figures, _, _ = trained
    count = [(at >= NAN) + (at >= SPIKE) for at in range(STEPS)]
    assert [values["skipped"] for values in figures] == count
    assert [values["skipped_recently"] for values in figures] == count


def test_a_state_that_went_back_starts_with_no_step_left_out(trained):
    """The total goes on from what it is told; all else stays, and where it is."""
    states, _, fresh, layouts = trained
    got, want = (dict(state["guard"]) for state in (fresh, states[-1]))
    assert (got.pop("skipped"), want.pop("skipped")) == (5, 2)
    assert (got.pop("skipped_W").sum(), want.pop("skipped_W").sum()) == (0, 2)
    jax.tree.map(np.testing.assert_array_equal, fresh | dict(guard=got),
                 states[-1] | dict(guard=want))  # fmt: skip
    assert layouts[0] == layouts[1]
