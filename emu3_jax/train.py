"""The one trainer, for the decoder and the tokenizer alike: state in, rows in, checkpoints out."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import grain
import jax
import numpy as np
import optax
from jax.sharding import AxisType

from emu3_jax import checkpoint, config, metrics, optim
from emu3_jax.mesh import Mesh, sharding, shards


class Task:
    """What is trained: weights, a pure loss, and perhaps arrays that no gradient trains."""

    axis_type = AxisType.Explicit  # how the mesh axes are typed while this task runs

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Initial (weights, variables); variables are e.g. batch statistics."""
        raise NotImplementedError

    def loss(self, params, variables, batch, key) -> tuple[jax.Array, tuple[Any, dict]]:
        """(loss, (variables, metrics)) of one batch; metrics are scalars by name."""
        raise NotImplementedError

    def after_update(self, params, variables, step, key) -> tuple[Any, Any]:
        """What happens to the state after the optimizer's update, e.g. codebook restarts."""
        return params, variables

    def decays(self):
        """A tree of bools, True where weight decay applies; None means everywhere."""
        return None


@dataclasses.dataclass
class Train:
    """Trains `task` on `data` for `steps` batches of `batch` rows; goes on where it stopped.

    `initial`, a run directory (as configs/convert.py makes of a published model, too), gives the
    weights and variables to start from instead of random ones.

    `data.rows()` is a Grain MapDataset of rows without end, each a pure function of its index;
    step s takes rows s*batch ... s*batch + batch - 1, so the step is all the data state there is.
    """

    task: Any
    data: Any
    run_dir: str = "runs/train"
    initial: str = ""
    steps: int = 1000
    batch: int = 32
    optimizer: optim.AdamW = dataclasses.field(default_factory=optim.AdamW)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    seed: int = 0
    log_every: int = 20
    save_every: int = 200
    keep: int = 2

    def run(self) -> None:
        """Trains to the last step, or says that it has been reached."""
        device_mesh = self.mesh.make(axis_type=self.task.axis_type)
        with jax.set_mesh(device_mesh), checkpoint.Checkpoints(self.run_dir, self.keep) as saved:
            start = saved.latest() or 0
            if start >= self.steps:
                print(f"{self.run_dir}: trained ({start} steps)")
                return
            optimizer = self.optimizer.make(self.steps, self.task.decays())
            make = jax.jit(functools.partial(init, self.task, optimizer))
            if start:
                self._check_same_run(saved.config(start))
                abstract = abstract_state(make, self.seed, device_mesh)
                state = saved.restore(start, abstract)
                print(f"{self.run_dir}: goes on at step {start}")
            else:
                state = make(self.seed)
                if self.initial:
                    state |= initial_weights(self.initial, state)
                self._write_config(state)
            self._loop(start, state, optimizer, device_mesh, saved)

    def _check_same_run(self, saved: dict) -> None:
        """Raises ValueError if the checkpoint is of another task; tells of what else changed."""
        mine = config.to_json(self)
        if changes := config.differences(saved["task"], mine["task"]):
            raise ValueError(
                f"{self.run_dir} was trained with task {changes[0]}; "
                "take another run_dir, or the task as it was"
            )
        for change in config.differences(saved, mine):
            print(f"{self.run_dir}: changed since the checkpoint: {change}")

    def _write_config(self, state) -> None:
        run_dir = pathlib.Path(self.run_dir)
        (run_dir / "config.json").write_text(json.dumps(config.to_json(self), indent=1) + "\n")
        weights = sum(x.size for x in jax.tree.leaves(state["params"]))
        print(f"{self.run_dir}: {weights:,} weights, {self.steps} steps of {self.batch} rows")

    def _loop(self, start, state, optimizer, device_mesh, saved) -> None:
        step_fn = jax.jit(
            functools.partial(train_step, self.task, optimizer, self.seed), donate_argnums=0
        )
        rows = self.data.rows()
        name = pathlib.Path(self.run_dir).name
        with metrics.Metrics(self.run_dir, name, start, self.steps) as log:
            batches = batches_from(rows, self.batch, start, self.steps, device_mesh)
            for step, batch in zip(range(start, self.steps), batches, strict=True):
                state, values = step_fn(state, batch, step)
                done = step + 1
                saves = done % self.save_every == 0 or done == self.steps
                if saves or done % self.log_every == 0 or step == start:
                    figures = {key: float(value) for key, value in values.items()}
                    log.write(done, figures)
                    _check_finite(done, figures)  # before saving: no run goes on from such a step
                if saves:
                    saved.save(done, state, self)


def _check_finite(step: int, figures: dict[str, float]) -> None:
    """Raises FloatingPointError if the update of `step` was made of infinities or NaN."""
    loss, norm = figures["loss"], figures["gradient_norm"]
    if not (np.isfinite(loss) and np.isfinite(norm)):
        raise FloatingPointError(
            f"step {step}: loss is {loss}, gradient norm {norm}; the step was not saved; "
            "lower the rate, or look for the row that causes it"
        )


def init(task: Task, optimizer: optax.GradientTransformation, seed: int) -> dict:
    """The state before the first step: params, variables and the optimizer's arrays."""
    params, variables = task.init(jax.random.key(seed))
    return dict(params=params, variables=variables, optimizer=optimizer.init(params))


def initial_weights(run_dir: str, state: dict) -> dict:
    """Weights and variables of another run, laid out like those of `state`.

    Raises ValueError if they are not the same arrays.
    """
    _, params, variables, _ = checkpoint.restore_model(run_dir)
    found, wanted = dict(params=params, variables=variables), dict(state)
    del wanted["optimizer"]
    shapes = [jax.tree.map(lambda x: tuple(x.shape), tree) for tree in (found, wanted)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"initial={run_dir} holds a model of other sizes; make the task fit it")
    return jax.tree.map(
        lambda new, old: jax.device_put(new.astype(old.dtype), old.sharding), found, wanted
    )


def abstract_state(make, seed, device_mesh):
    """Shapes and layouts of the state that make(seed) would return, without making it."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype,
            sharding=jax.sharding.NamedSharding(device_mesh, x.sharding.spec)
            if x.sharding is not None else jax.sharding.NamedSharding(device_mesh, jax.P()),
        ),
        jax.eval_shape(make, seed),
    )


def train_step(task: Task, optimizer, seed: int, state: dict, batch: dict, step) -> tuple:
    """One update -> (state, metrics). Random keys come from (seed, step) alone."""
    loss_key, update_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    grad_fn = jax.value_and_grad(task.loss, has_aux=True)
    (loss, (variables, values)), grads = grad_fn(
        state["params"], state["variables"], batch, loss_key
    )
    updates, moments = optimizer.update(grads, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    params, variables = task.after_update(params, variables, step, update_key)
    values = dict(loss=loss, **values, gradient_norm=optax.tree.norm(grads))
    return dict(params=params, variables=variables, optimizer=moments), values


def batches_from(rows: grain.MapDataset, batch: int, start: int, stop: int, device_mesh):
    """Batches of steps start ... stop-1 on the mesh.

    Each process reads only its own rows of a batch, which the mesh keeps together: equal blocks.
    """
    layout = sharding(device_mesh, "B")
    (parts,) = shards("B")
    if batch % parts:
        raise ValueError(
            f"batch {batch} does not split over data*fsdp = {parts}; take a multiple of {parts}"
        )
    pieces = layout.addressable_devices_indices_map((batch,)).values()
    first = min(piece.indices(batch)[0] for (piece,) in pieces)
    count = max(piece.indices(batch)[1] for (piece,) in pieces) - first
    blocks = rows.batch(count)

    def put(name, array):
        dims = "BT" if array.ndim == 2 else "B"
        shape = (batch, *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding(device_mesh, dims), array, shape)

    steps = grain.MapDataset.range(start, stop).map(
        lambda step: blocks[(step * batch + first) // count]
    )
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    for values in steps.to_iter_dataset(options):
        yield {name: put(name, array) for name, array in values.items()}

