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
from jax.experimental.layout import Layout, with_layout_constraint
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
        sizes = self.sizes(len(devices))
        array = _arranged(sizes, devices)
        minor = _minor(array[0, :, 0, 0])
        array = array.reshape(sizes[0], -1, minor, *sizes[2:])
        return jax.sharding.Mesh(array, AXES, axis_types=(axis_type,) * len(AXES))

    def sizes(self, count: int, where: str = "") -> list[int]:
        """The sizes on so many devices, which a message calls those of `where`.

        Raises ValueError if they do not multiply to that.
        """
        names = [field.name for field in dataclasses.fields(self)]
        sizes = list(dataclasses.astuple(self))
        asked = "*".join(f"{axis}={size}" for axis, size in zip(names, sizes, strict=True))
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(f"mesh {asked}: sizes are 1 or more, and one of them may be -1")
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and count % known == 0:
            sizes[sizes.index(-1)] = count // known
        if -1 in sizes or math.prod(sizes) != count:
            devices = f"the {count} devices of {where}" if where else f"{count} devices"
            raise ValueError(
                f"mesh {asked} does not fit {devices}; the product must be {count} "
                "(-1 takes what is left)"
            )
        return sizes


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
    used = set(jax.sharding.get_abstract_mesh().manual_axes)  # within a shard_map: not ours to cut
    layout = []
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
    return einsum(equation, x, nearly_whole(w.astype(x.dtype), _dims(equation)[1]))


def _linear_forward(equation, x, w):
    return linear(equation, x, w), (x, w)


def _linear_backward(equation, kept, dy):
    x, w = kept
    x_dims, w_dims, y_dims = _dims(equation)
    used = nearly_whole(w.astype(x.dtype), w_dims)
    (dx,) = jax.vjp(lambda x: einsum(equation, x, used), x)[1](dy)
    return dx, weight_grad(f"{x_dims},{y_dims}->{w_dims}", x, dy).astype(w.dtype)


linear.defvjp(_linear_forward, _linear_backward)


def turn(dims: str, w: jax.Array) -> jax.Array:
    """A weight laid out as `dims`, whose D goes to its other end: "DNH" becomes "NHD"."""
    return einsum(f"{dims}->{_turned(dims)}", w)


def turned(equation: str, x: jax.Array, w: jax.Array, **kwargs) -> jax.Array:
    """`linear` for a few tokens and without a gradient, of a weight that has been turned.

    Weight times tokens, with what is summed side by side in memory, is what XLA:CPU does at the
    memory's speed up to 16 tokens; tokens times weight takes up to 3 times as long.
    """
    x_dims, w_dims, y_dims = _dims(equation)
    w_dims, axes = _turned(w_dims), dict(zip(y_dims, spec(y_dims), strict=True))
    summed = [dim for dim in w_dims if dim in x_dims]  # einsum would take them by the alphabet
    pairs = [[dims.index(dim) for dim in summed] for dims in (w_dims, x_dims)]
    first = "".join(dim for dim in w_dims + x_dims if dim in axes)
    y = jax.lax.dot_general(w, x, (pairs, ((), ())), out_sharding=jax.P(*(axes[d] for d in first)),
                            **kwargs)  # fmt: skip
    return einsum(f"{first}->{y_dims}", y)


def _turned(dims: str) -> str:
    return dims[1:] + dims[0] if dims[0] == "D" else dims[-1] + dims[:-1]


def _dims(equation: str) -> list[str]:
    return equation.replace("->", ",").split(",")  # of BTD,DF->BTF these three


def nearly_whole(w: jax.Array, dims: str) -> jax.Array:
    """A weight laid out as `dims`, gathered over all axes but `fsdp` and `tensor`.

    In a program of several slices XLA:TPU gathers over the whole of a 3-D torus by summing what is
    0 but for each device's piece: twice the traffic, and the array once more. So there, or
    wherever there is `data`, it is gathered in two steps, of which this is the first.
    """
    if jax.sharding.get_abstract_mesh().shape["data"] == 1:
        return w
    kept = [tuple(axis for axis in axes if axis in ("fsdp", "tensor")) for axes in _axes(dims)]
    return jax.sharding.reshard(w, jax.P(*(axes or None for axes in kept)))


def weight_grad(equation: str, x: jax.Array, dy: jax.Array) -> jax.Array:
    """A float32 einsum that sums over sharded dimensions, as in "BTD,BTF->DF".

    Each device multiplies what it has; the products are reduce-scattered over the mesh axes that
    shard the result, and summed whole over the others.
    """
    x_dims, y_dims, w_dims = _dims(equation)
    layout = dict(zip(x_dims, _axes(x_dims), strict=True))
    summed = [axis for dim in x_dims if dim not in w_dims for axis in layout[dim]]
    pieces = [(axis, dim) for dim, axes in enumerate(_axes(w_dims)) for axis in axes
              if axis in summed]  # fmt: skip
    whole = tuple(axis for axis in summed if axis not in dict(pieces))

    def local(x, dy):
        w = jnp.einsum(equation, x, dy, preferred_element_type=jnp.float32)
        for axis, dim in pieces:
            w = _reduce_scatter(w, axis, dim)
        return jax.lax.psum(w, whole) if whole else w

    return jax.shard_map(local, in_specs=(spec(x_dims), spec(y_dims)), out_specs=spec(w_dims),
                         check_vma=False)(place(x, x_dims), place(dy, y_dims))  # fmt: skip


def _reduce_scatter(w: jax.Array, axis: str, dim: int) -> jax.Array:
    # Whole rows of a matrix, one after the other in memory: of other pieces TPU's compiler may sum
    # everything everywhere first, then cut (columns of fewer than 128 it always does).
    w = jnp.moveaxis(w, dim, 0)
    rows, *rest = w.shape
    w = with_layout_constraint(w.reshape(rows, -1), Layout(major_to_minor=(0, 1)))
    w = jax.lax.psum_scatter(w, axis, scatter_dimension=0, tiled=True)
    return jnp.moveaxis(w.reshape(-1, *rest), 0, dim)


def apart_along_data(function, out_specs):
    """function(*whole, rows) as (whole, rows) -> result, where each index along the mesh axis
    `data` has its own rows, and what is `whole` in common. The axes are explicit.

    Within, no layout mentions `data`: the function itself sums over it what it returns, of which
    `out_specs` are the layouts.
    """
    others = tuple(axis for axis in AXES if axis != "data")

    def inside(x):
        return jax.P(*(tuple(axis for axis in axes if axis != "data") if isinstance(axes, tuple)
                       else axes for axes in jax.typeof(x).sharding.spec))  # fmt: skip

    def apart(whole, rows):
        in_specs = jax.tree.map(inside, (*whole, rows))
        # Where the other axes are explicit, too, jax.shard_map takes what they cut for whole, and
        # every weight would be gathered. So for the passage they are not.
        passing = jax.shard_map(
            jax.sharding.explicit_axes(function, axes=others, in_sharding=in_specs),
            in_specs=(*(jax.P() for _ in whole), jax.P("data")), out_specs=jax.P(),
            axis_names={"data"}, check_vma=False,
        )  # fmt: skip
        return jax.sharding.auto_axes(passing, axes=others, out_sharding=out_specs)(*whole, rows)

    return apart


def place(x: jax.Array, dims: str) -> jax.Array:
    """Lays `x` out as `dims`: renaming T (sharded) to S (not) is an all-gather over `context`."""
    return jax.sharding.reshard(x, spec(dims))
