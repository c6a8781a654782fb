"""Checkpoints: the training state at a step, written by Orbax in the background and then read back.

RUN/checkpoints/STEP/ holds the arrays and, as JSON, the resolved configuration, the data state,
the package versions and the arrays' fingerprints. It counts once it has been read back (see
integrity.py). What turns out to be damaged goes to RUN/broken/. Everything the project knows of
Orbax is in this file.
"""

import concurrent.futures
import contextlib
import importlib.metadata
import logging
import pathlib
import shutil
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from emu3_jax import config as config_lib
from emu3_jax import fingerprint, integrity, metrics, processes

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells of every save; we of failures

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore")
COMMIT = 600  # seconds, for all processes to have written their share
IN_FLIGHT = 8  # GB that Orbax reads or writes at once
RETRY = 1  # seconds, before a save that is waited for is looked at or tried again
_DELETED = ".deleted-"
_PENDING = "pending"


class Checkpoints:
    """The checkpoints of one run; a context manager, so that the last save is waited for.

    The newest `keep` stay, and each whose step is a multiple of `keep_every`. A save that fails is
    told of and `wanted` again; the `failures`th in a row raises OSError. All processes call the
    same methods in the same order.
    """

    def __init__(self, run_dir: str, keep: int = 2, keep_every: int = 0, failures: int = 3):
        if "://" in run_dir:
            raise ValueError(
                f"run_dir {run_dir} is a URL; mount the bucket (gcsfuse, say) and take its path"
            )
        self.directory = pathlib.Path(run_dir).absolute() / "checkpoints"
        self.wanted = False  # whether a failed save is to be made up for
        self._keep, self._keep_every, self._failures = keep, keep_every, failures
        self._failed = 0  # saves in a row
        self._opened = 0  # times
        self._damaged: dict[int, str] = {}
        self._pending: tuple[int, concurrent.futures.Future] | None = None
        self._place = jax.process_index(), jax.process_count()

    def __enter__(self):
        message = ""
        if not self._place[0]:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._sweep()
            except OSError as error:
                message = f"{self.directory} can't be written to ({error.strerror})"
        if told := [text for text in processes.gathered(message) if text]:
            raise ValueError(told[0])
        self._open()
        return self

    def __exit__(self, kind, *_):
        if kind and self._place[1] > 1:
            return  # the others may never come to where the last save is waited for
        with contextlib.suppress(*[OSError] if kind else []):
            self.finish()
        self._orbax.close()
        self._thread.shutdown()

    def save(self, step: int, state, config, rows_state: dict, wait: bool = False) -> None:
        """Starts writing; returns once the arrays are copied off the devices.

        With `wait` it returns once the checkpoint counts, trying again until too many failed.
        """
        self.finish()
        about = dict(
            step=step,
            config=config_lib.to_json(config),
            data=rows_state,
            packages={name: importlib.metadata.version(name) for name in PACKAGES},
            fingerprints=fingerprint.of(state),
            types=_types(state),
        )
        self._start(step, state, about)
        while wait and (self._pending or self.wanted):
            if self.wanted:
                time.sleep(RETRY)
                self._start(step, state, about)
            self.finish()

    def settle(self, wait: bool = False) -> None:
        """Looks whether the last save has come to its end; all processes together.

        Raises OSError if it failed and too many did.
        """
        if not self._pending:
            return
        step, ended = self._pending
        if wait:  # for a while: another process may be told of a failure, and this one never
            concurrent.futures.wait([ended], RETRY)
        reason = _PENDING
        if ended.done():
            reason = _reason(ended.exception()) if ended.exception() else ""
        told = processes.gathered(reason)
        if not any(told):  # all shares are read; one process puts them together
            path = self.directory / str(step)
            told = processes.gathered("" if self._place[0] else integrity.damage(path))
        reasons = [reason for reason in told if reason not in ("", _PENDING)]
        if _PENDING in told and not reasons:
            return
        self._pending = None
        if reasons:
            self._fail(step, reasons[0])
        else:
            self._failed = 0
            self._remove_old()

    def newest(self, before: int | None = None) -> tuple[int, dict] | None:
        """(step, what is saved of it beside the arrays) of the newest checkpoint that is whole.

        Those `before` a step, if given. Damaged ones are told of and left out. Raises ValueError if
        there are only such.
        """
        while (step := self._step_before(before)) is not None:
            path = self.directory / str(step)
            if reason := self._damage(path):
                self._leave_out(step, reason)
                before = step
                continue
            return step, integrity.read_about(path)
        if self._damaged:
            raise ValueError(
                f"{self.directory}: no checkpoint can be used: "
                + "; ".join(self._damaged.values())
                + "; move them away to start anew"
            )
        return None

    def restore(self, step: int, abstract_state):
        """The state saved at `step`, laid out like `abstract_state` (on any mesh).

        None, and told of, if it is not what was saved. Otherwise newer ones, which were left out,
        go to RUN/broken.
        """
        path = self.directory / str(step)
        restored = self._orbax.restore(
            path, ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        )["state"]
        about, types = integrity.read_about(path), _types(restored)
        for name, found in fingerprint.of(restored).items():
            # the optimizer's moments, say, may be kept as another type now
            if about["types"][name] == types[name] and about["fingerprints"][name] != found:
                self._leave_out(step, f"{path}: {name} was restored otherwise than it was saved")
                return None
        self._set_aside()
        return restored

    def forget(self, after: int) -> None:
        """Removes the checkpoints after a step: training goes on from there in another way."""
        self.finish()
        if not self._place[0]:
            for step in _steps(self.directory):
                if step > after:
                    self._remove(step)
        processes.gathered("")  # nobody looks for the newest before

    def finish(self) -> None:
        """Waits until the last save has come to its end."""
        while self._pending:
            self.settle(wait=True)

    def _open(self) -> None:
        """Starts what saves; again after a failure, as the last one may wait for what never comes.

        The saves of each have barriers of their own name.
        """
        self._opened += 1
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "verify")
        limits = dict(save_concurrent_gb=IN_FLIGHT, restore_concurrent_gb=IN_FLIGHT)
        options = ocp.options
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                state=ocp.StandardCheckpointHandler(**limits), about=ocp.JsonCheckpointHandler()
            ),
            async_options=options.AsyncOptions(timeout_secs=COMMIT),
            multiprocessing_options=options.MultiprocessingOptions(
                barrier_sync_key_prefix=f"saves_{self._opened}"
            ),
        )

    def _start(self, step: int, state, about: dict) -> None:
        self.wanted = False
        path = self.directory / str(step)
        try:
            self._orbax.save(path, ocp.args.Composite(
                state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
            ))  # fmt: skip
        except jax.errors.JaxRuntimeError:
            raise  # another process is gone
        except Exception as error:  # whatever Orbax and TensorStore make of a full disk
            ended = concurrent.futures.Future()
            ended.set_exception(error)
        else:
            ended = self._thread.submit(self._read_back, self._orbax, path)
        self._pending = step, ended

    def _read_back(self, orbax: ocp.AsyncCheckpointer, path: pathlib.Path) -> None:
        orbax.wait_until_finished()
        integrity.verify(path, *self._place)

    def _fail(self, step: int, reason: str) -> None:
        self._failed += 1
        self.wanted = True
        metrics.say(f"warning: the save at step {step} failed ({self._failed} of {self._failures} "
             f"in a row): {reason}")  # fmt: skip
        if not self._place[0]:
            shutil.rmtree(self.directory / str(step), ignore_errors=True)
            with contextlib.suppress(OSError):
                self._sweep()
        self._thread.shutdown(wait=False)
        self._open()
        processes.gathered("")  # nobody saves again before that is gone
        if self._failed >= self._failures:
            raise OSError(f"{self.directory}: {self._failed} saves in a row failed: {reason}")

    def _sweep(self) -> None:
        """Removes what a save or a removal that did not come to its end has left."""
        for path in self.directory.iterdir():
            if path.name.startswith(_DELETED) or ".orbax-checkpoint-tmp" in path.name:
                shutil.rmtree(path)

    def _damage(self, path: pathlib.Path) -> str:
        """What is wrong with a checkpoint, the same in all processes."""
        reason = ""
        if not all(processes.gathered("read" if integrity.verified(path) else "")):
            try:  # an attempt ended right after the save
                integrity.verify(path, *self._place)
            except (ValueError, OSError) as error:
                reason = _reason(error)
            reason = next(filter(None, processes.gathered(reason)), "")
        reasons = processes.gathered(reason or integrity.damage(path, self._place))
        return next(filter(None, reasons), "")

    def _leave_out(self, step: int, reason: str) -> None:
        self._damaged[step] = reason
        metrics.say(f"warning: checkpoint {step} is damaged and left out: {reason}")

    def _set_aside(self) -> None:
        broken = self.directory.parent / "broken"
        if self._damaged and not self._place[0]:
            broken.mkdir(exist_ok=True)
            for step in self._damaged:
                shutil.rmtree(broken / str(step), ignore_errors=True)
                (self.directory / str(step)).rename(broken / str(step))
                metrics.say(f"checkpoint {step} is now in {broken}")
        self._damaged = {}

    def _step_before(self, before: int | None) -> int | None:
        """The newest step on disk, as the first process sees it."""
        mine = [s for s in _steps(self.directory) if before is None or s < before]
        told = processes.gathered(str(max(mine)) if mine else "")[0]
        return int(told) if told else None

    def _remove_old(self) -> None:
        if self._place[0]:
            return
        for step in _steps(self.directory)[: -self._keep]:
            if not (self._keep_every and step % self._keep_every == 0):
                self._remove(step)

    def _remove(self, step: int) -> None:
        gone = self.directory / f"{_DELETED}{step}"
        (self.directory / str(step)).rename(gone)  # it counts no longer, whatever comes now
        shutil.rmtree(gone, ignore_errors=True)


def restore_model(run_dir: str, step: int | None = None) -> tuple:
    """(task, params, variables, step) of a run's newest checkpoint (or of `step`), as NumPy arrays.

    The optimizer's arrays are not read; of a run with a moving average of the weights, that is
    what params are. A damaged checkpoint is told of, and the one before is taken. Raises ValueError
    if there is none, or `step` is damaged.
    """
    directory = pathlib.Path(run_dir).absolute() / "checkpoints"
    if not directory.is_dir():
        raise ValueError(f"{run_dir}: no checkpoints/ there; train the model first")
    steps = _steps(directory)
    if step is not None:
        steps = [step] if step in steps else []
    for found in reversed(steps):
        path = directory / str(found)
        try:
            if integrity.verified(path) and (reason := integrity.damage(path)):
                raise ValueError(reason)
            about, params, variables = _read_model(path)
        except (ValueError, OSError) as error:
            if found == steps[0]:
                raise ValueError(f"checkpoint {found} is damaged: {error}") from None
            metrics.say(f"warning: checkpoint {found} is damaged and left out: {error}")
        else:
            return config_lib.from_json(about["config"]).task, params, variables, found
    raise ValueError(f"{run_dir}: no complete checkpoint (asked for step {step})")


def _read_model(path: pathlib.Path) -> tuple:
    about = integrity.read_about(path)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(path / "state").item_metadata.tree
        weights = "ema" if "ema" in tree else "params"
        wanted = {part: tree[part] for part in (weights, "variables") if part in tree}
        wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        read = reader.restore(
            path / "state", args=ocp.args.PyTreeRestore(
                item=wanted, restore_args=wanted, transforms={})
        )  # fmt: skip
    for name, array in zip(fingerprint.names(read), jax.tree.leaves(read), strict=True):
        if fingerprint.partial(array) != about["fingerprints"].get(name):
            raise ValueError(f"{path}: {name} reads otherwise than it was saved")
    return about, read[weights], read.get("variables", {})


def _steps(directory: pathlib.Path) -> list[int]:
    """The steps of what Orbax has committed, by renaming it."""
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def _types(state) -> dict[str, str]:
    arrays = zip(fingerprint.names(state), jax.tree.leaves(state), strict=True)
    return {name: str(array.dtype) for name, array in arrays}


def _reason(error: BaseException) -> str:
    """An exception in one line, of which another process can be told."""
    kind = [] if isinstance(error, ValueError | OSError) else [f"{type(error).__name__}:"]
    return " ".join([*kind, *str(error).split()])
