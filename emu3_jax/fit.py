"""What a training step needs of a device's memory, and how much of it to compute again."""

import dataclasses
from typing import Any

import jax

from emu3_jax import chips


class DoesNotFit(ValueError):
    """A step that the compiler refuses, because the devices' memory can't hold it."""


def fitting(job, device_mesh) -> tuple[Any, Any]:
    """(a train.Train, its step compiled ahead of time) with remat settled.

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
