"""What a chip can do, by the name JAX gives its kind."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak of dense bfloat16 matrix products in FLOP/s, and memory in GiB."""

    flops: float
    memory: float


# TPUs: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e), where a device of v4 and v5p is a whole
# (megacore) chip; GPUs: NVIDIA's data sheets, SXM boards, without sparsity.
CHIPS = {
    "TPU v4": Chip(275e12, 32),
    "TPU v5 lite": Chip(197e12, 16),
    "TPU v5": Chip(459e12, 95),
    "TPU v5p": Chip(459e12, 95),
    "TPU v6 lite": Chip(918e12, 32),
    "NVIDIA A100": Chip(312e12, 80),
    "NVIDIA H100": Chip(989e12, 80),
    "NVIDIA H200": Chip(989e12, 141),
}


def chip(device: jax.Device) -> Chip | None:
    """The chip of a device; None for a kind that is not known, such as a CPU."""
    kind = device.device_kind
    names = [name for name in CHIPS if kind == name or kind.startswith(f"{name} ")]
    return CHIPS[max(names, key=len)] if names else None
