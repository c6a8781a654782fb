"""Checksums of arrays, the same whatever the mesh: of state on devices, of its pieces on disk.

A checksum is the sum, modulo 2**32, of a hash of each element: its bits and its place in the whole
array. So it can be added up from pieces in any order; it changes whenever a single element does,
and misses any other damage, elements that changed places included, once in 2**32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

FIRST, SECOND = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)  # MurmurHash3's finalizer
PER_DIM = 0x9E3779B9  # tells the same index in two dimensions apart; 2**32 / golden ratio
BLOCK = 2**15  # elements that NumPy takes at a time: they stay in a core's cache


def of(tree) -> dict[str, int]:
    """The checksum of each array by its name, as in "params.layers.mlp.up".

    Computed where the arrays lie: only sums travel. Of what is replicated the first copy counts.
    Arrays in the host's memory pass through the devices one at a time.
    """
    arrays = jax.tree.leaves(tree)
    device_mesh, specs = layout(arrays)
    sums = [_local(device_mesh, spec, x) for spec, x in zip(specs, arrays, strict=True)]
    return dict(zip(names(tree), map(int, np.asarray(_added(sums))), strict=True))


def partial(piece: np.ndarray, start: tuple[int, ...] | None = None) -> int:
    """What a piece of an array, which begins there at `start`, adds to the array's checksum.

    The sum over the pieces, modulo 2**32, is the checksum. Takes 4 bytes of memory for each row,
    and a second of a core for 1 GB (of bytes: 0.4 GB). Raises ValueError for 64-bit elements.
    """
    words = piece.view(_unsigned(piece.dtype)).reshape(-1, *piece.shape[-1:] or (1,))
    starts = (*(start or (0,) * piece.ndim), 0)
    *outer, columns = [_place(np.arange(size, dtype=np.uint32), starts[dim], dim)
                       for dim, size in enumerate(piece.shape or (1,))]  # fmt: skip
    rows = functools.reduce(np.add.outer, outer, np.zeros((), np.uint32)).reshape(-1)
    total, many = 0, max(1, BLOCK // max(1, len(columns)))
    for row in range(0, len(words), many):
        for column in range(0, len(columns), BLOCK):
            here = slice(row, row + many), slice(column, column + BLOCK)
            block = words[here].astype(np.uint32)
            block ^= rows[here[0], None] + columns[here[1]]
            total += int(_mixed(block).sum(dtype=np.uint32))
    return total % 2**32


def names(tree) -> list[str]:
    """What the leaves of a tree are called: their path, with dots."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def layout(arrays: list) -> tuple[jax.sharding.Mesh, tuple[jax.P, ...]]:
    """(mesh, specs) of arrays that lie on one mesh, or all on one device."""
    found = [getattr(x, "sharding", None) for x in arrays]
    named = [each for each in found if isinstance(each, NamedSharding)]
    if not named:
        return jax.sharding.Mesh(np.array(jax.devices()[:1]), ("one",)), (jax.P(),) * len(arrays)
    return named[0].mesh, tuple(
        each.spec if isinstance(each, NamedSharding) else jax.P() for each in found
    )


def per_device(device_mesh, specs, arrays: list) -> jax.Array:
    """What each device holds of each array: uint32 [*mesh sizes, arrays], known to all of them.

    To be called under jit, also on values whose layout the compiler chooses; they are then laid out
    as `specs`. Devices that hold the same part of an array have the same value for it.
    """

    def local(arrays):
        sums = jnp.stack([_sum(x, spec) for x, spec in zip(arrays, specs, strict=True)])
        return jax.lax.all_gather(sums, device_mesh.axis_names)

    sums = jax.shard_map(
        local, mesh=device_mesh, in_specs=(list(specs),), out_specs=jax.P(), check_vma=False
    )([_on_device(x) for x in arrays])
    return sums.reshape(*device_mesh.devices.shape, -1)


def copies(device_mesh, spec: jax.P) -> tuple[str, ...]:
    """The axes of the mesh along which an array of this layout is repeated."""
    cut = {axis for axes in spec for axis in _tuple(axes)}
    return tuple(axis for axis in device_mesh.axis_names if axis not in cut)


# A program for each shape and layout, of which there are few: moments have those of weights.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _local(device_mesh, spec: jax.P, x) -> jax.Array:
    """What each device's piece adds to the checksum of an array: uint32 [*mesh sizes]."""

    def local(x):
        first = [jax.lax.axis_index(axis) == 0 for axis in copies(device_mesh, spec)]
        found = jnp.where(jnp.all(jnp.array(first, bool)), _sum(x, spec), 0)
        return found.reshape((1,) * len(device_mesh.axis_names))

    return jax.shard_map(
        local, mesh=device_mesh, in_specs=spec, out_specs=jax.P(*device_mesh.axis_names),
        check_vma=False,
    )(_on_device(x))  # fmt: skip


@jax.jit
def _added(sums: list) -> jax.Array:
    return jnp.stack([x.sum(dtype=jnp.uint32) for x in sums])


def _sum(x: jax.Array, spec: jax.P) -> jax.Array:
    """What a device's piece adds to the checksum of an array with this layout."""
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, _unsigned(x.dtype)).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for dim, size in enumerate(x.shape):
        axes = _tuple(spec[dim]) if dim < len(spec) else ()
        start = jax.lax.axis_index(axes).astype(jnp.uint32) * jnp.uint32(size) if axes else 0
        along = _place(jnp.arange(size, dtype=jnp.uint32), start, dim)
        place = place + along.reshape(-1, *(1,) * (x.ndim - 1 - dim))
    if not x.ndim:
        place = _place(jnp.zeros((), jnp.uint32), 0, 0)
    return _mixed(words ^ place).sum(dtype=jnp.uint32)


def _place(index, start, dim: int):
    """A hash of the indices start + `index` along a dimension."""
    if isinstance(start, int):
        start = np.uint32(start % 2**32)
    return _mixed(index + start + np.uint32(PER_DIM * (dim + 1) % 2**32))


def _mixed(x):
    """Each 32-bit word made into another, one to one, such that any bit changes about half of them.

    Of a NumPy array in place. Source: the finalizer of MurmurHash3.
    """
    x ^= x >> 16
    x *= FIRST
    x ^= x >> 13
    x *= SECOND
    x ^= x >> 16
    return x


def _unsigned(dtype) -> np.dtype:
    if np.dtype(dtype).itemsize > 4:
        raise ValueError(f"{dtype}: a checksum is of elements of 8, 16 or 32 bits")
    return np.dtype(f"uint{8 * np.dtype(dtype).itemsize}")


def _tuple(axes) -> tuple[str, ...]:
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)


def _on_device(x):
    return jax.device_put(x, jax.memory.Space.Device)
