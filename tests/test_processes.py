"""Several processes are one run: the same losses, one set of files, checkpoints for any number."""

import dataclasses
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from emu3_jax import launch, mesh, metrics, optim, train
from tests import toy

ROOT = pathlib.Path(__file__).parent.parent
STEPS, SAVE_EVERY = 6, 3
CONFIG = """
from tests import test_processes

def get_config(run_dir, apart=""):
    return test_processes.job(run_dir)
"""
APART = CONFIG.replace("job(run_dir)", "job(run_dir, mesh=test_processes.Apart())")


@dataclasses.dataclass
class Apart(mesh.Mesh):
    """Each process holds rows that lie apart, and half of their positions.

    On TPU that is so where the mesh axes follow the torus and not its hosts.
    """

    data: int = 2
    fsdp: int = 2
    context: int = 2

    def make(self, devices=None, **fields) -> jax.sharding.Mesh:
        """The devices of a process (two) are half the mesh apart."""
        devices = jax.devices() if devices is None else devices
        return super().make([*devices[::2], *devices[1::2]], **fields)


def job(run_dir, **fields) -> train.Train:
    """Six steps of the tiny decoder with dropout over eight devices."""
    default = dict(
        task=toy.model(dropout=0.1),
        data=toy.Counting(),
        run_dir=str(run_dir),
        steps=STEPS,
        batch=8,
        optimizer=optim.AdamW(rate=0.02, warmup=4),
        mesh=mesh.Mesh(data=2, fsdp=2, context=2),
        seed=3,
        log_every=1,
        save_every=SAVE_EVERY,
    )
    return train.Train(**default | fields)
