"""Cross-entropy of every position, computed a tile of the vocabulary at a time.

B batch  T position  D width  V vocab, or the pieces it is cut into by the mesh  I tile
M id in a piece's tile
"""

import functools

import jax
import jax.numpy as jnp

from emu3_jax.mesh import einsum, nearly_whole, place, shards, spec, weight_grad

HIDDEN = jnp.finfo(jnp.float32).min


def cross_entropy(
    x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, vocab: int, tile: int
) -> tuple[jax.Array, jax.Array]:
    """-log p(target) and the log of the partition sum of every position -> float32 nll_BT, lse_BT.

    Ids from `vocab` on are padding of the weights: they take no part. Only [B, T, tile] logits
    exist at a time, backward too (they are computed again): at Emu3's 184,622 ids a row of 8,192
    would otherwise take 6 GB. Nor does a device ever hold the whole head or its gradient: a tile
    is gathered over the axes that cut D, cast to x's type and used for all positions at once, and
    its gradient is summed and scattered before the next. `tile` is cut to the largest divisor of
    the ids that one device holds.
    """
    (pieces,) = shards("V")
    ids = head_DV.shape[1] // pieces
    M = next(size for size in range(min(tile, ids), 0, -1) if ids % size == 0)
    dims, shape = "DV..", (head_DV.shape[0], pieces, ids // M, M)
    tiles_IDVM = jnp.moveaxis(jax.lax.reshape(head_DV, shape, out_sharding=spec(dims)), 2, 0)
    return _cross_entropy(vocab, place(x_BTD, "BTD"), tiles_IDVM, place(targets_BT, "BT"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(vocab, x_BTD, tiles_IDVM, targets_BT):
    return _forward(vocab, x_BTD, tiles_IDVM, targets_BT)[0]


def _forward(vocab, x_BTD, tiles_IDVM, targets_BT):
    def step(carry, tile):
        peak_BT, sum_BT, target_BT = carry
        logits_BTVM, hit_BTVM, _ = _tile(vocab, tiles_IDVM, x_BTD, targets_BT, *tile)
        new_BT = jnp.maximum(peak_BT, logits_BTVM.max((2, 3)))
        part_BT = jnp.exp(logits_BTVM - new_BT[..., None, None]).sum((2, 3))
        target_BT += jnp.where(hit_BTVM, logits_BTVM, 0).sum((2, 3))
        return (new_BT, sum_BT * jnp.exp(peak_BT - new_BT) + part_BT, target_BT), None

    zero_BT = jnp.zeros(targets_BT.shape, jnp.float32, out_sharding=spec("BT"))
    tiles = tiles_IDVM, jnp.arange(len(tiles_IDVM))
    (peak_BT, sum_BT, target_BT), _ = jax.lax.scan(
        step, (zero_BT + HIDDEN, zero_BT, zero_BT), tiles
    )
    lse_BT = peak_BT + jnp.log(sum_BT)
    return (lse_BT - target_BT, lse_BT), (x_BTD, tiles_IDVM, targets_BT, lse_BT)


def _backward(vocab, kept, grads):
    x_BTD, tiles_IDVM, targets_BT, lse_BT = kept
    dnll_BT, dlse_BT = (grad_BT[..., None, None] for grad_BT in grads)

    def step(dx_BTD, tile):
        logits_BTVM, hit_BTVM, head_DVM = _tile(vocab, tiles_IDVM, x_BTD, targets_BT, *tile)
        share_BTVM = jnp.exp(logits_BTVM - lse_BT[..., None, None])
        slope_BTVM = share_BTVM * (dnll_BT + dlse_BT) - jnp.where(hit_BTVM, dnll_BT, 0)
        slope_BTVM = slope_BTVM.astype(x_BTD.dtype)
        dx_BTD += einsum(
            "BTVM,DVM->BTD", slope_BTVM, head_DVM, preferred_element_type=jnp.float32
        )
        return dx_BTD, weight_grad("BTD,BTVM->DVM", x_BTD, slope_BTVM)

    dx_BTD = jnp.zeros(x_BTD.shape, jnp.float32, out_sharding=spec("BTD"))
    dx_BTD, dtiles_IDVM = jax.lax.scan(step, dx_BTD, (tiles_IDVM, jnp.arange(len(tiles_IDVM))))
    return dx_BTD.astype(x_BTD.dtype), dtiles_IDVM.astype(tiles_IDVM.dtype), None


_cross_entropy.defvjp(_forward, _backward)


def _tile(vocab, tiles_IDVM, x_BTD, targets_BT, tile_DVM, index):
    """Logits of one tile, where they are the target's, and the tile's weights as used."""
    tiles, _, pieces, M = tiles_IDVM.shape
    layout = dict(out_sharding=jax.P(*spec("V"), None))
    id_VM = jax.lax.broadcasted_iota(jnp.int32, (pieces, M), 0, **layout) * (tiles * M)
    id_VM += jax.lax.broadcasted_iota(jnp.int32, (pieces, M), 1, **layout) + index * M
    head_DVM = nearly_whole(tile_DVM.astype(x_BTD.dtype), "DV.")
    head_DVM = jax.sharding.reshard(head_DVM, spec(".V."))
    logits_BTVM = einsum("BTD,DVM->BTVM", x_BTD, head_DVM, preferred_element_type=jnp.float32)
    logits_BTVM = jnp.where(id_VM < vocab, logits_BTVM, HIDDEN)
    return logits_BTVM, targets_BT[..., None, None] == id_VM, head_DVM
