"""Attention over packed rows: causal by position, never across segments.

B batch  T query position  S key position  N heads  K kv heads  G heads per kv head  H head dim
"""

import functools

import jax
import jax.numpy as jnp

from emu3_jax.mesh import place, spec

HIDDEN = -1e30  # added to scores; finite, so that a row that sees nothing stays finite


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BS: jax.Array | None = None,
    positions_BS: jax.Array | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the visible keys -> out_BTNH.

    A key is visible if it has the query's segment and a position not after the query's. Keys and
    values may come sharded over `context` (they are gathered: T becomes S) or whole, as from a
    cache; without `segments_BS` and `positions_BS` they are the queries' own. Each kv head serves
    N/K neighbouring heads. `dropout` drops attention probabilities (Emu3 trains with 0.1): the
    mask is a hash of (key, row, head, query and key index), so it is the same on every mesh.
    """
    segments_BS = segments_BT if segments_BS is None else segments_BS
    positions_BS = positions_BT if positions_BS is None else positions_BS
    if dropout and key is None:
        raise ValueError(f"attention dropout {dropout} needs a key")
    seed = jax.random.bits(key) if dropout else jnp.uint32(0)
    index = {dim: place(jnp.arange(size, dtype=jnp.uint32), dim) for dim, size in
             zip("BTN", q_BTNH.shape, strict=False)}
    dims = ("BTNH", "BSKH", "BSKH", "BT", "BT", "BS", "BS", "B", "T", "N", "")
    arrays = (q_BTNH, k_BSKH, v_BSKH, segments_BT, positions_BT, segments_BS, positions_BS,
              index["B"], index["T"], index["N"], seed)
    placed = [place(array, dim) for array, dim in zip(arrays, dims, strict=True)]
    local = functools.partial(_local, dropout=dropout)
    return jax.shard_map(local, in_specs=tuple(map(spec, dims)), out_specs=spec("BTNH"))(*placed)


def _local(q_BTNH, k_BSKH, v_BSKH, seg_BT, pos_BT, seg_BS, pos_BS, b_B, t_T, n_N, seed, *, dropout):
    """What one device computes: its rows, its heads, its queries, all keys."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    score_BKTGS = jnp.einsum(
        "BTKGH,BSKH->BKTGS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    visible_BTS = (seg_BT[:, :, None] == seg_BS[:, None, :]) & (
        pos_BS[:, None, :] <= pos_BT[:, :, None]
    )
    hide_BTS = jnp.where(visible_BTS, 0.0, HIDDEN)
    score_BKTGS = score_BKTGS * H**-0.5 + hide_BTS[:, None, :, None]
    peak_BKTG1 = jax.lax.stop_gradient(jnp.max(score_BKTGS, axis=-1, keepdims=True))
    exp_BKTGS = jnp.exp(score_BKTGS - peak_BKTG1)
    total_BKTG = jnp.sum(exp_BKTGS, axis=-1)
    if dropout:
        keep_BTNS = _keep(seed, b_B, n_N, t_T, k_BSKH.shape[1], dropout)
        keep_BKTGS = keep_BTNS.reshape(B, T, K, N // K, -1).swapaxes(1, 2)
        exp_BKTGS = jnp.where(keep_BKTGS, exp_BKTGS / (1 - dropout), 0.0)
    out_BKTGH = jnp.einsum("BKTGS,BSKH->BKTGH", exp_BKTGS.astype(v_BSKH.dtype), v_BSKH,
                           preferred_element_type=jnp.float32)  # normalised last: T x H, not T x S
    out_BKTGH = (out_BKTGH / total_BKTG[..., None]).astype(q_BTNH.dtype)
    return out_BKTGH.swapaxes(1, 2).reshape(B, T, N, H)


def _keep(seed, b_B, n_N, t_T, S, dropout):
    """True where a probability is kept; each coordinate is mixed in by murmur3's finaliser."""
    h_B = _mix(seed ^ b_B)
    h_BT = _mix(h_B[:, None] ^ t_T)
    h_BTN = _mix(h_BT[:, :, None] ^ n_N)
    h_BTNS = _mix(h_BTN[..., None] ^ jnp.arange(S, dtype=jnp.uint32))
    return h_BTNS >= jnp.uint32(dropout * 2**32)


def _mix(h):
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return (h ^ (h >> 16)) + jnp.uint32(0x9E3779B9)
