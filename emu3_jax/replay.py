"""Search for silent corruption: a step run twice must give the same bits, on every copy of them."""

import math
import socket

import jax
import numpy as np

from emu3_jax import fingerprint, processes

SHOWN = 4  # arrays, and devices, that a message names


class Corrupted(Exception):
    """A device computes or holds something wrong.

    `devices` are the ids of those that may be at fault, `hosts` the names of their machines.
    """

    def __init__(self, message: str, devices: list[int], hosts: list[str]):
        super().__init__(message)
        self.devices, self.hosts = devices, hosts


class Replay:
    """Checks what `step`, a pure (state, batch, step) -> (state, metrics), makes of its arguments.

    It is compiled once more, to the checksums of the new state alone, and leaves the state as it
    is. What is new is gone as soon as it is summed, so a device needs about the memory of the step
    itself, though that writes over its state (Emu3-8B's stage 1 on 64 v5p: 6.77 and 6.82 GiB).

    What a device does wrong once a sum over devices is done, or its memory to a copy of the
    weights, is told by that device alone. A wrong gradient reaches all devices in the sum: that is
    seen, but no host stands out.

    XLA's programs for TPU and CPU give the same bits each time. Those for GPU do with
    XLA_FLAGS=--xla_gpu_deterministic_ops=true; without it sound devices are accused.
    """

    def __init__(self, step):
        def sums(device_mesh, specs, state, batch, at):
            made, _ = step(state, batch, at)
            return fingerprint.per_device(device_mesh, specs, jax.tree.leaves(made))

        self.sums = jax.jit(sums, static_argnums=(0, 1))

    def check(self, state, batch, step) -> None:
        """Runs the step twice; raises Corrupted, in all processes, if anything differs.

        What is compared are both runs on each device, then the copies of each array on different
        devices. Of three or more copies those against the majority are at fault; of two, either.
        """
        device_mesh, specs = fingerprint.layout(jax.tree.leaves(state))
        first, second = (np.asarray(self.sums(device_mesh, specs, state, batch, step))
                         for _ in range(2))  # fmt: skip
        between, wrong = "two runs", first != second
        if not wrong.any():
            sums = zip(specs, _last_first(first), strict=True)
            between, wrong = "copies", np.stack([_outvoted(device_mesh, *x) for x in sums], -1)
        if wrong.any():
            arrays = zip(fingerprint.names(state), _last_first(wrong), strict=True)
            arrays = [name for name, where in arrays if where.any()]
            devices = list(device_mesh.devices[wrong.any(-1)])
            raise _corrupted(f"step {step}: {_few(arrays)} differ between {between}", devices)


def _outvoted(device_mesh, spec: jax.P, sums: np.ndarray) -> np.ndarray:
    """Which devices have another sum than most that hold the same part of an array of this layout.

    Where no sum has the majority, all that hold this part are meant.
    """
    axes = [device_mesh.axis_names.index(axis) for axis in fingerprint.copies(device_mesh, spec)]
    places = np.moveaxis(np.arange(sums.size).reshape(sums.shape), axes, range(-len(axes), 0))
    places = places.reshape(-1, math.prod(sums.shape[axis] for axis in axes))
    wrong, held = np.zeros(sums.size, bool), sums.reshape(-1)[places]
    differ = (held != held[:, :1]).any(1)
    for copies, values in zip(places[differ], held[differ], strict=True):
        _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
        wrong[copies] = (2 * counts <= len(copies))[which]
    return wrong.reshape(sums.shape)


def _corrupted(what: str, devices: list) -> Corrupted:
    hosts = processes.gathered(socket.gethostname())
    named = [f"device {device.id} (process {device.process_index}, host "
             f"{hosts[device.process_index]})" for device in devices]  # fmt: skip
    if 1 < len(devices) == jax.device_count():
        suspects = "no host stands out, as all devices differ"
    else:
        suspects = f"at fault may be {_few(named)}"
    found = sorted({hosts[device.process_index] for device in devices})
    return Corrupted(f"{what}; {suspects}", [device.id for device in devices], found)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _last_first(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -1, 0)
