"""Checkpoints: the training state at a step, written by Orbax in the background.

RUN/checkpoints/STEP/ holds the arrays and, as JSON, the resolved configuration, the data state
and the package versions. Everything the project knows of Orbax is in this file.
"""

import importlib.metadata
import logging
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from emu3_jax import config as config_lib

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every save

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore")


class Checkpoints:
    """The checkpoints of one run; a context manager, so that the last save is waited for."""

    def __init__(self, run_dir: str, keep: int = 2):
        directory = pathlib.Path(run_dir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(directory, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()

    def latest(self) -> int | None:
        """The newest complete step."""
        return self._manager.latest_step()

    def save(self, step: int, state, config, rows_state: dict) -> None:
        """Starts writing; returns once the arrays are copied off the devices."""
        about = dict(
            step=step,
            config=config_lib.to_json(config),
            data=rows_state,
            packages={name: importlib.metadata.version(name) for name in PACKAGES},
        )
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
            ),
        )

    def about(self, step: int) -> dict:
        """What is saved at `step` beside the arrays: config, data (its state) and packages."""
        saved = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
        return saved["about"]

    def restore(self, step: int, abstract_state):
        """The state saved at `step`, laid out like `abstract_state` (on any mesh)."""
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        )
        return restored["state"]


def restore_model(run_dir: str, step: int | None = None) -> tuple:
    """(task, params, variables, step) of a run's newest checkpoint (or of `step`), as NumPy arrays.

    The optimizer's arrays are not read; of a run with a moving average of the weights, that is
    what params are. Raises ValueError if there is no checkpoint.
    """
    directory = pathlib.Path(run_dir).absolute() / "checkpoints"
    if not directory.is_dir():
        raise ValueError(f"{run_dir}: no checkpoints/ there; train the model first")
    with ocp.CheckpointManager(directory) as manager:
        step = manager.latest_step() if step is None else step
        if step not in manager.all_steps():
            raise ValueError(f"{run_dir}: no complete checkpoint (asked for step {step})")
        about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
    path = directory / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(path).item_metadata.tree
        weights = "ema" if "ema" in tree else "params"
        wanted = {part: tree[part] for part in (weights, "variables") if part in tree}
        wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        read = reader.restore(
            path, args=ocp.args.PyTreeRestore(
                item=wanted, restore_args=wanted, transforms={})
        )
    config = config_lib.from_json(about["about"]["config"])
    return config.task, read[weights], read.get("variables", {}), step
