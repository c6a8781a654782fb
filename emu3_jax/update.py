"""What is trained, and one update of it: weights, gradients of a batch, the optimizer's arrays."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType

from emu3_jax import checkpoint, data, divergence
from emu3_jax.mesh import apart_along_data, spec


class Task:
    """What is trained: weights, a pure loss, and perhaps arrays that no gradient trains."""

    axis_type = AxisType.Explicit  # how the mesh axes are typed while this task runs
    policies = ()  # of rematerialisation, from least to most recomputation, where there are any
    row = {}  # types of a batch's arrays by name, where all are [B, T]

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Initial (weights, variables); variables are e.g. batch statistics."""
        raise NotImplementedError

    def loss(self, params, variables, batch, key) -> tuple[jax.Array, tuple[Any, dict]]:
        """(loss, (variables, metrics)) of one batch; metrics are scalars by name."""
        raise NotImplementedError

    def weight(self, batch) -> jax.Array | float:
        """What `loss` is a mean over, so that means of parts of a batch can be put together."""
        return len(jax.tree.leaves(batch)[0])

    def counts(self, batch) -> dict:
        """What a batch holds, without a model: perhaps tokens, flops and flops_dense (see
        metrics.py)."""
        return {}

    def adapted(self, params):
        """Another run's weights in this task's sizes, where only padding differs."""
        return params

    def initial(self, path: str, params, variables) -> tuple[Any, Any]:
        """(weights, variables) to start from: those of the run in `path`, not the given ones."""
        _, params, variables, _ = checkpoint.restore_model(path)
        return self.adapted(params), variables

    def after_update(self, params, variables, step, key) -> tuple[Any, Any]:
        """What happens to the state after the optimizer's update, e.g. codebook restarts."""
        return params, variables

    def decays(self):
        """A tree of bools, True where weight decay applies; None means everywhere."""
        return None

    def groups(self):
        """A tree of names, by which gradients are clipped apart; None means all together."""
        return None


def init(task: Task, optimizer, seed: int, ema=0.0, guard=divergence.FINITE) -> dict:
    """The state before the first step: params, variables, the optimizer's arrays, what the guard
    remembers, perhaps ema."""
    made = task.init(jax.random.key(seed))
    # Weak types (of jnp.full, say) are gone after a step, which would then be compiled again.
    params, variables = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), made)
    state = dict(params=params, variables=variables, optimizer=optimizer.init(params),
                 guard=divergence.init(guard))  # fmt: skip
    return state | (dict(ema=params) if ema else {})


def initial_weights(task: Task, run_dir: str, state: dict) -> dict:
    """Weights and variables of another run, laid out like those of `state`.

    Raises ValueError if they are not the same arrays.
    """
    params, variables = task.initial(run_dir, state["params"], state["variables"])
    found = dict(params=params, variables=variables)
    wanted = {part: state[part] for part in found}
    shapes = [jax.tree.map(lambda x: tuple(x.shape), tree) for tree in (found, wanted)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"initial={run_dir} holds a model of other sizes; make the task fit it")
    found = jax.tree.map(
        lambda new, old: jax.device_put(new.astype(old.dtype), old.sharding), found, wanted
    )
    return found | (dict(ema=jax.tree.map(jnp.copy, found["params"])) if "ema" in state else {})


def abstract_state(make, seed, device_mesh):
    """Shapes and layouts of the state that make(seed) would return, without making it."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype,
            sharding=jax.sharding.NamedSharding(device_mesh, x.sharding.spec,
                                                memory_kind=x.sharding.memory_kind)
            if x.sharding is not None else jax.sharding.NamedSharding(device_mesh, jax.P()),
        ),
        jax.eval_shape(make, seed),
    )


def train_step(
    task: Task, optimizer, seed: int, state: dict, batch: dict, step, accumulate=1, ema=0.0,
    guard=divergence.FINITE,
) -> tuple:  # fmt: skip
    """One update -> (state, metrics). Random keys come from (seed, step) alone.

    Where the guard is against it, only what follows from the step's number happens: the optimizer
    (one of optim.py's) takes an argument `ok` and leaves its arrays as they were.
    """
    step = jnp.int32(step)  # of a Python number's weak type, what is made of it would be, too
    loss_key, update_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    grads, variables, values = gradients(task, state, batch, loss_key, accumulate)
    norm = optax.tree.norm(grads)
    ok, seen = divergence.judge(guard, state["guard"], values["loss"], norm, step)
    updates, moments = optimizer.update(grads, state["optimizer"], state["params"], ok=ok)
    params = optax.apply_updates(state["params"], updates)
    made, old = (params, variables), (state["params"], state["variables"])
    params, variables = optax.tree.where(ok, made, old)
    params, variables = task.after_update(params, variables, step, update_key)
    values |= dict(gradient_norm=norm) | task.counts(batch) | divergence.figures(seen)
    state = dict(state, params=params, variables=variables, optimizer=moments, guard=seen)
    if ema:
        mean = jax.tree.map(lambda old, new: ema * old + (1 - ema) * new, state["ema"], params)
        state["ema"] = optax.tree.where(ok, mean, state["ema"])
    return state, values


def gradients(task: Task, state: dict, batch: dict, key, accumulate: int) -> tuple:
    """(gradients, variables, metrics) of a batch, taken in `accumulate` parts.

    The gradient is that of the whole batch's mean loss. A metric is the mean over the parts,
    weighed as the loss is. Of each part gradients are summed over the mesh axes that cut weights,
    because no device holds them whole; over `data`, which may cross slices, once for all parts
    (if the axes are explicit).
    """
    params, variables = state["params"], state["variables"]
    if accumulate == 1:
        return _part(task, params, variables, batch, key)
    if task.axis_type is AxisType.Auto:  # its variables are of a part's rows on all devices
        return _in_parts(task, params, variables, batch, key, accumulate, task.weight(batch))

    def local(params, key, batch):
        total = jax.lax.psum(task.weight(batch), "data")
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        grads, _, values = _in_parts(task, params, variables, batch, key, accumulate, total)
        return jax.lax.psum((grads, values), "data")

    layouts = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, params)
    grads, values = apart_along_data(local, (layouts, jax.P()))((params, key), batch)
    return grads, variables, values


def _part(task: Task, params, variables, batch, key) -> tuple:
    grad_fn = jax.value_and_grad(task.loss, has_aux=True)
    (loss, (variables, values)), grads = grad_fn(params, variables, batch, key)
    return grads, variables, dict(loss=loss, **values)


def _in_parts(task: Task, params, variables, batch, key, count: int, total) -> tuple:
    """`_part` of `count` parts, one after the other, each weighed by its share of `total`."""

    def add(carry, inputs):
        sums, variables = carry
        grads, variables, values = _part(task, params, variables, *inputs)
        share = task.weight(inputs[0]) / total
        sums = jax.tree.map(lambda old, new: old + share * new, sums, (grads, values))
        return (sums, variables), None

    parts = jax.tree.map(lambda x: _parts(x, count), batch), jax.random.split(key, count)
    one = jax.tree.map(lambda x: x[0], parts)
    *_, values = jax.eval_shape(functools.partial(_part, task), params, variables, *one)
    zeros = jax.tree.map(jnp.zeros_like, (params, values))
    ((grads, values), variables), _ = jax.lax.scan(add, (zeros, variables), parts)
    return grads, variables, values


def _parts(x_B, count: int):
    """Rows in `count` parts along a new first axis, such that no row changes its device."""
    layout = spec(data.letters(x_B.ndim))
    return jax.shard_map(
        lambda x_B: x_B.reshape(count, -1, *x_B.shape[1:]),
        in_specs=layout, out_specs=jax.P(None, *layout), check_vma=False,
    )(x_B)  # fmt: skip
