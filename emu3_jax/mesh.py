"""Where arrays live: one letter per logical dimension, one table of the mesh axes that shard it.

B batch  T query position  S key position  D width  N heads  K kv heads  H head dim  F ffn
V vocab  L layers

The same letters suffix variables (`x_BTD`), write einsums ("BTD,DNH->BTNH") and declare weights
(`Param("LDNH", ...)`). In "LDNH" the D takes `fsdp` and `context`; in "BTD" B and T have already
taken them, so D is replicated: ZeRO-3 is what "each mesh axis once, left to right" comes to.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding

AXES = ("data", "fsdp", "fsdp_minor", "context", "tensor")  # the two fsdp act as one
RULES = {  # a letter not listed is replicated
    "B": ("data", "fsdp", "fsdp_minor"),
    "T": ("context",),
    "D": ("fsdp", "fsdp_minor", "context"),
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
        names = [field.name for field in dataclasses.fields(self)]
        sizes = list(dataclasses.astuple(self))
        asked = "*".join(f"{axis}={size}" for axis, size in zip(names, sizes, strict=True))
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
        array = _arranged(sizes, devices)
        minor = _minor(array[0, :, 0, 0])
        array = array.reshape(sizes[0], -1, minor, *sizes[2:])
        return jax.sharding.Mesh(array, AXES, axis_types=(axis_type,) * len(AXES))


def _arranged(sizes: list[int], devices) -> np.ndarray:
    """The devices as an array of these sizes: neighbours in a torus, slices apart along data."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    data, *inside = sizes
    if data % slices:
        raise ValueError(
            f"data = {data} does not split over {slices} slices; take a multiple, so that only "
            "data parallelism crosses the slow network between them"
        )
    return mesh_utils.create_hybrid_device_mesh(
        [data // slices, *inside], [slices, *(1 for _ in inside)], devices,
        allow_split_physical_axes=True,
    )  # fmt: skip


def _minor(devices) -> int:
    """How many of the devices along fsdp, side by side, make up fsdp_minor.

    XLA's reduce-scatter for TPU works along one dimension of a 2-D torus or two of a 3-D one; over
    more it sums everything everywhere and then cuts, with twice the traffic and all of the memory.
    So an axis that lies in more is cut where its first line of devices ends.
    """
    if devices[0].platform != "tpu":
        return 1
    coords = np.array([device.coords for device in devices])
    spread = [np.any(coords[: i + 1] != coords[0], axis=0).sum() for i in range(len(coords))]
    if spread[-1] <= (1 if "lite" in devices[0].device_kind else 2):
        return 1
    line = next(i for i, dims in enumerate(spread) if dims > 1)
    return line if len(devices) % line == 0 else 1


def spec(dims: str) -> jax.P:
    """The layout of an array with these dimensions; "." stands for a replicated one."""
    return jax.P(*(axes or None for axes in _axes(dims)))


def shards(dims: str) -> list[int]:
    """Into how many pieces each of these dimensions is cut on the current mesh."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return [math.prod(sizes[axis] for axis in axes) for axes in _axes(dims)]


def sharders(dim: str) -> str:
    """What a user sets to shard this dimension, as "data*fsdp"."""
    return "*".join(axis for axis in RULES[dim] if hasattr(Mesh, axis))


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """einsum with a weight, cast to x's type, whose gradient is summed in the weight's own.

    Left to itself the compiler sums a weight's gradient over all devices whole and then cuts it;
    here each device gets the sum of its own piece only (see `weight_grad`).
    """
    return einsum(equation, x, w.astype(x.dtype))


def _linear_forward(equation, x, w):
    return linear(equation, x, w), (x, w)


def _linear_backward(equation, kept, dy):
    x, w = kept
    (dx,) = jax.vjp(lambda x: einsum(equation, x, w.astype(x.dtype)), x)[1](dy)
    inputs, y_dims = equation.split("->")
    x_dims, w_dims = inputs.split(",")
    return dx, weight_grad(f"{x_dims},{y_dims}->{w_dims}", x, dy).astype(w.dtype)


linear.defvjp(_linear_forward, _linear_backward)


def weight_grad(equation: str, x: jax.Array, dy: jax.Array) -> jax.Array:
    """A float32 einsum that sums over sharded dimensions, as in "BTD,BTF->DF".

    Each device multiplies what it has; the products are reduce-scattered over the mesh axes that
    shard the result, and summed whole over the others.
    """
    inputs, w_dims = equation.split("->")
    x_dims, y_dims = inputs.split(",")
    layout = dict(zip(x_dims, _axes(x_dims), strict=True))
    summed = [axis for dim in x_dims if dim not in w_dims for axis in layout[dim]]

    def local(x, dy):
        w = jnp.einsum(equation, x, dy, preferred_element_type=jnp.float32)
        whole = list(summed)
        for place, axes in enumerate(_axes(w_dims)):
            for axis in axes:
                if axis in summed:
                    w = _reduce_scatter(w, axis, place)
                    whole.remove(axis)
        return jax.lax.psum(w, tuple(whole)) if whole else w

    return jax.shard_map(local, in_specs=(spec(x_dims), spec(y_dims)), out_specs=spec(w_dims),
                         check_vma=False)(place(x, x_dims), place(dy, y_dims))  # fmt: skip


def _reduce_scatter(w: jax.Array, axis: str, dim: int) -> jax.Array:
    # As a matrix where it can be one: of other shapes TPU's compiler may sum everything first.
    before, after = w.shape[:dim], w.shape[dim + 1 :]
    if not (before and after):
        w = w.reshape(-1, w.shape[dim]) if before else w.reshape(w.shape[dim], -1)
        dim = 1 if before else 0
    w = jax.lax.psum_scatter(w, axis, scatter_dimension=dim, tiled=True)
    return w.reshape(*before, w.shape[dim], *after)


def place(x: jax.Array, dims: str) -> jax.Array:
    """Lays `x` out as `dims`: renaming T (sharded) to S (not) is an all-gather over `context`."""
    return jax.sharding.reshard(x, spec(dims))
