"""The one trainer, for the decoder and the tokenizer alike: state in, rows in, checkpoints out."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import serialize_executable

from emu3_jax import checkpoint, chips, config, data, metrics, optim, preemption, update
from emu3_jax.mesh import Mesh, sharding


@dataclasses.dataclass
class Train:
    """Trains `task` on `data` for `steps` batches of `batch` rows; goes on where it stopped.

    `initial`, a run directory (as configs/convert.py makes of a published model, too), gives the
    weights and variables to start from instead of random ones; of a tokenizer, a published one's
    directory does as well.

    A batch may be taken in `accumulate` parts, one after the other, for one update. With `ema`
    (0.999, say) a moving average of the weights is kept, which is what others then load.

    With a task whose remat is "auto", the policy is the one that recomputes least of those whose
    step leaves the share `margin` of the device's memory free. `executable` is a step compiled
    elsewhere (see compile.py), `xla_cache` a directory in which XLA keeps what it compiles.

    `data`, a data.Data, has rows without end, each a pure function of its index: step s takes rows
    s*batch ... s*batch + batch - 1 (or what follows in the rows, where another batch began), which
    `readers` threads read ahead.
    """

    task: Any
    data: Any
    run_dir: str = "runs/train"
    initial: str = ""
    steps: int = 1000
    batch: int = 32
    accumulate: int = 1
    readers: int = 2
    ema: float = 0.0
    optimizer: optim.AdamW = dataclasses.field(default_factory=optim.AdamW)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    seed: int = 0
    log_every: int = 20
    save_every: int = 200
    keep: int = 2
    margin: float = 0.1
    executable: str = ""
    xla_cache: str = ""

    def run(self) -> None:
        """Trains to the last step, or says that it has been reached.

        Told to stop (see preemption.py), it saves the step it is at and raises Preempted.
        """
        if self.xla_cache:
            jax.config.update("jax_compilation_cache_dir", self.xla_cache)
        device_mesh = self.mesh.make(axis_type=self.task.axis_type)
        with (
            jax.set_mesh(device_mesh), preemption.Notice() as notice,
            checkpoint.Checkpoints(self.run_dir, self.keep) as saved,
        ):  # fmt: skip
            start = saved.latest() or 0
            if start >= self.steps:
                metrics.say(f"{self.run_dir}: trained ({start} steps)")
                return
            if start:
                about = saved.about(start)
                self._check_same_run(about["config"])
                rows = self._open_data(device_mesh, about["data"])
                state = saved.restore(start, self.abstract_state(device_mesh))
                metrics.say(f"{self.run_dir}: goes on at step {start}")
            else:
                rows = self._open_data(device_mesh)
                state = self.make()(self.seed)
                if self.initial:
                    state |= update.initial_weights(self.task, self.initial, state)
                self._write_config(state)
            self._loop(start, state, rows, device_mesh, saved, notice)

    def make(self):
        """The compiled function from a seed to the state before the first step."""
        return jax.jit(functools.partial(update.init, self.task, self._optimizer(), ema=self.ema))

    def abstract_state(self, device_mesh):
        """Shapes and layouts of the training state, which is not made."""
        return update.abstract_state(self.make(), self.seed, device_mesh)

    def step_fn(self):
        """The update (state, batch, step) -> (state, metrics); it consumes the state."""
        step = functools.partial(
            update.train_step, self.task, self._optimizer(), self.seed, accumulate=self.accumulate,
            ema=self.ema,
        )  # fmt: skip
        return jax.jit(step, donate_argnums=0)

    def arguments(self, device_mesh) -> tuple:
        """Shapes and layouts of what `step_fn` takes, for packed rows of `data.length`."""
        shape, layout = (self.batch, self.data.length), sharding(device_mesh, "BT")
        batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout)
                 for name, dtype in self.task.row.items()}  # fmt: skip
        step = jax.ShapeDtypeStruct((), "int32", sharding=sharding(device_mesh, ""))
        return self.abstract_state(device_mesh), batch, step

    def _optimizer(self) -> optax.GradientTransformation:
        return self.optimizer.make(self.steps, self.task.decays(), self.task.groups())

    def _check_same_run(self, saved: dict) -> None:
        """Raises ValueError if the checkpoint is of another task; tells of what else changed."""
        mine = config.to_json(self)
        if changes := config.differences(saved["task"], mine["task"]):
            raise ValueError(
                f"{self.run_dir} was trained with task {changes[0]}; "
                "take another run_dir, or the task as it was"
            )
        for change in config.differences(saved, mine):
            metrics.say(f"{self.run_dir}: changed since the checkpoint: {change}")

    def _write_config(self, state) -> None:
        if jax.process_index():
            return
        run_dir = pathlib.Path(self.run_dir)
        (run_dir / "config.json").write_text(json.dumps(config.to_json(self), indent=1) + "\n")
        weights = sum(x.size for x in jax.tree.leaves(state["params"]))
        print(f"{self.run_dir}: {weights:,} weights, {self.steps} steps of {self.batch} rows")

    def _open_data(self, device_mesh, state: dict | None = None) -> data.Rows:
        """The rows, of packed ones those positions that this process needs."""
        packed = bool(self.task.row)
        positions = data.positions_here(device_mesh, self.data.length) if packed else None
        return self.data.open(self.batch, state, positions)

    def _loop(self, start, state, rows, device_mesh, saved, notice) -> None:
        step_fn = self._ready(device_mesh)
        name = pathlib.Path(self.run_dir).name
        with metrics.Metrics(self.run_dir, name, start, self.steps) as log:
            batches = data.batches(
                rows, start, self.steps, device_mesh, self.accumulate, self.readers
            )
            waiting = None
            for step, batch in enumerate(log.timed(batches), start):
                state, values = step_fn(state, batch, step)
                done = step + 1
                if waiting:  # the devices have their next step: reading the last one costs nothing
                    _report(log, *waiting)
                stops = notice.reached(done) and done < self.steps
                saves = done % self.save_every == 0 or done == self.steps or stops
                shown = saves or done % self.log_every == 0 or step == start
                waiting = (done, values, rows.figures(done)) if shown else None
                if saves:  # never from a step that was not finite
                    _report(log, *waiting)
                    waiting = None
                    saved.save(done, state, self, rows.state(done))
                if stops:
                    raise preemption.Preempted(f"{self.run_dir} is saved at step {done}")

    def _ready(self, device_mesh):
        """`step_fn`, compiled before if that is asked for."""
        if self.executable:
            payload = pathlib.Path(self.executable).read_bytes()
            arguments = self.arguments(device_mesh)
            in_tree = jax.tree.structure((arguments, {}))
            out_tree = jax.tree.structure(jax.eval_shape(self.step_fn(), *arguments))
            return serialize_executable.deserialize_and_load(payload, in_tree, out_tree)
        if getattr(self.task, "remat", "") == "auto":
            chosen, compiled = fitting(self, device_mesh)
            metrics.say(f"{self.run_dir}: remat {chosen.task.remat}")
            return compiled
        return self.step_fn()


class DoesNotFit(ValueError):
    """A step that the compiler refuses, because the devices' memory can't hold it."""


def fitting(job: Train, device_mesh) -> tuple[Train, Any]:
    """(job, its step compiled ahead of time) with remat settled.

    "auto" takes the first policy, from least to most recomputation, that fits the memory of the
    mesh's devices less the job's margin; the last if none does. Raises DoesNotFit.
    """
    task = job.task
    policies = task.policies if task.remat == "auto" else [task.remat]
    limit = memory_limit(device_mesh.devices.flat[0], job.margin)
    with jax.set_mesh(device_mesh):
        for policy in policies:
            job = dataclasses.replace(job, task=dataclasses.replace(task, remat=policy))
            try:
                compiled = job.step_fn().lower(*job.arguments(device_mesh)).compile()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                if policy == policies[-1]:
                    raise DoesNotFit(" ".join(str(error).split())[:300]) from error
                continue
            if limit is None or memory_needed(compiled) <= limit:
                break
    return job, compiled


def memory_needed(compiled) -> int:
    """Bytes a device needs for a compiled program: arguments, results and all between."""
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return max(memory.peak_memory_in_bytes, kept + memory.temp_size_in_bytes)


def memory_limit(device, margin: float) -> float | None:
    """Bytes of a device's memory less the share `margin`; None for a device nobody knows."""
    known = chips.chip(device)
    return known.memory * 2**30 * (1 - margin) if known else None


def _report(log: metrics.Metrics, step: int, values: dict, about_rows: dict) -> None:
    figures = {key: float(value) for key, value in values.items()}
    log.write(step, figures | about_rows)
    _check_finite(step, figures)


def _check_finite(step: int, figures: dict[str, float]) -> None:
    """Raises FloatingPointError if the update of `step` was made of infinities or NaN."""
    loss, norm = figures["loss"], figures["gradient_norm"]
    if not (np.isfinite(loss) and np.isfinite(norm)):
        raise FloatingPointError(
            f"step {step}: loss is {loss}, gradient norm {norm}; the step was not saved; "
            "lower the rate, or look for the row that causes it"
        )
