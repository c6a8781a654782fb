"""What a weight is: declared once, its initial value, layout and count are derived from that.

Letters: see mesh.py.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from emu3_jax.mesh import sharders, shards, spec


@dataclasses.dataclass(frozen=True)
class Param:
    """A weight: a letter per axis, its shape, and the standard deviation of its initial values.

    `std` 0 means ones (norm scales), which weight decay leaves alone.
    """

    dims: str
    shape: tuple[int, ...]
    std: float = 0.0

    def init(self, key: jax.Array) -> jax.Array:
        """The initial float32 values, made in place on the current mesh."""
        if not self.std:
            return jnp.ones(self.shape, jnp.float32, out_sharding=spec(self.dims))
        normal = jax.random.normal(key, self.shape, jnp.float32, out_sharding=spec(self.dims))
        return normal * self.std


def init(tree, key: jax.Array):
    """Initial values of a tree of `Param`, each drawn from its own key.

    Raises ValueError if a dimension does not divide over the mesh axes that shard it.
    """
    leaves, treedef = jax.tree.flatten(tree)
    for param in leaves:
        for dim, size, parts in zip(param.dims, param.shape, shards(param.dims), strict=True):
            if size % parts:
                raise ValueError(
                    f"weight {param.dims}: {dim} = {size} does not split over "
                    f"{sharders(dim)} = {parts}; change that size or the mesh"
                )
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(p.init(k) for p, k in zip(leaves, keys, strict=True))


def decays(tree):
    """True where weight decay applies: everywhere but on norm scales."""
    return jax.tree.map(lambda p: p.std > 0, tree)


def count(tree) -> int:
    """The number of values in a tree of `Param` or arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
