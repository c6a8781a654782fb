"""Attention in plain XLA, block by block: the CPU's implementation, and what others must equal.

B batch  T query position  S key position  N heads  K kv heads  G heads per kv head  H head dim
I query blocks of t positions  J key blocks of s positions

Scores exist for one pair of blocks at a time, so memory is linear in T and S, and a pair that
nobody sees is skipped at run time.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emu3_jax.kernels import mask
from emu3_jax.kernels.mask import HIDDEN, Dropout, Places

BLOCK = 512


def forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, places: Places, dropout: Dropout,
    dtype=None, block: int | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(out_BTNH in `dtype` or the queries' own, float32 lse_BTN).

    A query that sees nothing gets zeros, and a log-sum-exp of HIDDEN.
    """
    T, dtype = q_BTNH.shape[1], dtype or q_BTNH.dtype
    q, k, visible_IJ = _cut(q_BTNH, k_BSKH, v_BSKH, places, dropout, block or BLOCK)

    def row(inputs):
        q, visible_J = inputs
        B, t, K, G, H = q.q.shape
        empty = (jnp.zeros((B, K, t, G, H)), jnp.zeros((B, K, t, G)),
                 jnp.full((B, K, t, G), HIDDEN))  # fmt: skip

        def step(state, inputs):
            k, seen = inputs
            absorb = functools.partial(_absorb, q, k, rate=dropout.rate)
            return jax.lax.cond(seen, absorb, lambda state: state, state), None

        (out, total, peak), _ = _scan(step, empty, (k, visible_J))
        seen = peak > mask.NOTHING
        out = jnp.where(seen[..., None], out / jnp.where(seen, total, 1)[..., None], 0)
        lse = jnp.where(seen, peak + jnp.log(total), HIDDEN)
        return out.astype(dtype).swapaxes(1, 2), lse.swapaxes(1, 2)

    _, (out, lse) = _scan(lambda _, inputs: (None, row(inputs)), None, (q, visible_IJ))
    shape = (*q_BTNH.shape[:1], -1, *q_BTNH.shape[2:])
    return _join(out).reshape(shape)[:, :T], _join(lse).reshape(shape[:3])[:, :T]


def backward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, places: Places, dropout: Dropout,
    lse_BTN: jax.Array, delta_BTN: jax.Array, dout_BTNH: jax.Array, block: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """float32 (dq_BTNH, dk_BSKH, dv_BSKH), from forward's lse_BTN and the cotangent dout_BTNH.

    delta_BTN is the sum over H of dout * out, less the cotangent of lse. With the log-sum-exp
    over more keys than these, the result is these keys' part of the gradients.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    # No score is above 0 + HIDDEN there: a query that sees nothing has probabilities of 0.
    lse_BTN = jnp.where(lse_BTN > mask.NOTHING, lse_BTN, 0)
    q, k, visible_IJ = _cut(
        q_BTNH, k_BSKH, v_BSKH, places, dropout, block or BLOCK, lse_BTN, delta_BTN, dout_BTNH
    )

    def column(dq_I, inputs):
        k, visible_I = inputs
        index_I = jnp.arange(len(visible_I))

        def step(state, inputs):
            dq_I, dk, dv = state
            i, q, seen = inputs
            shapes = jax.eval_shape(lambda: _gradients(q, k, dropout.rate))
            dq_one, dk_one, dv_one = jax.lax.cond(
                seen,
                lambda: _gradients(q, k, dropout.rate),
                lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
            )
            return (dq_I.at[i].add(dq_one), dk + dk_one, dv + dv_one), None

        zeros = jnp.zeros(k.k.shape)
        (dq_I, dk, dv), _ = _scan(step, (dq_I, zeros, zeros), (index_I, q, visible_I))
        return dq_I, (dk, dv)

    dq_I, (dk, dv) = _scan(column, jnp.zeros(q.q.shape), (k, visible_IJ.T))
    dq_BTKGH = _join(dq_I)[:, :T]
    return dq_BTKGH.reshape(q_BTNH.shape), _join(dk)[:, :S], _join(dv)[:, :S]


class _Queries(NamedTuple):
    """One block of queries, [B, t, ...]; or all of them, [I, B, t, ...]."""

    q: jax.Array
    seg: jax.Array
    pos: jax.Array
    hash: jax.Array | None
    lse: jax.Array | None = None
    delta: jax.Array | None = None
    dout: jax.Array | None = None


class _Keys(NamedTuple):
    k: jax.Array
    v: jax.Array
    seg: jax.Array
    pos: jax.Array


def _cut(q_BTNH, k_BSKH, v_BSKH, places, dropout, block, lse=None, delta=None, dout=None):
    """Queries and keys cut into blocks, and visible_IJ: by any row of the batch."""
    K, T, S = k_BSKH.shape[2], q_BTNH.shape[1], k_BSKH.shape[1]
    block_t, block_s = min(block, T), min(block, S)
    places = places.padded(-(-T // block_t) * block_t, -(-S // block_s) * block_s)
    visible_BIJ, _ = mask.blocks(places, block_t, block_s)

    def cut(x_BT, size, grouped=False):
        if x_BT is None:
            return None
        x_BT = jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % size), *((0, 0),) * (x_BT.ndim - 2)))
        x_BT = x_BT.reshape(x_BT.shape[0], -1, size, *x_BT.shape[2:])
        if grouped:
            x_BT = x_BT.reshape(*x_BT.shape[:3], K, -1, *x_BT.shape[4:])
        return x_BT.swapaxes(0, 1)

    q = _Queries(cut(q_BTNH, block_t, True), cut(places.seg_BT, block_t),
                 cut(places.pos_BT, block_t), cut(dropout.hash_BTN, block_t, True),
                 cut(lse, block_t, True), cut(delta, block_t, True), cut(dout, block_t, True))
    k = _Keys(*(cut(x, block_s) for x in (k_BSKH, v_BSKH, places.seg_BS, places.pos_BS)))
    return q, k, visible_BIJ.any(0)


def _scan(step, state, inputs):
    """lax.scan; a single round is not made a loop of, which XLA would not fuse into."""
    if len(jax.tree.leaves(inputs)[0]) > 1:
        return jax.lax.scan(step, state, inputs)
    state, out = step(state, jax.tree.map(lambda x: x[0], inputs))
    return state, jax.tree.map(lambda x: x[None], out)


def _join(x_IBt):
    """[I, B, t, ...] -> [B, T, ...]."""
    return x_IBt.swapaxes(0, 1).reshape(x_IBt.shape[1], -1, *x_IBt.shape[3:])


def _scores(q, k):
    score_BKTGS = jnp.einsum("BTKGH,BSKH->BKTGS", q.q, k.k, preferred_element_type=jnp.float32)
    seen_BTS = mask.visible(q.seg[..., None], q.pos[..., None], k.seg[:, None], k.pos[:, None])
    hide_BTS = jnp.where(seen_BTS, 0.0, HIDDEN)  # added: fuses better than a select
    return score_BKTGS * q.q.shape[-1] ** -0.5 + hide_BTS[:, None, :, None]


def _dropped(x_BKTGS, q, k, rate):
    if not rate:
        return x_BKTGS
    pos_BS = k.pos.astype(jnp.uint32)[:, None, None, None]
    keep_BKTGS = mask.kept(q.hash.swapaxes(1, 2)[..., None], pos_BS, rate)
    return jnp.where(keep_BKTGS, x_BKTGS / (1 - rate), 0.0)


def _absorb(q, k, state, rate):
    """The running output (not normalised), sum and maximum, with one more block of keys."""
    out_BKTGH, total_BKTG, peak_BKTG = state
    score_BKTGS = _scores(q, k)
    new_BKTG = jnp.maximum(peak_BKTG, score_BKTGS.max(-1))
    exp_BKTGS = jnp.exp(score_BKTGS - new_BKTG[..., None])
    shrink_BKTG = jnp.exp(peak_BKTG - new_BKTG)
    total_BKTG = total_BKTG * shrink_BKTG + exp_BKTGS.sum(-1)
    exp_BKTGS = _dropped(exp_BKTGS, q, k, rate)
    more_BKTGH = jnp.einsum("BKTGS,BSKH->BKTGH", exp_BKTGS.astype(k.v.dtype), k.v,
                            preferred_element_type=jnp.float32)  # fmt: skip
    return out_BKTGH * shrink_BKTG[..., None] + more_BKTGH, total_BKTG, new_BKTG


def _gradients(q, k, rate):
    """(dq_BTKGH, dk_BSKH, dv_BSKH) of one pair of blocks."""
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    p_BKTGS = jnp.exp(_scores(q, k) - q.lse.swapaxes(1, 2)[..., None])
    dp_BKTGS = _dropped(einsum("BTKGH,BSKH->BKTGS", q.dout, k.v), q, k, rate)
    dscore_BKTGS = p_BKTGS * (dp_BKTGS - q.delta.swapaxes(1, 2)[..., None])
    dscore_BKTGS = (dscore_BKTGS * q.q.shape[-1] ** -0.5).astype(q.q.dtype)
    p_BKTGS = _dropped(p_BKTGS, q, k, rate).astype(q.dout.dtype)
    return (einsum("BKTGS,BSKH->BTKGH", dscore_BKTGS, k.k),
            einsum("BKTGS,BTKGH->BSKH", dscore_BKTGS, q.q),
            einsum("BKTGS,BTKGH->BSKH", p_BKTGS, q.dout))  # fmt: skip
