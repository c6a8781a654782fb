"""Layouts by letters, and the same training whatever the mesh.

B batch  T query position  D width  V vocab
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from emu3_jax import mesh, optim, params, update
from emu3_jax.params import Param
from tests import toy

B, T = 8, 16
MESHES = [
    dict(data=8, fsdp=1),
    dict(fsdp=8),
    dict(data=2, fsdp=2, tensor=2),
    dict(fsdp=2, context=4),
    dict(data=2, fsdp=1, context=2, tensor=2),
    dict(fsdp=1, context=4, tensor=2),
]
RINGS = [dict(fsdp=2, context=4), dict(data=2, fsdp=1, context=2, tensor=2)]


def name(sizes: dict[str, int]) -> str:
    return "*".join(f"{axis}{size}" for axis, size in sizes.items())


def remembering(model) -> optax.GradientTransformation:
    """AdamW whose state begins with the last gradient.

    With the usual eps a gradient that is 0 but for rounding moves its weight like any other.
    """
    last = optax.GradientTransformation(lambda weights: weights, lambda grads, *_: (grads, grads))
    return optax.chain(last, optim.AdamW(rate=0.01, warmup=0, eps=1e-3).make(10, model.decays()))


@pytest.fixture(scope="module")
def batches() -> list[dict[str, np.ndarray]]:
    """Two batches of packed rows with padding; the first row is filled, the last nearly empty."""
    rows = toy.Counting(length=T).rows()
    full = toy.pack([list(range(3, 9)), list(range(20, 32))], T)
    assert full["segments"].all()
    few = toy.pack([[5, 40, 6]], T)
    return [toy.stack([full, *(rows[first + i] for i in range(B - 2)), few]) for first in (0, 50)]


def two_steps(device_mesh, batches, context: str = "gather") -> list[dict]:
    """Metrics, gradients and weights of two training steps with dropout, as NumPy arrays."""
    # Several chunks on every device.
    model = toy.model(dropout=0.1, loss_tile=16, context=context)
    optimizer = remembering(model)
    with jax.set_mesh(device_mesh):
        make = jax.jit(functools.partial(update.init, model, optimizer))
        layout = update.abstract_state(make, 0, device_mesh)
        state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), _state(), layout)
        step_fn = jax.jit(functools.partial(update.train_step, model, optimizer, 7))
        results = []
        for step, batch in enumerate(batches):
            put = {key: jax.device_put(x, mesh.sharding(device_mesh, "BT"))
                   for key, x in batch.items()}  # fmt: skip
            state, values = step_fn(state, put, step)
            results.append(jax.tree.map(np.asarray, dict(
                values=values, grads=state["optimizer"][0], params=state["params"])))  # fmt: skip
    return results


@functools.cache
def _state() -> dict:
    """The initial state, made on one device."""
    model = toy.model()
    optimizer = remembering(model)
    with jax.set_mesh(mesh.Mesh().make(jax.devices()[:1])):
        make = jax.jit(functools.partial(update.init, model, optimizer))
        return jax.tree.map(np.asarray, make(0))


@pytest.fixture(scope="module")
def alone(batches) -> list[dict]:
    return two_steps(mesh.Mesh().make(jax.devices()[:1]), batches)


@pytest.mark.parametrize(
    "sizes, context",
    [(sizes, "gather") for sizes in MESHES] + [(sizes, "ring") for sizes in RINGS],
    ids=lambda x: x if isinstance(x, str) else name(x),
)
def test_training_is_the_same_on_every_mesh(sizes, context, batches, alone):
    """Loss, metrics, every gradient and every weight of two steps with dropout 0.1."""
    spread = two_steps(mesh.Mesh(**sizes).make(), batches, context)
    for step in range(2):
        for key, value in alone[step]["values"].items():
            np.testing.assert_allclose(spread[step]["values"][key], value, rtol=2e-6, err_msg=key)
        for part, bound in (("grads", 2e-5), ("params", 2e-5)):  # float32 rounds to 4e-6
            want = jax.tree_util.tree_leaves_with_path(alone[step][part])
            got = jax.tree.leaves(spread[step][part])
            for (path, one), other in zip(want, got, strict=True):
                assert np.abs(one).max() > 1e-4, path
                where = f"step {step} {part} {jax.tree_util.keystr(path)}"
                np.testing.assert_allclose(other, one, rtol=0, err_msg=where,
                                           atol=bound * np.abs(one).max())  # fmt: skip


def test_the_compared_steps_are_no_trivial_ones(alone):
    first, second = alone
    assert first["values"]["loss"] != second["values"]["loss"]
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), first["params"], second["params"])
    assert min(jax.tree.leaves(moved)) > 1e-4


def test_initial_weights_are_the_same_on_every_mesh():
    model = toy.model()
    with jax.set_mesh(mesh.Mesh(data=2, fsdp=2, tensor=2).make()):
        weights, variables = jax.jit(model.init)(jax.random.key(0))
        assert variables == {}
        assert weights["layers"]["attn"]["q"].sharding.shard_shape((2, 16, 4, 8)) == (2, 8, 2, 8)
    jax.tree.map(np.testing.assert_array_equal, weights, _state()["params"])


def test_letters_choose_the_axes_and_no_axis_twice():
    assert mesh.spec("BTD") == jax.P(("data", "fsdp", "fsdp_minor"), ("context",), None)
    assert mesh.spec("BSKH") == jax.P(("data", "fsdp", "fsdp_minor"), None, ("tensor",), None)
    assert mesh.spec("LDNH") == jax.P(None, ("fsdp", "fsdp_minor", "context"), ("tensor",), None)
    assert mesh.spec("VD") == jax.P(("tensor",), ("fsdp", "fsdp_minor", "context"))
    assert mesh.spec("NK.") == jax.P(("tensor",), None, None)
    assert mesh.spec("") == jax.P()
    with jax.set_mesh(mesh.Mesh(data=2, fsdp=2, context=2).make()):
        assert mesh.shards("BTDN") == [4, 2, 1, 1]
        assert mesh.shards("DT") == [4, 1]


def test_placing_and_einsum_lay_out_by_their_letters():
    with jax.set_mesh(mesh.Mesh(data=2, fsdp=1, context=2, tensor=2).make()):
        x_BTD = mesh.place(jnp.arange(32.0).reshape(2, 4, 4), "BTD")
        assert x_BTD.sharding.shard_shape(x_BTD.shape) == (1, 2, 4)
        x_BSH = mesh.place(x_BTD, "BSH")
        assert x_BSH.sharding.shard_shape(x_BSH.shape) == (1, 4, 4)
        np.testing.assert_array_equal(x_BSH, x_BTD)
        y_BTF = mesh.einsum("BTD,DF->BTF", x_BTD, mesh.place(jnp.ones((4, 6)), "DF"))
        assert y_BTF.sharding.shard_shape(y_BTF.shape) == (1, 2, 3)
        np.testing.assert_array_equal(y_BTF, np.asarray(x_BTD).sum(-1, keepdims=True) * np.ones(6))


def test_a_training_step_never_holds_the_logits_of_a_whole_vocabulary():
    V, rows, length = 480, 5, 37  # only arrays over all positions have multiples of 185 values

    def largest_over_positions(tile: int) -> int:
        model = toy.model(vocab=V, loss_tile=tile)
        optimizer = optim.AdamW().make(10, model.decays())
        batch = toy.stack([toy.pack([list(range(20))], length)] * rows)
        with jax.set_mesh(mesh.Mesh().make(jax.devices()[:1])):
            state = jax.eval_shape(functools.partial(update.init, model, optimizer), 0)
            step_fn = jax.jit(functools.partial(update.train_step, model, optimizer, 0))
            text = step_fn.lower(state, batch, 0).compile().as_text()
        sizes = {math.prod(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", text)}
        return max(size for size in sizes if size % (rows * length) == 0)

    assert largest_over_positions(V) == rows * length * V
    assert largest_over_positions(240) == rows * length * 240


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(data=-1), "mesh data=-1*fsdp=-1*context=1*tensor=1: sizes are 1 or more, and one of "
                        "them may be -1"),
        (dict(tensor=0), "mesh data=1*fsdp=-1*context=1*tensor=0: sizes are 1 or more, and one of "
                         "them may be -1"),
        (dict(data=3), "mesh data=3*fsdp=-1*context=1*tensor=1 does not fit 8 devices; the product "
                       "must be 8 (-1 takes what is left)"),
        (dict(data=2, fsdp=2), "mesh data=2*fsdp=2*context=1*tensor=1 does not fit 8 devices; the "
                               "product must be 8 (-1 takes what is left)"),
        (dict(data=16), "mesh data=16*fsdp=-1*context=1*tensor=1 does not fit 8 devices; the "
                        "product must be 8 (-1 takes what is left)"),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_fit(sizes, message):
    with pytest.raises(ValueError) as error:
        mesh.Mesh(**sizes).make()
    assert str(error.value) == message


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(fsdp=1, tensor=8), "weight LDKH: K = 2 does not split over tensor = 8; change that "
                                 "size or the mesh"),
        (dict(fsdp=8), "weight VD: D = 12 does not split over fsdp*context = 8; change that size "
                       "or the mesh"),
    ],
)  # fmt: skip
def test_weights_that_do_not_split(sizes, message):
    with jax.set_mesh(mesh.Mesh(**sizes).make()), pytest.raises(ValueError) as error:
        toy.model(width=12).init(jax.random.key(0))
    assert str(error.value) == message


def test_params_draw_count_and_decay():
    tree = dict(a=Param("DF", (40, 60), 0.5), b=Param("D", (40,)), c=Param("DF", (40, 60), 0.5))
    with jax.set_mesh(mesh.Mesh().make(jax.devices()[:1])):
        values = params.init(tree, jax.random.key(0))
    assert params.count(tree) == params.count(values) == 2 * 40 * 60 + 40
    assert params.decays(tree) == dict(a=True, b=False, c=True)
    assert abs(np.std(values["a"]) - 0.5) < 0.03 and abs(np.mean(values["a"])) < 0.03
    assert np.all(np.asarray(values["b"]) == 1)
    assert not np.allclose(values["a"], values["c"])  # each has a key of its own
