"""Cross-entropy of every position, computed a chunk of positions at a time.

B batch  T position  D width  V vocab  C devices along `context`  I chunk  M position in a chunk
"""

import functools

import jax
import jax.numpy as jnp

from emu3_jax.mesh import einsum, place, shards, spec


def cross_entropy(
    x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, chunk: int
) -> jax.Array:
    """-log p(target) of every position -> float32 nll_BT.

    Only [B, chunk, V] logits exist at a time, in the backward pass too (they are recomputed): at
    Emu3's 184,622 ids a row of 8,192 would otherwise take 6 GB. `chunk` is cut to the largest
    divisor of the positions one device holds. The vocabulary may be sharded, so the target's logit
    is picked by comparison, not by a gather. Raises ValueError if rows do not split over `context`.
    """
    B, T, _ = x_BTD.shape
    (C,) = shards("T")
    if T % C:
        raise ValueError(f"rows of {T} positions do not split over context = {C}")
    M = next(size for size in range(min(chunk, T // C), 0, -1) if T // C % size == 0)
    head_DV = place(head_DV, ".V")

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def nll(x_BCMD, targets_BCM, head_DV):
        logits_BCMV = einsum("BTMD,DV->BTMV", x_BCMD, head_DV, preferred_element_type=jnp.float32)
        hit_BCMV = targets_BCM[..., None] == jnp.arange(logits_BCMV.shape[-1])
        target_BCM = jnp.sum(jnp.where(hit_BCMV, logits_BCMV, 0), axis=-1)
        return jax.nn.logsumexp(logits_BCMV, axis=-1) - target_BCM

    def chunked(array_BT):
        """[B, T, ...] -> [I, B, C, M, ...]: the chunks of all devices along `context` abreast."""
        shape = (B, C, T // C // M, M, *array_BT.shape[2:])
        layout = spec("BT" + "." * (len(shape) - 2))
        return jnp.moveaxis(jax.lax.reshape(array_BT, shape, out_sharding=layout), 2, 0)

    def step(_, chunk):
        return None, nll(*chunk, head_DV)

    _, nll_IBCM = jax.lax.scan(step, None, (chunked(x_BTD), chunked(targets_BT)))
    return jax.lax.reshape(jnp.moveaxis(nll_IBCM, 0, 2), (B, T), out_sharding=spec("BT"))
