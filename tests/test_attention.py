"""Every implementation of attention against dense float64, no leak between documents, dropout.

B batch  T query position  S key position  N heads  K kv heads  H head dim
I query blocks  J key blocks
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu3_jax import cache, mesh
from emu3_jax.attention import attention, balanced
from emu3_jax.kernels import cudnn, flash_tpu, mask, reference

B, T, N, K, H = 2, 304, 4, 2, 64
# Blocks so small that documents cross them, several in every row.
BLOCK, TPU_BLOCK = 32, (128, 128)
# name -> (attention's arguments, devices along context)
IMPLEMENTATIONS = {
    "reference": (dict(kernel="reference"), 1),
    "tpu": (dict(kernel="tpu"), 1),  # interpreted
    "gather of 4": (dict(kernel="reference", context="gather"), 4),
    "ring of 4": (dict(kernel="reference", context="ring"), 4),
    "ring of 8": (dict(kernel="reference", context="ring"), 8),
    "ring of 2, tpu": (dict(kernel="tpu", context="ring"), 2),
    "cudnn": (dict(kernel="cudnn"), 1),  # all but cuDNN itself: XLA stands in for it
    "gather of 4, cudnn": (dict(kernel="cudnn", context="gather"), 4),
}
# At XLA's usual optimization, unlike the rest (conftest.py): bit for bit is asserted of this one.
USUAL = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK", BLOCK)
    monkeypatch.setattr(flash_tpu, "OTHER", (TPU_BLOCK, TPU_BLOCK))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """cuDNN's stand-in, and what it can beyond cuDNN."""
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(cudnn, "DTYPES", (*cudnn.DTYPES, jnp.float32))
    monkeypatch.setattr(cudnn, "LARGEST_HEAD", 256)


def packed(rng, length: int, longest: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Segments and positions of a row: documents of random lengths, one of a token, padding."""
    lengths = [longest, 1]
    while sum(lengths) < length - longest:
        lengths.append(int(rng.integers(1, longest)))
    padding = length - sum(lengths)
    segments = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding])
    positions = np.concatenate([*map(np.arange, lengths), np.arange(padding)])
    return segments.astype(np.int32), positions.astype(np.int32)


def rows(seed: int, length: int = T, heads: int = N, kv_heads: int = K, head_dim: int = H):
    """q, k, v and a cotangent, random, and packed segments and positions."""
    rng = np.random.default_rng(seed)
    shapes = [(B, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, dout = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    where = [packed(rng, length) for _ in range(B)]
    return 2 * q, k, v, dout, np.stack([s for s, _ in where]), np.stack([p for _, p in where])


def dense(q, k, v, dout, seg_BT, pos_BT, seg_BS, pos_BS):
    """out, lse and the three gradients by the definition, in float64, every matrix written out."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    many_k, many_v = (x.repeat(group, axis=2) for x in (k, v))  # neighbours share a kv head
    score_BNTS = np.einsum("BTNH,BSNH->BNTS", q, many_k) * scale
    see_BTS = (seg_BT[:, :, None] == seg_BS[:, None]) & (pos_BT[:, :, None] >= pos_BS[:, None])
    see_BTS &= (seg_BT > 0)[:, :, None]
    exp_BNTS = np.where(see_BTS[:, None], np.exp(score_BNTS), 0)
    total_BNT = exp_BNTS.sum(-1)
    p_BNTS = exp_BNTS / np.where(total_BNT > 0, total_BNT, 1)[..., None]
    dp_BNTS = np.einsum("BTNH,BSNH->BNTS", dout, many_v)
    ds_BNTS = p_BNTS * (dp_BNTS - (p_BNTS * dp_BNTS).sum(-1, keepdims=True)) * scale

    def per_kv_head(x_BSNH):
        return x_BSNH.reshape(*k.shape[:3], group, -1).sum(3)

    with np.errstate(divide="ignore"):
        lse_BTN = np.maximum(np.log(total_BNT), mask.HIDDEN).swapaxes(1, 2)
    return (
        np.einsum("BNTS,BSNH->BTNH", p_BNTS, many_v),
        lse_BTN,
        np.einsum("BNTS,BSNH->BTNH", ds_BNTS, many_k),
        per_kv_head(np.einsum("BNTS,BTNH->BSNH", ds_BNTS, q)),
        per_kv_head(np.einsum("BNTS,BTNH->BSNH", p_BNTS, dout)),
    )


@contextlib.contextmanager
def run(name: str, compiler_options=None, **more):
    """A function of q, k, v, dout, segments and positions that gives (out, lse, dq, dk, dv).

    On a ring rows are laid out in its balanced order, and the results put back. Of cuDNN, which
    has none to give, lse is None.
    """
    options, devices = IMPLEMENTATIONS[name]
    options |= more
    with_lse = options["kernel"] != "cudnn"
    where = mesh.Mesh(fsdp=1, context=devices).make(jax.devices()[:devices])
    with jax.set_mesh(where):

        @functools.partial(jax.jit, compiler_options=compiler_options)
        def step(q, k, v, dout, seg, pos, key):
            def forward(q, k, v):
                result = attention(q, k, v, seg, pos, key=key, with_lse=with_lse, **options)
                return result if with_lse else (result, None)

            (out, lse), pullback = jax.vjp(forward, q, k, v)
            return out, lse, *pullback((dout, jax.tree.map(jnp.zeros_like, lse)))

        def apply(*arrays, key=None):
            order = balanced(arrays[0].shape[1]) if options.get("context") == "ring" else None
            order = np.arange(arrays[0].shape[1]) if order is None else np.asarray(order)
            dims = ("BTNH", "BTKH", "BTKH", "BTNH", "BT", "BT")
            placed = [mesh.place(jnp.asarray(x[:, order]), d)
                      for x, d in zip(arrays, dims, strict=True)]  # fmt: skip
            key = jax.random.key(0) if key is None else key
            results = step(*placed, key)
            return jax.tree.map(lambda x: np.asarray(x)[:, np.argsort(order)], results)

        yield apply


def assert_near(found, wanted, bounds=(3e-6, 5e-6, 2e-5, 2e-5, 2e-5)):
    for name, x, want, bound in zip(
        ("out", "lse", "dq", "dk", "dv"), found, wanted, bounds, strict=True
    ):
        assert np.abs(want).max() > 0.1
        if x is not None:
            np.testing.assert_allclose(x, want, rtol=1e-6, atol=bound, err_msg=name)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_values_and_gradients_are_those_of_dense_float64(name):
    with run(name) as apply:
        for seed in range(2):
            arrays = rows(seed)
            seg, pos = arrays[4:]
            assert (seg == 0).any() and ((seg == 2).sum(1) == 1).all()
            out, lse, *grads = apply(*arrays)
            assert_near((out, lse, *grads), dense(*arrays, seg, pos))
            assert not out[seg == 0].any()
            assert lse is None or (lse[seg == 0] < mask.NOTHING).all()


@pytest.mark.parametrize("name", ["reference", "tpu", "cudnn"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (131, 2, 1, 128), (257, 3, 3, 256)])
def test_any_length_head_count_and_head_size(name, shape):
    length, heads, kv_heads, head_dim = shape
    with run(name) as apply:
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal((B, length, n, head_dim)).astype(np.float32)
                  for n in (heads, kv_heads, kv_heads, heads)]  # fmt: skip
        seg = np.ones((B, length), np.int32)
        seg[0, length // 3 :] = 2
        pos = np.arange(length, dtype=np.int32) - np.where(seg == 2, length // 3, 0)
        wanted = dense(*arrays, seg, pos, seg, pos)
        found = apply(*arrays, seg, pos)
        for x, want in zip(found, wanted, strict=True):
            if x is not None:
                np.testing.assert_allclose(x, want, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("name", ["reference", "tpu", "ring of 4", "cudnn"])
def test_bfloat16_inputs_keep_a_float32_softmax(name):
    arrays = rows(2)
    halves = [jnp.asarray(x, jnp.bfloat16) for x in arrays[:4]]
    with run(name) as apply:
        out, lse, *grads = apply(*halves, *arrays[4:])
    exact = dense(*(np.asarray(x, np.float32) for x in halves), *arrays[4:], *arrays[4:])
    assert out.dtype == jnp.bfloat16
    if lse is not None:
        assert lse.dtype == np.float32
        np.testing.assert_allclose(lse, exact[1], rtol=1e-6, atol=5e-6)  # from unrounded scores
    for x, want in zip((out, *grads), (exact[0], *exact[2:]), strict=True):
        np.testing.assert_allclose(x.astype(np.float32), want, rtol=2**-7, atol=0.05)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_document_changes_nothing_outside_itself(name):
    """Bit for bit, in the outputs and in all three gradients; it does change its own."""
    arrays = rows(5)
    seg = arrays[4]
    changed_BT = (seg == 3) & (np.arange(B) == 0)[:, None]
    assert changed_BT.sum() >= 3
    scale_BT11 = np.where(changed_BT, 2, 1).astype(np.float32)[..., None, None]
    with run(name, USUAL) as apply:
        befores = apply(*arrays)
        afters = apply(*(x * scale_BT11 for x in arrays[:3]), *arrays[3:])
    for before, after in zip(befores, afters, strict=True):
        if before is not None:
            np.testing.assert_array_equal(before[~changed_BT], after[~changed_BT])
            assert not np.array_equal(before[changed_BT], after[changed_BT])


@pytest.mark.parametrize("name", ["reference", "tpu", "ring of 4", "cudnn"])
def test_no_gradient_reaches_other_documents_or_later_positions(name):
    q, k, v, dout, seg, pos = rows(6)
    at = int(np.flatnonzero((seg[0] == 3) & (pos[0] == 1))[0])
    dout = np.zeros_like(dout)
    dout[0, at] = 1
    with run(name) as apply:
        *_, dq, dk, dv = apply(q, k, v, dout, seg, pos)
    reached_BT = np.zeros(seg.shape, bool)
    reached_BT[0, at - 1 : at + 1] = True  # itself and the only position of its document before it
    for grad in (dk, dv):
        np.testing.assert_array_equal(np.any(grad, axis=(2, 3)), reached_BT)
    assert np.flatnonzero(np.any(dq[0], axis=(1, 2))).tolist() == [at]


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS
                                  if name != "reference" and "cudnn" not in name])  # fmt: skip
def test_dropout_is_the_same_for_every_implementation(name):
    arrays, key = rows(7), jax.random.key(3)
    with run("reference", dropout=0.3) as apply:
        wanted = apply(*arrays, key=key)
        other = apply(*arrays, key=jax.random.key(4))
    with run(name, dropout=0.3) as apply:
        assert_near(apply(*arrays, key=key), wanted)
    assert np.abs(other[0] - wanted[0]).max() > 0.1


def test_the_gradient_of_the_log_sum_exp():
    q, k, v, _, seg, pos = rows(8, length=130)

    def total(attend):
        return lambda q, k: jnp.sum(jnp.where(seg > 0, attend(q, k), 0) ** 2)

    def plain(q, k):
        score_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q, k.repeat(N // K, 2)) * H**-0.5
        see_BTS = mask.visible(seg[:, :, None], pos[:, :, None], seg[:, None], pos[:, None])
        score_BNTS = jnp.where(see_BTS[:, None], score_BNTS, -1e30)
        return jax.nn.logsumexp(score_BNTS, axis=-1).sum(1)  # [B, T]

    def ours(q, k):
        return attention(q, k, v, seg, pos, with_lse=True, kernel="tpu")[1].sum(2)

    with jax.set_mesh(mesh.Mesh().make(jax.devices()[:1])):
        found, wanted = (jax.jit(jax.grad(total(f), (0, 1)))(q, k) for f in (ours, plain))
    for x, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("int8", 0.02)])
def test_keys_of_a_cache(dtype, tolerance, one_device, monkeypatch):
    """Slots in blocks, the last ones unwritten (segment 0), padding in front of a row."""
    monkeypatch.setattr(cache, "BLOCK", dict(cpu=4))
    rng = np.random.default_rng(4)
    q_BTNH = rng.standard_normal((2, 2, N, H)).astype(np.float32)
    k_BSKH, v_BSKH = rng.standard_normal((2, 2, 7, K, H)).astype(np.float32)
    seg_BS = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]], np.int32)
    pos_BS = np.array([[0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]], np.int32)
    where = seg_BS[:, 5:], pos_BS[:, 5:]
    held = cache.empty(1, 2, 10, K, H, dtype)
    assert held.segments_BS.shape == (2, 12)
    (layer,), index = held.layers, held.length
    held = held.behind(*(mesh.place(jnp.asarray(x), "BT") for x in (seg_BS, pos_BS)))
    layer = cache.written(layer, jnp.asarray(k_BSKH), jnp.asarray(v_BSKH), index)
    placed = (mesh.place(jnp.asarray(x), dims) for x, dims in
              zip((q_BTNH, *where), ("BTNH", "BT", "BT"), strict=True))  # fmt: skip
    q, *here = placed
    out_BTNH = jax.jit(cache.attention)(q, layer, *here, held)
    want_BTNH, *_ = dense(q_BTNH, k_BSKH, v_BSKH, q_BTNH, *where, seg_BS, pos_BS)
    np.testing.assert_allclose(out_BTNH, want_BTNH, rtol=0, atol=tolerance)


def probabilities(rate: float, key: jax.Array, q_BTNH, k_BSKH) -> np.ndarray:
    """The probabilities after dropout [B, T, N, S]: the values pick out one key each."""
    S = k_BSKH.shape[1]
    seg_BS = jnp.ones((len(q_BTNH), S), jnp.int32)
    pos_BS = jnp.broadcast_to(jnp.arange(S), seg_BS.shape)
    v_BSKH = jnp.broadcast_to(jnp.eye(S)[:, None], (*k_BSKH.shape[:3], S))
    index_B, index_N = (jnp.arange(q_BTNH.shape[axis]) for axis in (0, 2))
    # Every query stands behind every key.
    hash_BTN = mask.query_hash(jax.random.bits(key), index_B, seg_BS, pos_BS + S, index_N)
    places = mask.Places(seg_BS, pos_BS + S, seg_BS, pos_BS)
    return reference.forward(q_BTNH, k_BSKH, v_BSKH, places, mask.Dropout(rate, hash_BTN))[0]


def test_dropout_is_a_mask_of_its_rate_over_the_probabilities(one_device):
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
    q, k, v, _, seg, pos = (np.repeat(x[:1], 4, axis=0) for x in rows(7))

    def drop(**sizes):
        devices = jax.devices()[: 8 if sizes else 1]
        with jax.set_mesh(mesh.Mesh(**sizes).make(devices)):
            placed = (mesh.place(jnp.asarray(x), dims) for x, dims in
                      zip((q, k, v, seg, pos), ("BTNH", "BTKH", "BTKH", "BT", "BT"), strict=True))
            return np.asarray(jax.jit(functools.partial(attention, dropout=0.5))(
                *placed, key=jax.random.key(3)))  # fmt: skip

    alone_BTNH, spread_BTNH = drop(), drop(data=2, fsdp=1, context=2, tensor=2)
    np.testing.assert_allclose(spread_BTNH, alone_BTNH, rtol=0, atol=5e-6)
    assert not np.allclose(alone_BTNH[0], alone_BTNH[1])  # equal rows, other masks


@pytest.mark.parametrize("arguments, message", [
    (dict(dropout=0.1), r"attention dropout 0\.1 needs a key"),
    (dict(context="rings"), "context 'rings' is none of gather, ring"),
    (dict(kernel="cuda"), "attention kernel 'cuda' is none of .*"),
])  # fmt: skip
def test_what_attention_refuses(one_device, arguments, message):
    q, k, v, _, seg, pos = rows(8, length=16 + 101)
    with pytest.raises(ValueError, match=f"^{message}$"):
        attention(q, k, v, seg, pos, **arguments)


def by_element(seg_T, pos_T, seg_S, pos_S, t: int, s: int):
    """Brute force: (visible_IJ, whole_IJ) of one row."""
    see_TS = mask.visible(seg_T[:, None], pos_T[:, None], seg_S[None], pos_S[None])
    see_ItJs = np.asarray(see_TS).reshape(len(seg_T) // t, t, len(seg_S) // s, s)
    return see_ItJs.any((1, 3)), see_ItJs.all((1, 3))


@pytest.mark.parametrize("t, s", [(16, 16), (32, 16), (16, 48)])
def test_visited_blocks_are_those_in_which_something_is_seen(t, s):
    rng = np.random.default_rng(0)
    seg, pos = (np.stack(x) for x in zip(*(packed(rng, 480, 90) for _ in range(8)), strict=True))
    visible, whole = mask.blocks(mask.Places(seg, pos, seg, pos), t, s)
    assert np.asarray(whole).any() and not np.asarray(visible).all()
    for row in range(len(seg)):
        want_visible, want_whole = by_element(seg[row], pos[row], seg[row], pos[row], t, s)
        np.testing.assert_array_equal(visible[row], want_visible)
        np.testing.assert_array_equal(whole[row], want_whole)


def test_no_block_is_left_out_whatever_the_order():
    rng = np.random.default_rng(1)
    for _ in range(20):
        seg, pos = packed(rng, 128, 30)
        order = rng.permutation(8)  # blocks in any order, as a ring lays them out
        seg, pos = (x.reshape(8, 16)[order].ravel() for x in (seg, pos))
        places = mask.Places(*(x[None] for x in (seg, pos, seg, pos)))
        visible, whole = (np.asarray(x[0]) for x in mask.blocks(places, 32, 32))
        want_visible, want_whole = by_element(seg, pos, seg, pos, 32, 32)
        assert not (want_visible & ~visible).any()
        np.testing.assert_array_equal(whole, want_whole)


def test_pairs_list_every_visible_block_once_and_lonely_rows_too():
    visible_BIJ = np.array([[[1, 0, 1], [0, 0, 0]], [[0, 0, 0], [0, 1, 0]]], bool)
    whole_BIJ = visible_BIJ & (np.arange(3) == 2)
    found = mask.pairs(jnp.asarray(visible_BIJ), jnp.asarray(whole_BIJ))
    entries = [
        (int(row) >> mask.FLAGS, int(at) >> 16, int(at) & 0xFFFF, int(row) & 15)
        for at, row in zip(found.at_P[: found.count], found.row_P[: found.count], strict=True)
    ]
    seen, both = mask.SEEN, mask.FIRST | mask.LAST
    assert entries == [
        (0, 0, 0, mask.FIRST | seen | mask.MASKED), (0, 0, 2, mask.LAST | seen),
        (0, 1, 0, both | mask.MASKED), (1, 0, 0, both | mask.MASKED),
        (1, 1, 1, both | seen | mask.MASKED),
    ]  # fmt: skip


def test_the_reference_takes_memory_linear_in_the_length(one_device, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK", 256)

    def bytes_for(length: int) -> int:
        q, k = (jax.ShapeDtypeStruct((1, length, n, 64), jnp.float32) for n in (2, 1))
        at = jax.ShapeDtypeStruct((1, length), jnp.int32)
        grad = jax.grad(lambda *x: attention(*x).sum(), (0, 1, 2))
        return jax.jit(grad).lower(q, k, k, at, at).compile().memory_analysis().temp_size_in_bytes

    few, many = bytes_for(4096), bytes_for(16384)
    assert many < 4.2 * few and many < 16384**2 * 4 / 4


def test_balanced_order_gives_each_device_a_front_and_a_back_chunk():
    with jax.set_mesh(mesh.Mesh(fsdp=1, context=4).make(jax.devices()[:4])):
        assert balanced(16).tolist() == [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
        message = ("^rows of 12 positions do not split into a front and a back chunk for each of "
                   "context = 4 devices; take a multiple of 8$")  # fmt: skip
        with pytest.raises(ValueError, match=message):
            balanced(12)
