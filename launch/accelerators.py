"""One table of chips: what each back end calls them, and which slices can be had.

A TPU slice has a topology such as 4x4x8 (chips along each axis of its torus), and four chips are a
host. A GPU node has eight.
"""

import dataclasses
import itertools
import math

TPU_HOST, GPU_HOST = 4, 8  # chips


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A generation of TPUs.

    `label` is GKE's cloud.google.com/gke-tpu-accelerator and `machine` its machine type. On TPU VMs
    a slice is `vm`-N, where N counts `vm_unit` for each chip, and `runtime` is the software version
    ("": not to be had there). JAX has `devices` for each chip. Slices are `small` or, with `most`
    chips at most, AxBxC with A <= B <= C, all multiples of 4; most = 0 means that `small` is all.
    """

    label: str
    machine: str
    vm: str
    vm_unit: int
    runtime: str
    small: tuple[str, ...]
    most: int = 0
    devices: int = 1

    def topologies(self) -> list[str]:
        """All topologies, the smallest first."""
        side = range(4, self.most // 16 + 1, 4)
        cubes = [sizes for sizes in itertools.combinations_with_replacement(side, 3)
                 if math.prod(sizes) <= self.most]  # fmt: skip
        cubes.sort(key=lambda sizes: (math.prod(sizes), sizes[::-1]))
        return [*self.small, *("x".join(map(str, sizes)) for sizes in cubes)]


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A kind of GPU node: GKE's cloud.google.com/gke-accelerator, machine type, and fabric.

    `fabric` is what NCCL speaks between nodes on GKE: see launch/fabrics.py.
    """

    label: str
    machine: str
    fabric: str


CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
PLANE = ("2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus and cloud.google.com/tpu/docs; most:
# the whole pod for v4, for v5p and 7x the largest slice that xpk knows (140 and 144 cubes).
TPUS = {
    "v4": Tpu("tpu-v4-podslice", "ct4p-hightpu-4t", "v4", 2, "tpu-ubuntu2204-base", CUBE, 4096),
    "v5e": Tpu("tpu-v5-lite-podslice", "ct5lp-hightpu-4t", "v5litepod", 1, "v2-alpha-tpuv5-lite",
               PLANE),
    "v5p": Tpu("tpu-v5p-slice", "ct5p-hightpu-4t", "v5p", 2, "v2-alpha-tpuv5", CUBE, 8960),
    "v6e": Tpu("tpu-v6e-slice", "ct6e-standard-4t", "v6e", 1, "v2-alpha-tpuv6e",
               ("2x2", *PLANE)),
    "7x": Tpu("tpu7x", "tpu7x-standard-4t", "tpu7x", 2, "", CUBE, 9216, devices=2),
}  # fmt: skip
# cloud.google.com/compute/docs/gpus and AI-Hypercomputer/gpu-recipes
GPUS = {
    "h100": Gpu("nvidia-h100-80gb", "a3-highgpu-8g", "tcp"),
    "h100-mega": Gpu("nvidia-h100-mega-80gb", "a3-megagpu-8g", "tcpxo"),
    "h200": Gpu("nvidia-h200-141gb", "a3-ultragpu-8g", "gib"),
}
NAMES = (*TPUS, *GPUS, "cpu")


def chips(topology: str) -> int:
    """How many chips a topology such as 4x4x8 has."""
    return math.prod(int(size) for size in topology.split("x"))


def check(name: str, topology: str, slices: int) -> None:
    """Raises ValueError where there is no such chip, topology or number of slices of it."""
    if name not in NAMES:
        raise ValueError(f"accelerator {name!r} is not known; take one of {', '.join(NAMES)}")
    if name not in TPUS:
        if topology or slices != 1:
            raise ValueError(
                f"topology {topology!r} and slices = {slices} are of TPUs; {name} has nodes: "
                "set topology='' and slices=1"
            )
        return
    tpu = TPUS[name]
    if topology not in tpu.topologies():
        rule = f" and AxBxC with A <= B <= C, multiples of 4, up to {tpu.most} chips"
        raise ValueError(
            f"{name} has no topology {topology!r}; it has {', '.join(tpu.small)}"
            f"{rule if tpu.most else ''}"
        )
    if slices < 1:
        raise ValueError(f"slices = {slices}; take 1 or more")
    if slices > 1 and chips(topology) <= TPU_HOST:
        raise ValueError(
            f"slices = {slices} of {name} {topology}, which is one host: several slices work "
            f"together only from two hosts each; take {_next(tpu)} or slices=1"
        )


def _next(tpu: Tpu) -> str:
    return next(t for t in tpu.topologies() if chips(t) > TPU_HOST)
