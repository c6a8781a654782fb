"""Ahead-of-time compilation: what a training run needs on machines that are not here."""

import dataclasses
import json
import os
import pathlib
import re
import time

import jax
from jax.experimental import serialize_executable, topologies

from emu3_jax import config, hlo
from emu3_jax.fit import DoesNotFit, fitting, memory_limit, memory_needed
from emu3_jax.train import Train

GIB = 2**30


@dataclasses.dataclass
class Compile:
    """Job: compiles the step of a training run for a topology and tells what it needs.

    `train` is the run's config file and `set` fields of it to change, as in "batch=64
    mesh.tensor=4". `topology` is CHIP:SIZES of a TPU slice (v5e:16x16, v5p:4x4x4, v6e:16x16, with
    "2*" in front for two slices; the package libtpu compiles for it, no TPU is needed) or "" for
    the devices of this machine. With `save` the executable is written there, for
    Train.executable. If the step does not fit and `advise` is set, smaller batches, more remat and
    other meshes are tried until one fits.
    """

    train: str = "configs/emu3_8b_stage1.py"
    topology: str = "v5p:4x4x4"
    set: str = ""
    save: str = ""
    advise: bool = True

    def run(self) -> None:
        """Prints a table and, last, one line of JSON."""
        devices = described(self.topology) if self.topology else jax.devices()
        job = self.job()
        report = self.report(job, devices)
        if report["fits"] is False and self.advise:
            report["advice"] = self.advice(job, devices)
        print(json.dumps(report))

    def job(self) -> Train:
        """The run that is compiled; ValueError if the config file is of another job."""
        fields = [f"--config.{field}" for field in self.set.split()]
        job = config.load([f"--config={self.train}", *fields])
        if not isinstance(job, Train):
            raise ValueError(f"{self.train} is a job {type(job).__name__}; Compile wants a Train")
        return job

    def report(self, job: Train, devices) -> dict:
        """Compiles and prints; the figures are in GiB a device, TFLOPs and GiB a step.

        `memory_gib` is the device's memory less the margin, `fits` None where nobody knows it.
        """
        device_mesh = job.mesh.make(devices, job.task.axis_type)
        name = self.topology or f"{len(devices)} x {devices[0].device_kind}"
        start = time.time()
        try:
            job, compiled = fitting(job, device_mesh)
        except DoesNotFit as error:
            print(f"does not fit: {error}")
            return dict(topology=name, batch=job.batch, remat=job.task.remat, fits=False,
                        error=str(error))  # fmt: skip
        seconds = time.time() - start
        program = hlo.read(compiled.as_text())
        memory, task = compiled.memory_analysis(), job.task
        matmuls = task.flops(job.batch * job.data.length, 0)
        executed = program.matmul_flops * len(devices)
        figures = dict(
            topology=name,
            devices=len(devices),
            mesh=dataclasses.asdict(job.mesh),
            batch=job.batch,
            length=job.data.length,
            remat=task.remat,
            peak_hbm_gib=round(memory.peak_memory_in_bytes / GIB, 2),
            argument_gib=round(memory.argument_size_in_bytes / GIB, 2),
            temp_gib=round(memory.temp_size_in_bytes / GIB, 2),
            model_tflops_per_step=_tera(task.dense(job.batch, job.data.length)),
            model_matmul_tflops_per_step=_tera(matmuls),
            executed_matmul_tflops_per_step=_tera(executed),
            executed_over_model_matmul=round(executed / matmuls, 3),
            kernels=dict(program.kernels),
            collective_gib_per_step={kind: round(size / GIB, 3)
                                     for kind, size in program.collective_bytes.items()},
            largest_all_reduce_mib=round(
                max((size for _, size, _ in program.all_reduces), default=0) / 2**20, 2),
            compile_seconds=round(seconds, 1),
        )  # fmt: skip
        limit = memory_limit(devices[0], job.margin)
        if limit:
            figures["memory_gib"] = round(limit / GIB, 1)
        need = memory_needed(compiled)
        figures["fits"] = need <= limit if limit else None
        _print(figures)
        if figures["fits"] is False:
            print(f"does not fit: {(need - limit) / GIB:.2f} GiB too much "
                  f"with a margin of {job.margin:.0%}")  # fmt: skip
        if self.save:
            payload, _, _ = serialize_executable.serialize(compiled)
            pathlib.Path(self.save).write_bytes(payload)
            print(f"{self.save}: {len(payload) / 2**20:.0f} MiB, for --config.executable")
        return figures

    def advice(self, job: Train, devices) -> str:
        """The first change that makes the run fit, tried by compiling; or that none did."""
        for changes in alternatives(job, len(devices)):
            print(f"trying {changes}", flush=True)
            other = dataclasses.replace(self, set=f"{self.set} {changes}", save="", advise=False)
            try:
                if other.report(other.job(), devices)["fits"]:
                    print(f'it fits with --config.set="{changes}"')
                    return changes
            except ValueError as error:
                print(f"{changes}: {error}")
        print("none of these fits; take more chips")
        return "more chips"


def alternatives(job: Train, devices: int) -> list[str]:
    """Changes that need less memory, the cheapest first."""
    changes = [] if job.task.remat == "full" else ["task.remat=full"]
    rows = job.batch
    while rows % 2 == 0 and len(changes) < 4:
        rows //= 2
        changes.append(f"task.remat=full batch={rows}")
    for axis in ("context", "tensor"):
        size = 2 * getattr(job.mesh, axis)
        if devices % size == 0:
            changes.append(f"task.remat=full mesh.{axis}={size}")
    return changes


def described(topology: str):
    """The devices of a TPU topology by name, such as "v5p:4x4x4" or "2*v5e:16x16".

    Raises ValueError if the name is not understood or libtpu is not installed.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?(v\w+):(\d+(?:x\d+){1,2})", topology)
    if not found or found[2] not in ("v4", "v5e", "v5p", "v6e"):
        raise ValueError(
            f"topology {topology!r} is not CHIP:SIZES as in v5e:16x16, v5p:4x4x4, v6e:16x16 or "
            "2*v5p:4x4x4 (slices)"
        )
    slices, name, sizes = int(found[1] or 1), found[2], found[3]
    dims = [int(size) for size in sizes.split("x")]
    options = dict(num_slices=slices)
    if name in ("v4", "v5p"):  # a device is a chip of two cores; whole cubes are closed to a torus
        options |= dict(chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1),
                        wrap=tuple(size % 4 == 0 for size in dims))  # fmt: skip
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu asks the cloud who it is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{dict(v5p='v5').get(name, name)}:{sizes}", **options
        )
    except Exception as error:
        raise ValueError(
            f"topology {topology}: {str(error).splitlines()[0]}; compiling for TPUs needs the "
            "package libtpu in the version of jax[tpu]"
        ) from error
    return description.devices


def _tera(flops: float) -> float:
    return round(float(flops) / 1e12, 2)


def _print(figures: dict) -> None:
    for key, value in figures.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {x:,}" for name, x in value.items())
        print(f"  {key:34} {value}")
