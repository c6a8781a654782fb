"""Flash attention for Hopper (H100, H200) in Pallas Mosaic GPU; hidden blocks are not touched.

B batch  T query position  S key position  N heads  K kv heads  G heads per kv head  H head dim
I query blocks of t positions  J key blocks of s positions
O outer blocks, one a program  V the inner blocks of each, those to be visited first

A program holds one outer block: of queries (forward, dq) or of keys (dk and dv). Two warpgroups
compute, each on half of it, its sums in registers; a third one only fetches inner blocks, two
ahead. Which inner blocks, says a list made from segments and positions: first those of which all
is seen, which need no mask, then those of which something is, and a hidden one is not on it. So a
packed row costs what its documents cost.

Without a GPU the kernels run in Pallas' interpreter: slowly, but with the same programs, lists,
copies and barriers. Only `_Interpreted` differs from `_Compiled`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from emu3_jax.kernels import mask
from emu3_jax.kernels.mask import HIDDEN, NOTHING, Dropout, Places

WORKERS = 2  # warpgroups that compute; the one behind them fetches
STAGES = 2  # inner blocks in shared memory
ROWS = 64  # of a product by one warpgroup; all blocks are multiples
WORKER_REGISTERS, FETCHER_REGISTERS = 240, 24  # per thread, together at most 512
HEAD_DIMS = (64, 128)  # 256: the sums of dk and dv alone would fill a warpgroup's registers
DTYPES = (jnp.bfloat16, jnp.float16)
FORWARD = (128, 128)  # positions of an outer block and of an inner one
BACKWARD = (128, 64)
LOG2E = math.log2(math.e)  # exponentials are of base 2, as the hardware's


def forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, places: Places, dropout: Dropout,
    dtype=None, block: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(out_BTNH in `dtype` or the queries' own, float32 lse_BTN); as reference.forward.

    `block` is (queries, keys) of a block: multiples of 128 and of 64, by default FORWARD.

    Raises:
        ValueError: another head size than HEAD_DIMS or another type than DTYPES.
    """
    t, s = block or FORWARD
    x = _Arranged.of(q_BTNH, k_BSKH, v_BSKH, places, dropout, t, s)
    B, T, N, H = x.q_BTNH.shape
    dtype = jnp.dtype(dtype or q_BTNH.dtype)
    if dtype == q_BTNH.dtype:  # by way of shared memory, where the queries were
        out = jax.ShapeDtypeStruct((B, T, N, H), dtype)
    else:
        out = jax.ShapeDtypeStruct((B, T // x.half, x.half, N, H), dtype)
    pair = _tiles((STAGES, s, H), q_BTNH.dtype)
    out, lse_BNOt = _call(
        functools.partial(_forward_kernel, rate=dropout.rate),
        grid=(B, T // t, N),
        inputs=(x.q_BTNH, x.k_BSKH, x.v_BSKH, x.visits(by_key=False), x.marks(x.half, s),
                x.hashes(x.half)),
        outputs=[out, jax.ShapeDtypeStruct((B, N, T // x.half, x.half), jnp.float32)],
        scratch=[_tiles((WORKERS, x.half, H), q_BTNH.dtype), pair, pair,
                 plgpu.Barrier(num_barriers=WORKERS), *_queue(), *_queue(),
                 plgpu.Barrier(num_arrivals=WORKERS)],
    )  # fmt: skip
    length = q_BTNH.shape[1]
    lse_BTN = lse_BNOt.reshape(B, N, T).swapaxes(1, 2)
    return out.reshape(B, T, N, H)[:, :length], lse_BTN[:, :length]


def backward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, places: Places, dropout: Dropout,
    lse_BTN: jax.Array, delta_BTN: jax.Array, dout_BTNH: jax.Array,
    block: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """float32 (dq_BTNH, dk_BSKH, dv_BSKH); as reference.backward.

    Two kernels, each the owner of what it sums, so that no two programs write to one place: one
    goes through the keys of a block of queries, the other through the queries of a block of keys.
    `block` is (outer, inner) for both: multiples of 128 and of 64, by default BACKWARD.

    Raises:
        ValueError: another head size than HEAD_DIMS or another type than DTYPES.
    """
    outer, inner = block or BACKWARD
    lse_BTN = jnp.where(lse_BTN > NOTHING, lse_BTN, 0) * LOG2E  # 0: finite where nothing is seen
    dout_BTNH = dout_BTNH.astype(q_BTNH.dtype)
    arrange = functools.partial(_Arranged.of, q_BTNH, k_BSKH, v_BSKH, places, dropout)
    x, y = arrange(outer, inner), arrange(inner, outer)
    B, T, N, H = x.q_BTNH.shape
    S, K = y.k_BSKH.shape[1:3]
    rows = x.half
    (dq,) = _call(
        functools.partial(_dq_kernel, rate=dropout.rate),
        grid=(B, T // outer, N),
        inputs=(x.q_BTNH, x.padded(dout_BTNH), x.k_BSKH, x.v_BSKH, x.visits(by_key=False),
                x.marks(rows, inner), x.numbers(lse_BTN, rows), x.numbers(delta_BTN, rows),
                x.hashes(rows)),
        outputs=[jax.ShapeDtypeStruct((B, T // rows, rows, N, H), jnp.float32)],
        scratch=[*[_tiles((WORKERS, rows, H), q_BTNH.dtype)] * 2,
                 *[_tiles((STAGES, inner, H), q_BTNH.dtype)] * 2,
                 plgpu.Barrier(num_arrivals=2, num_barriers=WORKERS), *_queue(arrivals=2)],
    )  # fmt: skip
    shape = jax.ShapeDtypeStruct((B, S // rows, rows, K, H), jnp.float32)
    dk, dv = _call(
        functools.partial(_dkv_kernel, rate=dropout.rate),
        grid=(B, S // outer, K),
        inputs=(y.q_BTNH, y.padded(dout_BTNH), y.k_BSKH, y.v_BSKH, y.visits(by_key=True),
                y.marks(inner, rows), y.numbers(lse_BTN, inner), y.numbers(delta_BTN, inner),
                y.hashes(inner)),
        outputs=[shape, shape],
        scratch=[*[_tiles((STAGES, inner, H), q_BTNH.dtype)] * 2,
                 *[_tiles((WORKERS, rows, H), q_BTNH.dtype)] * 2,
                 plgpu.Barrier(num_arrivals=2, num_barriers=WORKERS), *_queue(arrivals=2)],
    )  # fmt: skip
    dq_BTNH = dq.reshape(B, -1, N, H)[:, : q_BTNH.shape[1]]
    return dq_BTNH, *(x.reshape(B, S, K, H)[:, : k_BSKH.shape[1]] for x in (dk, dv))


class _Visits(NamedTuple):
    """Of each outer block: its inner ones in the order of the visit, and how many there are.

    counts_BO2 is how many are seen as a whole, which come first, and how many are seen at all.
    """

    order_BOV: jax.Array
    counts_BO2: jax.Array

    @classmethod
    def of(cls, visible_BOV: jax.Array, whole_BOV: jax.Array) -> "_Visits":
        V = visible_BOV.shape[2]
        whole_BOV &= visible_BOV
        rank_BOV = jnp.where(whole_BOV, 0, jnp.where(visible_BOV, 1, 2))
        order_BOV = jnp.sort(rank_BOV * V + jnp.arange(V), axis=-1) % V
        counts = [x.sum(-1, dtype=jnp.int32) for x in (whole_BOV, visible_BOV)]
        return cls(order_BOV.astype(jnp.int32), jnp.stack(counts, axis=-1))


class _Marks(NamedTuple):
    """Segments and positions, cut into pieces as a warpgroup needs them."""

    seg_BIt: jax.Array
    pos_BIt: jax.Array
    seg_BJs: jax.Array
    pos_BJs: jax.Array


class _Arranged(NamedTuple):
    """The inputs with padding behind, to multiples of t queries and s keys."""

    q_BTNH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    hash_BTN: jax.Array | None
    places: Places
    t: int
    s: int

    @classmethod
    def of(cls, q_BTNH, k_BSKH, v_BSKH, places, dropout, t: int, s: int) -> "_Arranged":
        H, dtype = q_BTNH.shape[3], q_BTNH.dtype
        if H not in HEAD_DIMS:
            raise ValueError(f"the GPU kernel has heads of {HEAD_DIMS}, not of {H}; take another")
        if dtype not in DTYPES or {k_BSKH.dtype, v_BSKH.dtype} != {dtype}:
            raise ValueError(f"the GPU kernel takes bfloat16 or float16, not {dtype} queries with "
                             f"{k_BSKH.dtype} keys and {v_BSKH.dtype} values")  # fmt: skip
        if t % ROWS or s % ROWS or max(t, s) % (WORKERS * ROWS):
            raise ValueError(f"blocks of {t} queries and {s} keys are not of 128 and 64")
        T, S = -(-q_BTNH.shape[1] // t) * t, -(-k_BSKH.shape[1] // s) * s
        k_BSKH, v_BSKH = (_pad(x, S) for x in (k_BSKH, v_BSKH))
        hash_BTN = None if dropout.hash_BTN is None else _pad(dropout.hash_BTN, T)
        return cls(_pad(q_BTNH, T), k_BSKH, v_BSKH, hash_BTN, places.padded(T, S), t, s)

    @property
    def half(self) -> int:
        """One warpgroup's share of the outer block."""
        return max(self.t, self.s) // WORKERS

    def padded(self, x_BTN: jax.Array) -> jax.Array:
        return _pad(x_BTN, self.q_BTNH.shape[1])

    def numbers(self, x_BTN: jax.Array, size: int) -> jax.Array:
        """[B, T, N] -> [B, N, pieces, size], padded."""
        x_BTN = self.padded(x_BTN)
        B, T, N = x_BTN.shape
        return x_BTN.swapaxes(1, 2).reshape(B, N, T // size, size)

    def hashes(self, size: int) -> jax.Array | None:
        return None if self.hash_BTN is None else self.numbers(self.hash_BTN, size)

    def marks(self, t: int, s: int) -> _Marks:
        B = self.q_BTNH.shape[0]
        sizes = t, t, s, s
        return _Marks(*(x.reshape(B, -1, n) for x, n in zip(self.places, sizes, strict=True)))

    def visits(self, by_key: bool) -> _Visits:
        visible_BIJ, whole_BIJ = mask.blocks(self.places, self.t, self.s)
        if by_key:
            visible_BIJ, whole_BIJ = visible_BIJ.swapaxes(1, 2), whole_BIJ.swapaxes(1, 2)
        return _Visits.of(visible_BIJ, whole_BIJ)


def _pad(x_BT: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x_BT, ((0, 0), (0, length - x_BT.shape[1]), *((0, 0),) * (x_BT.ndim - 2)))


def _tiles(shape, dtype):
    """Shared memory as the tensor cores read it: 8 rows of 128 bytes, swizzled."""
    transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _queue(arrivals: int = 1):
    """Two barriers a stage: its copies have arrived; its readers have gone."""
    return (plgpu.Barrier(num_arrivals=arrivals, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=WORKERS, num_barriers=STAGES))  # fmt: skip


def _call(kernel, grid, inputs, outputs, scratch):
    """Runs `kernel` for every row, outer block and head; the heads of one block side by side.

    Side by side they find the blocks of their common kv head in the cache.
    """
    interpreted = _interpreted()
    arrays, structure = jax.tree.flatten(inputs)

    def body(*refs):
        at = _At(*map(lax.axis_index, ("row", "block", "head", "warpgroup")))
        ops = _Interpreted if interpreted else _Compiled
        inputs = jax.tree.unflatten(structure, refs[: len(arrays)])
        kernel(ops, at, inputs, *refs[len(arrays) :])

    return plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=grid,
        grid_names=("row", "block", "head"),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=_interpreter() if interpreted else None,
    )(*arrays)


def _interpreted() -> bool:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is None or device.platform not in ("gpu", "cuda")


def _interpreter():
    # JAX 0.10 has no public name for it; imported here, where no GPU's run depends on it.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


class _At(NamedTuple):
    """Which program and which of its warpgroups this is."""

    row: jax.Array
    block: jax.Array
    head: jax.Array
    warpgroup: jax.Array


class _Compiled:
    """What warpgroups do, in the layout of their products' results.

    `axis` is what a vector lacks of such a result: 1 is a number per row, 0 one per column.
    """

    @staticmethod
    def full(shape, value, axis: int | None = None):
        layout = plgpu.Layout.WGMMA if axis is None else plgpu.Layout.WGMMA.reduce(axis)
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    @staticmethod
    def load(ref, axis: int):
        layout = plgpu.Layout.WGMMA.reduce(axis)
        return plgpu.load(ref, (), layout=layout, optimized=False)

    @staticmethod
    def registers(count: int, action: str):
        plgpu.set_max_registers(count, action=action)

    @staticmethod
    def products(*terms, meanwhile=None) -> list:
        """sum + a b, or sum + a b^T, of each term (sum, a, b, transposed); all under way at once.

        `meanwhile` is done after they have begun and before they are waited for.
        """

        def begin(refs):
            for ref, (_, a, b, transposed) in zip(refs, terms, strict=True):
                plgpu.wgmma(ref, a, plgpu.transpose_ref(b, (1, 0)) if transposed else b)
            if meanwhile is not None:
                meanwhile()

        return pl.run_state(begin)([plgpu.ACC.init(total) for total, *_ in terms])


class _Interpreted:
    """The same for the interpreter, which knows no layouts and no sums that begin with a value."""

    @staticmethod
    def full(shape, value, axis: int | None = None):
        return jnp.full(shape, value, jnp.float32)

    @staticmethod
    def load(ref, axis: int):
        return ref[...]

    @staticmethod
    def registers(count: int, action: str):
        pass

    @staticmethod
    def products(*terms, meanwhile=None) -> list:
        def product(total, a, b, transposed):
            a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
            axes = ((1,), (1 if transposed else 0,)), ((), ())
            return total + lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)

        results = [product(*term) for term in terms]
        if meanwhile is not None:
            meanwhile()
        return results


def _forward_kernel(ops, at: _At, inputs, out, lse, q_tH, k_sH, v_sH, q_here, k_here, k_gone,
                    v_here, v_gone, turn, *, rate: float):  # fmt: skip
    """One head's block of queries. Its warpgroups take turns at the tensor cores.

    While one has its products done there, the other does the arithmetic of its softmax.
    """
    q, k, v, visits, marks, hashes = inputs
    half, H = q_tH.shape[1:]
    s = k_sH.shape[1]
    # The later a block, the more it sees: the long programs first, the short ones fill the gaps.
    block = visits.counts_BO2.shape[1] - 1 - at.block
    whole, count = visits.counts_BO2[at.row, block, 0], visits.counts_BO2[at.row, block, 1]

    def pass_turn():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(at.warpgroup < WORKERS)
    def _():
        ops.registers(WORKER_REGISTERS, "increase")
        piece = block * WORKERS + at.warpgroup
        q_own = q_tH.at[at.warpgroup]
        rows = pl.ds(piece * half, half)
        plgpu.copy_gmem_to_smem(q.at[at.row, rows, at.head], q_own, q_here.at[at.warpgroup])
        seen_by, drop = _Mask(ops, marks, at.row), _Drop(ops, hashes, at, rate)
        plgpu.barrier_wait(q_here.at[at.warpgroup])
        pl.when(at.warpgroup == 1)(pass_turn)

        def absorb(step, state, masked: bool):
            sum_tH, total_t, peak_t = state
            slot = lax.rem(step, np.int32(STAGES))
            plgpu.barrier_wait(k_here.at[slot])
            zero_ts = ops.full((half, s), 0.0)
            (score_ts,) = ops.products((zero_ts, q_own, k_sH.at[slot], True), meanwhile=pass_turn)
            plgpu.barrier_arrive(k_gone.at[slot])
            score_ts = score_ts * (H**-0.5 * LOG2E)
            if masked or rate:
                inner = visits.order_BOV[at.row, block, step]
            if masked:
                score_ts = jnp.where(seen_by(piece, inner, True), score_ts, HIDDEN)
            new_t = jnp.maximum(peak_t, score_ts.max(1))
            exp_ts = jnp.exp2(score_ts - _spread(new_t, (half, s), 1))
            shrink_t = jnp.exp2(peak_t - new_t)
            total_t = total_t * shrink_t + exp_ts.sum(1)
            sum_tH = sum_tH * _spread(shrink_t, (half, H), 1)
            if rate:
                kept_ts = drop.kept(marks, at.head, piece, inner, True)
                exp_ts = drop(exp_ts, kept_ts)
            exp_ts = exp_ts.astype(v_sH.dtype)
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_here.at[slot])
            plgpu.barrier_wait(turn)
            (sum_tH,) = ops.products((sum_tH, exp_ts, v_sH.at[slot], False))
            plgpu.barrier_arrive(v_gone.at[slot])
            return sum_tH, total_t, new_t

        state = ops.full((half, H), 0.0), ops.full((half,), 0.0, 1), ops.full((half,), HIDDEN, 1)
        state = _visit(whole, count, absorb, state)
        sum_tH, total_t, peak_t = state
        pl.when(at.warpgroup == 0)(pass_turn)
        seen_t = peak_t > NOTHING
        total_t = jnp.where(seen_t, total_t, 1.0)
        sum_tH = sum_tH * _spread(jnp.where(seen_t, 1.0 / total_t, 0.0), (half, H), 1)
        lse_t = (peak_t + jnp.log(total_t) * LOG2E) * (1 / LOG2E)
        lse[at.row, at.head, piece] = jnp.where(seen_t, lse_t, HIDDEN)
        if out.dtype == q.dtype:
            q_own[...] = sum_tH.astype(out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_own, out.at[at.row, rows, at.head])
            plgpu.wait_smem_to_gmem(0)
        else:
            out.at[at.row, piece, :, at.head][...] = sum_tH.astype(out.dtype)

    @pl.when(at.warpgroup == WORKERS)
    def _():
        ops.registers(FETCHER_REGISTERS, "decrease")
        kv_head = lax.div(at.head, np.int32(q.shape[2] // k.shape[2]))

        def fetch(step, slot):
            places = pl.ds(visits.order_BOV[at.row, block, step] * s, s)
            where = at.row, places, kv_head
            _await(k_gone, step, slot)
            plgpu.copy_gmem_to_smem(k.at[where], k_sH.at[slot], k_here.at[slot])
            _await(v_gone, step, slot)
            plgpu.copy_gmem_to_smem(v.at[where], v_sH.at[slot], v_here.at[slot])

        _fetch_all(count, fetch, (k_gone, v_gone))


def _dq_kernel(ops, at: _At, inputs, dq, q_tH, dout_tH, k_sH, v_sH, own_here, here, gone, *,
               rate: float):  # fmt: skip
    """One head's block of queries, through the blocks of keys it sees."""
    q, dout, k, v, visits, marks, lse, delta, hashes = inputs
    half, H = q_tH.shape[1:]
    s = k_sH.shape[1]
    block = visits.counts_BO2.shape[1] - 1 - at.block
    whole, count = visits.counts_BO2[at.row, block, 0], visits.counts_BO2[at.row, block, 1]

    @pl.when(at.warpgroup < WORKERS)
    def _():
        ops.registers(WORKER_REGISTERS, "increase")
        piece = block * WORKERS + at.warpgroup
        own = at.row, pl.ds(piece * half, half), at.head
        q_own, dout_own = q_tH.at[at.warpgroup], dout_tH.at[at.warpgroup]
        _copy(own_here.at[at.warpgroup], (q.at[own], q_own), (dout.at[own], dout_own))
        seen_by, drop = _Mask(ops, marks, at.row), _Drop(ops, hashes, at, rate)
        lse_t = ops.load(lse.at[at.row, at.head, piece], 1)
        delta_t = ops.load(delta.at[at.row, at.head, piece], 1)
        plgpu.barrier_wait(own_here.at[at.warpgroup])

        def absorb(step, state, masked: bool):
            dq_tH, lse_t, delta_t = state
            slot = lax.rem(step, np.int32(STAGES))
            plgpu.barrier_wait(here.at[slot])
            zero_ts = ops.full((half, s), 0.0)
            score_ts, dp_ts = ops.products(
                (zero_ts, q_own, k_sH.at[slot], True), (zero_ts, dout_own, v_sH.at[slot], True)
            )
            p_ts = jnp.exp2(score_ts * (H**-0.5 * LOG2E) - _spread(lse_t, (half, s), 1))
            if masked or rate:
                inner = visits.order_BOV[at.row, block, step]
            if masked:
                p_ts = jnp.where(seen_by(piece, inner, True), p_ts, 0.0)
            if rate:
                dp_ts = drop(dp_ts, drop.kept(marks, at.head, piece, inner, True))
            dscore_ts = p_ts * (dp_ts - _spread(delta_t, (half, s), 1)) * H**-0.5
            (dq_tH,) = ops.products((dq_tH, dscore_ts.astype(q.dtype), k_sH.at[slot], False))
            plgpu.barrier_arrive(gone.at[slot])
            return dq_tH, lse_t, delta_t

        state = ops.full((half, H), 0.0), lse_t, delta_t
        state = _visit(whole, count, absorb, state)
        dq.at[at.row, piece, :, at.head][...] = state[0]

    @pl.when(at.warpgroup == WORKERS)
    def _():
        ops.registers(FETCHER_REGISTERS, "decrease")
        kv_head = lax.div(at.head, np.int32(q.shape[2] // k.shape[2]))

        def fetch(step, slot):
            places = at.row, pl.ds(visits.order_BOV[at.row, block, step] * s, s), kv_head
            _await(gone, step, slot)
            k_to, v_to = k_sH.at[slot], v_sH.at[slot]
            _copy(here.at[slot], (k.at[places], k_to), (v.at[places], v_to))

        _fetch_all(count, fetch, (gone,))


def _dkv_kernel(ops, at: _At, inputs, dk, dv, q_tH, dout_tH, k_sH, v_sH, own_here, here, gone, *,
                rate: float):  # fmt: skip
    """One kv head's block of keys, through the blocks of queries that see it, G heads of each.

    Scores are held keys by queries, [s, t]: the sums' rows are then keys, as a product's should.
    """
    q, dout, k, v, visits, marks, lse, delta, hashes = inputs
    half, H = k_sH.shape[1:]
    t = q_tH.shape[1]
    G = q.shape[2] // k.shape[2]
    block = at.block  # the earlier, the more see it
    whole, count = visits.counts_BO2[at.row, block, 0], visits.counts_BO2[at.row, block, 1]

    def visited(step):
        """The block and the head of the queries."""
        inner = visits.order_BOV[at.row, block, lax.div(step, np.int32(G))]
        return inner, at.head * G + lax.rem(step, np.int32(G))

    @pl.when(at.warpgroup < WORKERS)
    def _():
        ops.registers(WORKER_REGISTERS, "increase")
        piece = block * WORKERS + at.warpgroup
        own = at.row, pl.ds(piece * half, half), at.head
        k_own, v_own = k_sH.at[at.warpgroup], v_sH.at[at.warpgroup]
        _copy(own_here.at[at.warpgroup], (k.at[own], k_own), (v.at[own], v_own))
        seen_by, drop = _Mask(ops, marks, at.row), _Drop(ops, hashes, at, rate)
        plgpu.barrier_wait(own_here.at[at.warpgroup])

        def absorb(step, state, masked: bool):
            dk_sH, dv_sH = state
            slot = lax.rem(step, np.int32(STAGES))
            inner, head = visited(step)
            lse_t = ops.load(lse.at[at.row, head, inner], 0)
            delta_t = ops.load(delta.at[at.row, head, inner], 0)
            plgpu.barrier_wait(here.at[slot])
            zero_st = ops.full((half, t), 0.0)
            (score_st,) = ops.products((zero_st, k_own, q_tH.at[slot], True))
            p_st = jnp.exp2(score_st * (H**-0.5 * LOG2E) - _spread(lse_t, (half, t), 0))
            if masked:
                p_st = jnp.where(seen_by(inner, piece, False), p_st, 0.0)
            kept_p_st = p_st
            if rate:
                kept_st = drop.kept(marks, head, inner, piece, False)
                kept_p_st = drop(p_st, kept_st)
            dv_sH, dp_st = ops.products(
                (dv_sH, kept_p_st.astype(q.dtype), dout_tH.at[slot], False),
                (zero_st, v_own, dout_tH.at[slot], True),
            )
            if rate:
                dp_st = drop(dp_st, kept_st)
            dscore_st = p_st * (dp_st - _spread(delta_t, (half, t), 0)) * H**-0.5
            (dk_sH,) = ops.products((dk_sH, dscore_st.astype(q.dtype), q_tH.at[slot], False))
            plgpu.barrier_arrive(gone.at[slot])
            return dk_sH, dv_sH

        state = ops.full((half, H), 0.0), ops.full((half, H), 0.0)
        state = _visit(whole * G, count * G, absorb, state)
        for ref, sum_sH in zip((dk, dv), state, strict=True):
            ref.at[at.row, piece, :, at.head][...] = sum_sH

    @pl.when(at.warpgroup == WORKERS)
    def _():
        ops.registers(FETCHER_REGISTERS, "decrease")

        def fetch(step, slot):
            inner, head = visited(step)
            places = at.row, pl.ds(inner * t, t), head
            _await(gone, step, slot)
            q_to, dout_to = q_tH.at[slot], dout_tH.at[slot]
            _copy(here.at[slot], (q.at[places], q_to), (dout.at[places], dout_to))

        _fetch_all(count * G, fetch, (gone,))


def _visit(whole, count, absorb, state):
    """The state after absorb(step, state, masked) at every step; the first `whole` need no mask."""
    state = lax.fori_loop(0, whole, functools.partial(absorb, masked=False), state)
    return lax.fori_loop(whole, count, functools.partial(absorb, masked=True), state)


def _copy(arrived, *pairs):
    """Starts to copy from global to shared memory, one after the other, all told to one barrier."""
    for there, here in pairs:
        plgpu.copy_gmem_to_smem(there, here, arrived)


def _fetch_all(count, fetch, readers):
    """fetch(step, slot) for every step, then waits until all `readers` have gone.

    Were barriers left with arrivals nobody has waited for, the interpreter would object.
    """

    def body(step, _):
        slot = lax.rem(step, np.int32(STAGES))
        pl.when(step < count)(lambda: fetch(step, slot))

        @pl.when(step >= count)
        def _():
            for gone in readers:
                _await(gone, step, slot)

    lax.fori_loop(0, count + STAGES, body, None)


def _await(gone, step, slot):
    """Until those who read the slot STAGES steps ago have gone."""
    pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(gone.at[slot]))


class _Mask:
    """Which scores of a pair of pieces are of visible keys; `by_query`: queries are the rows."""

    def __init__(self, ops, marks: _Marks, row):
        self.ops, self.marks, self.row = ops, marks, row

    def __call__(self, i, j, by_query: bool):
        t, s = self.marks.seg_BIt.shape[2], self.marks.seg_BJs.shape[2]
        shape = (t, s) if by_query else (s, t)

        def spread(ref, piece, axis):
            return _spread(self.ops.load(ref.at[self.row, piece], axis), shape, axis)

        queries, keys = (1, 0) if by_query else (0, 1)
        return mask.visible(
            spread(self.marks.seg_BIt, i, queries), spread(self.marks.pos_BIt, i, queries),
            spread(self.marks.seg_BJs, j, keys), spread(self.marks.pos_BJs, j, keys),
        )  # fmt: skip


class _Drop:
    """Dropout's mask of a pair of pieces, and its use."""

    def __init__(self, ops, hashes, at: _At, rate: float):
        self.ops, self.hashes, self.row, self.rate = ops, hashes, at.row, rate

    def kept(self, marks: _Marks, head, i, j, by_query: bool):
        t, s = marks.seg_BIt.shape[2], marks.seg_BJs.shape[2]
        shape = (t, s) if by_query else (s, t)
        queries, keys = (1, 0) if by_query else (0, 1)
        hash_t = self.ops.load(self.hashes.at[self.row, head, i], queries)
        pos_s = self.ops.load(marks.pos_BJs.at[self.row, j], keys).astype(jnp.uint32)
        return mask.kept(_spread(hash_t, shape, queries), _spread(pos_s, shape, keys), self.rate)

    def __call__(self, x, kept):
        return jnp.where(kept, x * (1 / (1 - self.rate)), 0.0)


def _spread(x, shape, axis: int):
    """A vector that lacks `axis`, as a matrix."""
    return lax.broadcast_in_dim(x, shape, (1 - axis,))
