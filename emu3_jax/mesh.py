"""Where arrays live: one letter per logical dimension, one table of the mesh axes that shard it.

B batch  T query position  S key position  D width  N heads  K kv heads  H head dim  F ffn
V vocab  L layers

The same letters suffix variables (`x_BTD`), write einsums ("BTD,DNH->BTNH") and declare weights
(`Param("LDNH", ...)`). In "LDNH" the D takes `fsdp`; in "BTD" B has already taken it, so D is
replicated: ZeRO-3 is what "each mesh axis once, left to right" comes to.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

AXES = ("data", "fsdp", "context", "tensor")
RULES = {  # a letter not listed is replicated
    "B": ("data", "fsdp"),
    "T": ("context",),
    "D": ("fsdp",),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
}


@dataclasses.dataclass
class Mesh:
    """Sizes of the mesh axes in devices; -1 (at most once) takes the devices that are left."""

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1

    def make(self, devices=None, axis_type: AxisType = AxisType.Explicit) -> jax.sharding.Mesh:
        """The device mesh. Explicit axes let JAX check every layout at trace time.

        Raises ValueError if the sizes do not multiply to the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        sizes = [getattr(self, axis) for axis in AXES]
        asked = "*".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(f"mesh {asked}: sizes are 1 or more, and one of them may be -1")
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and len(devices) % known == 0:
            sizes[sizes.index(-1)] = len(devices) // known
        if -1 in sizes or math.prod(sizes) != len(devices):
            raise ValueError(
                f"mesh {asked} does not fit {len(devices)} devices; "
                f"the product must be {len(devices)} (-1 takes what is left)"
            )
        return jax.make_mesh(tuple(sizes), AXES, (axis_type,) * len(AXES), devices=devices)


def spec(dims: str) -> jax.P:
    """The layout of an array with these dimensions; "." stands for a replicated one."""
    return jax.P(*(axes or None for axes in _axes(dims)))


def shards(dims: str) -> list[int]:
    """Into how many pieces each of these dimensions is cut on the current mesh."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return [math.prod(sizes[axis] for axis in axes) for axes in _axes(dims)]


def _axes(dims: str) -> list[tuple[str, ...]]:
    used, layout = set(), []
    for dim in dims:
        layout.append(tuple(axis for axis in RULES.get(dim, ()) if axis not in used))
        used.update(layout[-1])
    return layout


def sharding(mesh: jax.sharding.Mesh, dims: str) -> NamedSharding:
    """`spec(dims)` on a mesh, for arrays that are made outside of jit."""
    return NamedSharding(mesh, spec(dims))


def einsum(equation: str, *xs: jax.Array, **kwargs) -> jax.Array:
    """jnp.einsum whose result is laid out by the letters of its output."""
    return jnp.einsum(equation, *xs, out_sharding=spec(equation.split("->")[1]), **kwargs)


def place(x: jax.Array, dims: str) -> jax.Array:
    """Lays `x` out as `dims`: renaming T (sharded) to S (not) is an all-gather over `context`."""
    return jax.sharding.reshard(x, spec(dims))
