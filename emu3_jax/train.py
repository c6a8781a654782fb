"""The one trainer, for the decoder and the tokenizer alike: state in, rows in, checkpoints out."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import optax
from jax.experimental import serialize_executable

from emu3_jax import (
    checkpoint,
    config,
    data,
    divergence,
    exit_codes,
    fit,
    ledger,
    metrics,
    optim,
    packages,
    preemption,
    processes,
    replay,
    update,
    watchdog,
)
from emu3_jax.mesh import Mesh, sharding

COMPILING = 7200  # seconds that the first step may take


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
    elsewhere (see compile.py; JAX unpickles it, so only a file of your own), `xla_cache` a
    directory in which XLA keeps what it compiles.

    Of its checkpoints the newest `keep` stay, and each at a multiple of `keep_every` steps; after
    `save_failures` in a row that could not be written, the run ends. `guard` says which updates are
    left out and when the run goes back (divergence.py). Every `replay_every` steps (0: never) one
    is run twice more, to find devices that compute something else (replay.py). After `watchdog`
    seconds without a step the process ends (watchdog.py), and after `fruitless` attempts without a
    new checkpoint the run gives up.

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
    keep_every: int = 0
    save_failures: int = 3
    guard: divergence.Guard = dataclasses.field(default_factory=divergence.Guard)
    replay_every: int = 0
    watchdog: float = 1800
    fruitless: int = 5
    margin: float = 0.1
    executable: str = ""
    xla_cache: str = ""

    stops_together = True  # SIGTERM is heeded by all processes at one step

    def run(self) -> None:
        """Trains to the last step, or says that it has been reached.

        Told to stop (see preemption.py), it saves the step it is at and raises Preempted. Raises
        exit_codes.GaveUp where another attempt would fare no better.
        """
        if self.xla_cache:
            jax.config.update("jax_compilation_cache_dir", self.xla_cache)
        with ledger.Ledger(self.run_dir) as book:
            device_mesh = self.mesh.make(axis_type=self.task.axis_type)
            with (
                jax.set_mesh(device_mesh), preemption.Notice() as notice,
                checkpoint.Checkpoints(
                    self.run_dir, self.keep, self.keep_every, self.save_failures
                ) as saved,
                watchdog.Watchdog(self.run_dir, self.watchdog, jax.process_index()) as dog,
            ):  # fmt: skip
                _Run(self, device_mesh, book, notice, saved, dog).go_on()

    def make(self):
        """The compiled function from a seed to the state before the first step."""
        return jax.jit(functools.partial(
            update.init, self.task, self._optimizer(), ema=self.ema, guard=self.guard
        ))  # fmt: skip

    def abstract_state(self, device_mesh):
        """Shapes and layouts of the training state, which is not made."""
        return update.abstract_state(self.make(), self.seed, device_mesh)

    def step(self):
        """The update (state, batch, step) -> (state, metrics), a pure function."""
        return functools.partial(
            update.train_step, self.task, self._optimizer(), self.seed,
            accumulate=self.accumulate, ema=self.ema, guard=self.guard,
        )  # fmt: skip

    def step_fn(self):
        """`step` compiled; it consumes the state."""
        return jax.jit(self.step(), donate_argnums=0)

    def arguments(self, device_mesh) -> tuple:
        """Shapes and layouts of what `step_fn` takes, for packed rows of `data.length`."""
        shape, layout = (self.batch, self.data.length), sharding(device_mesh, "BT")
        batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout)
                 for name, dtype in self.task.row.items()}  # fmt: skip
        step = jax.ShapeDtypeStruct((), "int32", sharding=sharding(device_mesh, ""))
        return self.abstract_state(device_mesh), batch, step

    def _optimizer(self) -> optax.GradientTransformation:
        return self.optimizer.make(self.steps, self.task.decays(), self.task.groups())

    def ready(self, device_mesh) -> tuple["Train", Any]:
        """(the job with remat settled, its `step_fn`), compiled before if that is asked for."""
        if self.executable:
            payload = pathlib.Path(self.executable).read_bytes()
            arguments = self.arguments(device_mesh)
            in_tree = jax.tree.structure((arguments, {}))
            out_tree = jax.tree.structure(jax.eval_shape(self.step_fn(), *arguments))
            return self, serialize_executable.deserialize_and_load(payload, in_tree, out_tree)
        if getattr(self.task, "remat", "") == "auto":
            chosen, compiled = fit.fitting(self, device_mesh)
            metrics.say(f"{self.run_dir}: remat {chosen.task.remat}")
            return chosen, compiled
        return self, self.step_fn()


class _Run:
    """An attempt at a run, with all that it needs open."""

    def __init__(self, job: Train, device_mesh, book, notice, saved, dog):
        self.job, self.device_mesh, self.saved = job, device_mesh, saved
        self.book, self.notice, self.dog = book, notice, dog
        self.run_dir = pathlib.Path(job.run_dir)

    def go_on(self) -> None:
        """Trains from where the run stands, also after going back."""
        start, state, rows = self._begin(self.saved.newest())
        if start >= self.job.steps:
            metrics.say(f"{self.run_dir}: trained ({start} steps)")
            return
        settled, step_fn = self.job.ready(self.device_mesh)
        self.replay = replay.Replay(settled.step()) if self.job.replay_every else None
        while (diverged := self._loop(step_fn, start, state, rows)) is not None:
            del state
            start, state, rows = self._go_back(diverged, rows)

    def _begin(self, found: tuple[int, dict] | None) -> tuple[int, Any, data.Rows]:
        """(step, state, rows) of a checkpoint, or of one before if it is damaged, or new ones."""
        job, start = self.job, found[0] if found else 0
        fruitless = int(processes.gathered(str(self.book.begin(start)))[0])
        if job.fruitless and fruitless >= job.fruitless:
            raise exit_codes.GaveUp(
                f"{self.run_dir}: {fruitless} attempts in a row failed without a checkpoint after "
                f"step {start}; see their output, and start again when the cause is mended"
            )
        if start >= job.steps:
            return start, None, None
        self.dog.pet(f"step {start} is where it begins", within=COMPILING)
        back = next((entry for entry in reversed(self._went_back()) if entry["to"] == start), None)
        if found:
            about = found[1]
            self._check_same_run(about["config"])
            rows = self._open_data(back["data"] if back else about["data"])
            state = self.saved.restore(start, job.abstract_state(self.device_mesh))
            if state is None:
                return self._begin(self.saved.newest(before=start))
            metrics.say(f"{self.run_dir}: goes on at step {start}")
        else:
            rows = self._open_data(back and back["data"])
            state = job.make()(job.seed)
            if job.initial:
                state |= update.initial_weights(job.task, job.initial, state)
            self._write_config(state)
        if back:
            state = divergence.fresh(state, back["skipped"])
        return start, state, rows

    def _loop(self, step_fn, start: int, state, rows: data.Rows) -> dict | None:
        """Trains to the last step; the figures of the step at which it diverged, if it does."""
        job, log_every, save_every = self.job, self.job.log_every, self.job.save_every
        batches = data.batches(
            rows, start, job.steps, self.device_mesh, job.accumulate, job.readers
        )
        with (
            metrics.Metrics(job.run_dir, self.run_dir.name, start, job.steps, self.book) as log,
            self.book.span("step"),
        ):
            if self.notice.reached(start):
                raise preemption.Preempted(f"{self.run_dir} is at step {start}, as it was")
            waiting = None
            for step, batch in enumerate(self.book.timed(batches), start):
                done = step + 1
                if self.replay and done % job.replay_every == 0:
                    self.replay.check(state, batch, step)
                state, values = step_fn(state, batch, step)
                self.dog.pet(f"step {done} is on its way")
                if waiting:  # the devices have their next step: reading the last one costs nothing
                    figures = log.write(*waiting)
                    waiting = None
                    if job.guard.exceeded(figures):
                        return figures
                logged = done % log_every == 0 or step == start
                stops = self.notice.reached(done) and done < job.steps
                ends = stops or done == job.steps
                saves = ends or done % save_every == 0 or (logged and self.saved.wanted)
                if saves or logged:
                    waiting = done, values, rows.figures(done)
                if saves:
                    figures = log.write(*waiting)
                    waiting = None
                    if job.guard.exceeded(figures):
                        return figures
                    with self.book.span("save"):
                        self.saved.save(done, state, job, rows.state(done), wait=ends)
                    self.dog.pet(f"step {done} is saved")
                elif logged:
                    self.saved.settle()
                if stops:
                    raise preemption.Preempted(f"{self.run_dir} is saved at step {done}")
        return None

    def _go_back(self, figures: dict, rows: data.Rows) -> tuple[int, Any, data.Rows]:
        """(step, state, rows) of an earlier checkpoint, with the rows after those so far.

        The first time it is the newest; of further times without a new one in between, each goes
        one further back.
        """
        step, guard, past = figures["step"], self.job.guard, self._went_back()
        self.saved.finish()
        found = self.saved.newest()
        times = sum(entry["at"] >= (found[0] if found else 0) for entry in past)
        what = (f"{figures['skipped_recently']:g} of the last {guard.window} updates were left out "
                f"up to step {step}")  # fmt: skip
        if times >= guard.rewinds:
            raise exit_codes.GaveUp(
                f"{self.run_dir} diverged: {what}, and going back {times} times did not help; "
                "lower the rate, or look at the rows of these steps"
            )
        if times and found:
            found = self.saved.newest(before=found[0]) or found
        to = found[0] if found else 0
        self.saved.forget(after=to)
        went = rows.state(step) | dict(step=to, origin=[to, rows.row(step)])
        entry = dict(at=step, to=to, skipped=int(figures["skipped"]), data=went)
        self._write_json("rewinds.json", [*past, entry])
        processes.gathered("")  # all read it
        self.book.rewound(to)
        metrics.say(f"{self.run_dir}: {what}; goes back to step {to}, and on with the rows that "
                    f"would have followed")  # fmt: skip
        return self._begin(found)

    def _went_back(self) -> list[dict]:
        path = self.run_dir / "rewinds.json"
        return json.loads(path.read_text()) if path.exists() else []

    def _check_same_run(self, saved: dict) -> None:
        """Raises ValueError if the checkpoint is of another task; tells of what else changed."""
        mine = config.to_json(self.job)
        if changes := config.differences(saved["task"], mine["task"]):
            raise ValueError(
                f"{self.run_dir} was trained with task {changes[0]}; "
                "take another run_dir, or the task as it was"
            )
        if saved["guard"]["window"] != mine["guard"]["window"]:
            raise ValueError(
                f"{self.run_dir} was trained with guard.window = {saved['guard']['window']}, which "
                "its state has; take that"
            )
        for change in config.differences(saved, mine):
            metrics.say(f"{self.run_dir}: changed since the checkpoint: {change}")

    def _write_config(self, state) -> None:
        self._write_json("config.json", config.to_json(self.job))
        weights = sum(x.size for x in jax.tree.leaves(state["params"]))
        metrics.say(f"{self.run_dir}: {weights:,} weights, {self.job.steps} steps of "
                    f"{self.job.batch} rows")  # fmt: skip

    def _write_json(self, name: str, value) -> None:
        """Writes a file of the run; the first process does."""
        if jax.process_index() == 0:
            text = json.dumps(value, indent=1) + "\n"
            packages.write_whole(self.run_dir / name, text.encode())

    def _open_data(self, state: dict | None = None) -> data.Rows:
        """The rows, of packed ones those positions that this process needs."""
        job, packed = self.job, bool(self.job.task.row)
        positions = data.positions_here(self.device_mesh, job.data.length) if packed else None
        return job.data.open(job.batch, state, positions)
