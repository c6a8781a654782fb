"""Attention against a dense float64 reference, no leak between documents, and its dropout.

B batch  T query position  S key position  N heads  K kv heads  H head dim
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu3_jax import mesh
from emu3_jax.attention import attention

B, T, N, K, H = 3, 24, 4, 2, 8

pytestmark = pytest.mark.usefixtures("one_device")


def dense(q_BTNH, k_BSKH, v_BSKH, seg_BT, pos_BT, seg_BS, pos_BS):
    """The definition, with every matrix written out; heads of one kv head are neighbours."""
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = (np_or_jnp(x).repeat(x, group, axis=2) for x in (k_BSKH, v_BSKH))
    np_ = np_or_jnp(q_BTNH)
    score_BNTS = np_.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / np.sqrt(q_BTNH.shape[-1])
    same_BTS = seg_BT[:, :, None] == seg_BS[:, None, :]
    before_BTS = pos_BT[:, :, None] >= pos_BS[:, None, :]
    score_BNTS = np_.where((same_BTS & before_BTS)[:, None], score_BNTS, -np.inf)
    exp_BNTS = np_.exp(score_BNTS - score_BNTS.max(axis=-1, keepdims=True))
    p_BNTS = exp_BNTS / exp_BNTS.sum(axis=-1, keepdims=True)
    return np_.einsum("BNTS,BSNH->BTNH", p_BNTS, v_BSNH)


def np_or_jnp(x):
    return np if isinstance(x, np.ndarray) else jnp


def packed(rng, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments and positions of a row: documents of random lengths, then padding (segment 0)."""
    lengths = []
    while sum(lengths) < length - 8:
        lengths.append(int(rng.integers(1, 8)))
    padding = length - sum(lengths)
    segments = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding])
    positions = np.concatenate([*map(np.arange, lengths), np.arange(padding)])
    return segments.astype(np.int32), positions.astype(np.int32)


def rows(seed: int) -> tuple[np.ndarray, ...]:
    """q, k, v and packed segments and positions, all random."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H)
    q, k, v = (2 * rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    where = [packed(rng, T) for _ in range(B)]
    return q, k, v, np.stack([s for s, _ in where]), np.stack([p for _, p in where])


def float64(*arrays):
    return (np.asarray(x, np.float64) for x in arrays)


# At XLA's usual optimization, unlike the rest (conftest.py): bit for bit is asserted of this one.
USUAL = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}


@functools.partial(jax.jit, compiler_options=USUAL)
def value_and_grad(q_BTNH, k_BSKH, v_BSKH, seg_BT, pos_BT, cotangent_BTNH):
    out_BTNH, vjp = jax.vjp(
        lambda q, k, v: attention(q, k, v, seg_BT, pos_BT), q_BTNH, k_BSKH, v_BSKH
    )
    return out_BTNH, vjp(cotangent_BTNH)


def test_packed_rows_equal_the_dense_reference():
    for seed in range(3):
        q, k, v, seg, pos = rows(seed)
        assert seg.max() >= 4 and (seg == 0).any()
        out_BTNH, _ = value_and_grad(q, k, v, seg, pos, q)
        want_BTNH = dense(*float64(q, k, v), seg, pos, seg, pos)
        np.testing.assert_allclose(out_BTNH, want_BTNH, rtol=0, atol=3e-6)


def test_gradients_equal_those_of_the_dense_reference():
    q, k, v, seg, pos = rows(3)
    cotangent_BTNH = np.random.default_rng(0).standard_normal(q.shape).astype(np.float32)
    _, grads = value_and_grad(q, k, v, seg, pos, cotangent_BTNH)
    def reference(*qkv):
        return jnp.sum(dense(*qkv, seg, pos, seg, pos) * cotangent_BTNH)

    want_grads = jax.jit(jax.grad(reference, argnums=(0, 1, 2)))(q, k, v)
    for grad, want in zip(grads, want_grads, strict=True):
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(grad, want, rtol=0, atol=2e-5)


def test_keys_of_a_cache():
    """Fewer queries than keys, unwritten slots (segment 0) behind, padding in front of a row."""
    rng = np.random.default_rng(4)
    q_BTNH = rng.standard_normal((2, 2, N, H)).astype(np.float32)
    k_BSKH, v_BSKH = rng.standard_normal((2, 2, 9, K, H)).astype(np.float32)
    seg_BS = np.array([[0, 0, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0, 0]], np.int32)
    pos_BS = np.array([[0, 0, 0, 1, 2, 3, 4, 0, 0], [0, 1, 2, 3, 4, 5, 6, 0, 0]], np.int32)
    seg_BT, pos_BT = seg_BS[:, 5:7], pos_BS[:, 5:7]
    out_BTNH = jax.jit(attention)(q_BTNH, k_BSKH, v_BSKH, seg_BT, pos_BT, seg_BS, pos_BS)
    want_BTNH = dense(*float64(q_BTNH, k_BSKH, v_BSKH), seg_BT, pos_BT, seg_BS, pos_BS)
    np.testing.assert_allclose(out_BTNH, want_BTNH, rtol=0, atol=2e-6)


def test_a_document_changes_nothing_outside_itself():
    """Bit for bit, in the outputs and in all three gradients; it does change its own."""
    q, k, v, seg, pos = rows(5)
    cotangent_BTNH = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32)
    changed_BT = (seg == 2) & (np.arange(B) == 0)[:, None]
    assert changed_BT.sum() >= 3
    scale_BT11 = np.where(changed_BT, 2, 1).astype(np.float32)[..., None, None]
    out, grads = value_and_grad(q, k, v, seg, pos, cotangent_BTNH)
    other, other_grads = value_and_grad(*(x * scale_BT11 for x in (q, k, v)), seg, pos,
                                        cotangent_BTNH)
    for before, after in zip((out, *grads), (other, *other_grads), strict=True):
        before, after = np.asarray(before), np.asarray(after)
        np.testing.assert_array_equal(before[~changed_BT], after[~changed_BT])
        assert not np.array_equal(before[changed_BT], after[changed_BT])


def test_no_gradient_reaches_other_documents_or_later_positions():
    q, k, v, seg, pos = rows(6)
    at = int(np.flatnonzero((seg[0] == 2) & (pos[0] == 1))[0])
    cotangent_BTNH = np.zeros_like(q)
    cotangent_BTNH[0, at] = 1
    _, (dq, dk, dv) = value_and_grad(q, k, v, seg, pos, cotangent_BTNH)
    reached_BT = np.zeros(seg.shape, bool)
    reached_BT[0, at - 1 : at + 1] = True  # itself and the only position of its document before it
    for grad in (dk, dv):
        np.testing.assert_array_equal(np.any(np.asarray(grad), axis=(2, 3)), reached_BT)
    assert np.flatnonzero(np.any(np.asarray(dq)[0], axis=(1, 2))).tolist() == [at]


def probabilities(rate: float, key: jax.Array, q_BTNH, k_BSKH) -> np.ndarray:
    """The probabilities after dropout [B, T, N, S]: the values pick out one key each."""
    where = mesh.place(jnp.zeros(q_BTNH.shape[:2], jnp.int32), "BT")
    S = k_BSKH.shape[1]
    v_BSKH = jnp.broadcast_to(jnp.eye(S)[:, None], (*k_BSKH.shape[:3], S))
    return attention(q_BTNH, k_BSKH, v_BSKH, where, where, dropout=rate, key=key)


def test_dropout_is_a_mask_of_its_rate_over_the_probabilities():
    rate = 0.25
    q_BTNH, k_BSKH = jnp.zeros((2, 48, 4, 48)), jnp.zeros((2, 48, 2, 48))
    drop = jax.jit(lambda key: probabilities(rate, key, q_BTNH, k_BSKH))
    p_BTNS = np.asarray(drop(jax.random.key(0)))
    kept_BTNS = p_BTNS > 0
    np.testing.assert_allclose(p_BTNS[kept_BTNS], 1 / 48 / (1 - rate), rtol=1e-5)
    sigma = np.sqrt(rate * (1 - rate))
    assert abs(kept_BTNS.mean() - (1 - rate)) < 4 * sigma / np.sqrt(kept_BTNS.size)
    for axis in range(4):  # no coordinate is left out of the hash, nor are neighbours alike
        rest = tuple(i for i in range(4) if i != axis)
        share = kept_BTNS.mean(axis=rest)
        bound = 5 * sigma / np.sqrt(kept_BTNS.size / kept_BTNS.shape[axis])
        assert np.abs(share - (1 - rate)).max() < bound, axis
        first, second = (np.take(kept_BTNS, i, axis) for i in (0, 1))
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1, axis
    np.testing.assert_array_equal(p_BTNS, drop(jax.random.key(0)))
    other_BTNS = np.asarray(drop(jax.random.key(1))) > 0
    assert abs(np.corrcoef(kept_BTNS.ravel(), other_BTNS.ravel())[0, 1]) < 0.05


def test_dropout_is_the_same_on_a_mesh():
    q, k, v, seg, pos = rows(7)
    q, k, v, seg, pos = (np.repeat(x[:1], 4, axis=0) for x in (q, k, v, seg, pos))

    def run():
        return np.asarray(jax.jit(attention, static_argnames="dropout")(
            *(mesh.place(jnp.asarray(x), dims) for x, dims in
              zip((q, k, v, seg, pos), ("BTNH", "BTKH", "BTKH", "BT", "BT"), strict=True)),
            dropout=0.5, key=jax.random.key(3),
        ))  # fmt: skip

    alone_BTNH = run()
    with jax.set_mesh(mesh.Mesh(data=2, fsdp=1, context=2, tensor=2).make()):
        spread_BTNH = run()
    np.testing.assert_allclose(spread_BTNH, alone_BTNH, rtol=0, atol=5e-6)
    assert not np.allclose(alone_BTNH[0], alone_BTNH[1])  # equal rows, other masks


def test_dropout_needs_a_key():
    q, k, v, seg, pos = rows(8)
    with pytest.raises(ValueError, match=r"^attention dropout 0\.1 needs a key$"):
        attention(q, k, v, seg, pos, dropout=0.1)
