"""Flash attention for TPU in Pallas: only the blocks in which something is seen are loaded.

B batch  T query position  S key position  N heads  K kv heads  G heads per kv head  H head dim
I query blocks of t positions  J key blocks of s positions  P visited pairs of blocks

The grid is not blocks by blocks but kv heads by visited pairs: a list made from segments and
positions, read ahead of the pipeline, whose length is known only at run time. So a packed row
costs what its documents cost, and a hidden block costs nothing at all.

Scores are held keys by queries, [s, t]: a query's maximum and sum are then rows of lanes, reduced
over sublanes, and need neither lane reductions nor lane broadcasts. All heads of one kv head are
done in one step, so keys are loaded and the mask is made once for G heads.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from emu3_jax.kernels import mask
from emu3_jax.kernels.mask import FIRST, HIDDEN, LAST, MASKED, NOTHING, SEEN, Dropout, Places

LANES = 128
VMEM_LIMIT = 64 * 2**20  # bytes; XLA's usual 16 or 32 MiB do not hold two sets of these blocks
# Device kind -> (queries, keys) of a block, forward and backward: benchmarks/attention_tpu.py.
BLOCKS = {
    "TPU v5 lite": ((512, 1024), (512, 512)),
    "TPU v5": ((512, 1024), (512, 512)),
    "TPU v6 lite": ((512, 1024), (512, 512)),
}
OTHER = ((512, 512), (512, 512))


def forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, places: Places, dropout: Dropout,
    dtype=None, block: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(out_BTNH in `dtype` or the queries' own, float32 lse_BTN); as reference.forward.

    `block` is (queries, keys) of a block, multiples of 128; by default BLOCKS says.
    """
    x = _Arranged.of(q_BTNH, k_BSKH, v_BSKH, places, dropout, block or _usual_blocks()[0])
    at = _Specs.of(x, by_key=False)
    B, K, G, T, H = x.q_BKGTH.shape
    out_BKGTH, lse_BKGT = _call(
        "attention_forward", functools.partial(_forward_kernel, rate=dropout.rate),
        x.pairs(by_key=False), K,
        inputs=[(x.q_BKGTH, at.heads), *x.rest(at)],
        outputs=[(jax.ShapeDtypeStruct((B, K, G, T, H), dtype or q_BTNH.dtype), at.heads),
                 (jax.ShapeDtypeStruct((B, K, G, T), jnp.float32), at.rows)],
        scratch=[pltpu.VMEM((G, H, x.t), jnp.float32), *[pltpu.VMEM((G, x.t), jnp.float32)] * 2],
    )  # fmt: skip
    return x.ungrouped(out_BKGTH, q_BTNH.shape[1]), x.ungrouped(lse_BKGT, q_BTNH.shape[1])


def backward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, places: Places, dropout: Dropout,
    lse_BTN: jax.Array, delta_BTN: jax.Array, dout_BTNH: jax.Array,
    block: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """float32 (dq_BTNH, dk_BSKH, dv_BSKH); as reference.backward.

    One pass makes all three: dk and dv stay in fast memory while a block of keys is at work, dq
    is read, added to and written back in the shadow of the products.
    """
    x = _Arranged.of(q_BTNH, k_BSKH, v_BSKH, places, dropout, block or _usual_blocks()[1])
    at = _Specs.of(x, by_key=True)
    B, K, G, T, H = x.q_BKGTH.shape
    lse_BTN = jnp.where(lse_BTN > NOTHING, lse_BTN, 0)  # makes probabilities of 0, not of 1
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    dq = jax.ShapeDtypeStruct((B, K, T // x.t, G, H, x.t), jnp.float32)
    dk = jax.ShapeDtypeStruct(x.k_BKSH.shape, jnp.float32)
    dq_BKIGHt, dk_BKSH, dv_BKSH = _call(
        "attention_backward", functools.partial(_backward_kernel, rate=dropout.rate),
        x.pairs(by_key=True), K,
        inputs=[(jnp.zeros(dq.shape), anywhere), (x.q_BKGTH, at.heads),
                (x.grouped(dout_BTNH), at.heads), (x.grouped(lse_BTN), at.rows),
                (x.grouped(delta_BTN), at.rows), *x.rest(at)],
        outputs=[(dq, anywhere), (dk, at.keys), (dk, at.keys)],
        scratch=[*[pltpu.VMEM((x.s, H), jnp.float32)] * 2, pltpu.VMEM((2, G, H, x.t), jnp.float32),
                 pltpu.SMEM((4,), jnp.int32), pltpu.SemaphoreType.DMA((2, 2))],
        aliases={2: 0},  # the zeros, behind the two lists, become dq
    )  # fmt: skip
    dq_BKGTH = dq_BKIGHt.transpose(0, 1, 3, 2, 5, 4).reshape(x.q_BKGTH.shape)
    dk_BSKH, dv_BSKH = (x[:, :, : k_BSKH.shape[1]].swapaxes(1, 2) for x in (dk_BKSH, dv_BKSH))
    return x.ungrouped(dq_BKGTH, q_BTNH.shape[1]), dk_BSKH, dv_BSKH


class _Arranged(NamedTuple):
    """The inputs with heads in front and padding behind."""

    q_BKGTH: jax.Array
    k_BKSH: jax.Array
    v_BKSH: jax.Array
    hash_BKGT: jax.Array | None
    places: Places
    t: int
    s: int

    @classmethod
    def of(cls, q_BTNH, k_BSKH, v_BSKH, places, dropout, block) -> "_Arranged":
        T, S = q_BTNH.shape[1], k_BSKH.shape[1]
        t, s = (min(size, -(-length // LANES) * LANES)
                for size, length in zip(block, (T, S), strict=True))  # fmt: skip
        padded_T, padded_S = -(-T // t) * t, -(-S // s) * s
        k_BKSH, v_BKSH = (
            jnp.pad(x, ((0, 0), (0, padded_S - S), (0, 0), (0, 0))).swapaxes(1, 2)
            for x in (k_BSKH, v_BSKH)
        )
        x = cls(None, k_BKSH, v_BKSH, None, places.padded(padded_T, padded_S), t, s)
        hash_BTN = dropout.hash_BTN
        hash_BKGT = None if hash_BTN is None else x.grouped(hash_BTN)
        return x._replace(q_BKGTH=x.grouped(q_BTNH), hash_BKGT=hash_BKGT)

    def grouped(self, x_BTN: jax.Array) -> jax.Array:
        """[B, T, N, ...] -> [B, K, G, T, ...], padded."""
        B, T, N, *H = x_BTN.shape
        K, padding = self.k_BKSH.shape[1], self.places.seg_BT.shape[1] - T
        x_BTN = jnp.pad(x_BTN, ((0, 0), (0, padding), *((0, 0),) * (x_BTN.ndim - 2)))
        return jnp.moveaxis(x_BTN.reshape(B, T + padding, K, N // K, *H), 1, 3)

    def ungrouped(self, x_BKGT: jax.Array, length: int) -> jax.Array:
        """[B, K, G, T, ...] -> [B, T, N, ...], the padding cut off."""
        B, K, G, _, *H = x_BKGT.shape
        return jnp.moveaxis(x_BKGT[:, :, :, :length], 3, 1).reshape(B, length, K * G, *H)

    def rest(self, at: "_Specs") -> list[tuple]:
        """Keys, values, places and dropout's hash, each with its blocks."""
        t_B2T = jnp.stack([self.places.seg_BT, self.places.pos_BT], axis=1)
        s_BS2 = jnp.stack([self.places.seg_BS, self.places.pos_BS], axis=2)
        hashes = [] if self.hash_BKGT is None else [(self.hash_BKGT, at.rows)]
        return [(self.k_BKSH, at.keys), (self.v_BKSH, at.keys), (t_B2T, at.t), (s_BS2, at.s),
                *hashes]  # fmt: skip

    def pairs(self, by_key: bool) -> mask.Pairs:
        visible_BIJ, whole_BIJ = mask.blocks(self.places, self.t, self.s)
        if by_key:
            visible_BIJ, whole_BIJ = visible_BIJ.swapaxes(1, 2), whole_BIJ.swapaxes(1, 2)
        return mask.pairs(visible_BIJ, whole_BIJ)


class _Specs(NamedTuple):
    """Which block of what is at work in a step, read off the list of pairs."""

    heads: pl.BlockSpec
    rows: pl.BlockSpec
    keys: pl.BlockSpec
    t: pl.BlockSpec
    s: pl.BlockSpec

    @classmethod
    def of(cls, x: _Arranged, by_key: bool) -> "_Specs":
        G, H = x.q_BKGTH.shape[2], x.q_BKGTH.shape[4]

        def spec(shape, index, of_queries):
            def block(k, p, at_P, row_P):
                number = at_P[p] & 0xFFFF if of_queries == by_key else at_P[p] >> 16
                return index(row_P[p] >> mask.FLAGS, k, number)

            return pl.BlockSpec(shape, block)

        return cls(
            heads=spec((1, 1, G, x.t, H), lambda b, k, i: (b, k, 0, i, 0), True),
            rows=spec((1, 1, G, x.t), lambda b, k, i: (b, k, 0, i), True),
            keys=spec((1, 1, x.s, H), lambda b, k, j: (b, k, j, 0), False),
            t=spec((1, 2, x.t), lambda b, k, i: (b, 0, i), True),
            s=spec((1, x.s, 2), lambda b, k, j: (b, j, 0), False),
        )


def _call(name, kernel, pairs: mask.Pairs, K: int, inputs, outputs, scratch, aliases=None):
    """Runs `kernel` for every kv head and pair; inputs and outputs come with their blocks."""
    arrays, in_specs = zip(*inputs, strict=True)
    shapes, out_specs = zip(*outputs, strict=True)
    device = jax.sharding.get_abstract_mesh().abstract_device
    return pl.pallas_call(
        kernel, name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(K, pairs.count), in_specs=in_specs, out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=shapes,
        input_output_aliases=aliases or {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=device is None or device.platform != "tpu",
    )(pairs.at_P, pairs.row_P, *arrays)  # fmt: skip


def _usual_blocks():
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = "" if device is None else device.device_kind
    return BLOCKS[kind] if kind in BLOCKS else OTHER


def _forward_kernel(at_P, row_P, q, k, v, at_t, at_s, *refs, rate: float):
    """One pair of blocks: scratch holds the running output [G, H, t], sum and maximum [G, t]."""
    (hashes, *refs) = refs if rate else (None, *refs)
    out, lse, out_GHt, total_Gt, peak_Gt = refs
    flags = row_P[pl.program_id(1)]

    @pl.when(flags & FIRST != 0)
    def _():
        out_GHt[...] = jnp.zeros_like(out_GHt)
        total_Gt[...] = jnp.zeros_like(total_Gt)
        peak_Gt[...] = jnp.full_like(peak_Gt, HIDDEN)

    def absorb(masked: bool):
        k_sH, v_sH = k[0, 0], v[0, 0]
        seen_st = _seen(at_t, at_s) if masked else None
        for g in range(len(peak_Gt)):
            score_st = _scores(k_sH, q[0, 0, g], seen_st)
            peak_1t, total_1t = peak_Gt[g : g + 1], total_Gt[g : g + 1]
            new_1t = jnp.maximum(peak_1t, score_st.max(0, keepdims=True))
            exp_st = jnp.exp(score_st - new_1t)
            shrink_1t = jnp.exp(peak_1t - new_1t)
            total_Gt[g : g + 1] = total_1t * shrink_1t + exp_st.sum(0, keepdims=True)
            peak_Gt[g : g + 1] = new_1t
            exp_st = _dropped(exp_st, hashes, g, at_s, rate)
            more_Ht = _dot(v_sH, exp_st.astype(v_sH.dtype), 0, 0)
            out_GHt[g] = out_GHt[g] * shrink_1t + more_Ht

    _when_seen(flags, absorb)

    @pl.when(flags & LAST != 0)
    def _():
        for g in range(len(peak_Gt)):
            peak_1t, total_1t = peak_Gt[g : g + 1], total_Gt[g : g + 1]
            seen_1t = peak_1t > NOTHING
            total_1t = jnp.where(seen_1t, total_1t, 1.0)
            out_Ht = jnp.where(seen_1t, out_GHt[g] / total_1t, 0.0)
            out[0, 0, g] = out_Ht.T.astype(out.dtype)
            lse[0, 0, g : g + 1] = jnp.where(seen_1t, peak_1t + jnp.log(total_1t), HIDDEN)


def _backward_kernel(
    at_P, row_P, _, q, dout, lse, delta, k, v, at_t, at_s, *refs, rate: float
):
    """One pair of blocks: scratch holds dk and dv [s, H], and two slots for dq [G, H, t]."""
    (hashes, *refs) = refs if rate else (None, *refs)
    dq, dk, dv, dk_sH, dv_sH, slots, state, semaphores = refs
    kv_head, p = pl.program_id(0), pl.program_id(1)
    flags = row_P[p]
    sums = _Sums(dq, slots, state, semaphores)

    @pl.when(p == 0)
    def _():
        sums.begin()

    @pl.when(flags & FIRST != 0)
    def _():
        dk_sH[...] = jnp.zeros_like(dk_sH)
        dv_sH[...] = jnp.zeros_like(dv_sH)

    @pl.when(flags & SEEN != 0)
    def _():
        sums.fetch(row_P[p] >> mask.FLAGS, kv_head, at_P[p] & 0xFFFF)

    def absorb(masked: bool):
        k_sH, v_sH = k[0, 0], v[0, 0]
        scale = k_sH.shape[-1] ** -0.5
        seen_st = _seen(at_t, at_s) if masked else None
        for g in range(q.shape[2]):
            q_tH, dout_tH = q[0, 0, g], dout[0, 0, g]
            p_st = jnp.exp(_scores(k_sH, q_tH, seen_st) - lse[0, 0, g : g + 1])
            dp_st = _dropped(_dot(v_sH, dout_tH, 1, 1), hashes, g, at_s, rate)
            dscore_st = p_st * (dp_st - delta[0, 0, g : g + 1]) * scale
            dscore_st = dscore_st.astype(q_tH.dtype)
            p_st = _dropped(p_st, hashes, g, at_s, rate).astype(dout_tH.dtype)
            dv_sH[...] += _dot(p_st, dout_tH, 1, 0)
            dk_sH[...] += _dot(dscore_st, q_tH, 1, 0)
            dq_Ht = _dot(k_sH, dscore_st, 0, 0)
            if g == 0:
                sums.wait()
            sums.add(g, dq_Ht)

    _when_seen(flags, absorb)

    @pl.when(flags & SEEN != 0)
    def _():
        sums.send(row_P[p] >> mask.FLAGS, kv_head, at_P[p] & 0xFFFF)

    @pl.when(flags & LAST != 0)
    def _():
        dk[0, 0] = dk_sH[...]
        dv[0, 0] = dv_sH[...]

    @pl.when(p == pl.num_programs(1) - 1)
    def _():
        sums.end()


class _Sums:
    """dq in slow memory, added to a block at a time through two slots.

    A slot is read into when its last write has landed; the same block as one step ago is read
    when that step's write has landed. All other waiting is hidden behind products.
    """

    COUNT, LAST, PENDING = 0, 1, 2  # in `state`: blocks so far, the last one, one flag a slot

    def __init__(self, dq, slots, state, semaphores):
        self.dq, self.slots, self.state, self.semaphores = dq, slots, state, semaphores

    def begin(self):
        for i in range(4):
            self.state[i] = 0

    def fetch(self, b, k, i):
        """Starts to read the block."""
        slot = self._slot()
        name = 1 + b * self.dq.shape[2] + i
        self._settle(slot)

        @pl.when(self.state[self.LAST] == name)
        def _():
            self._settle(1 - slot)

        self.state[self.LAST] = name
        self._copy(slot, b, k, i, out=False).start()

    def wait(self):
        """Until the block has been read."""
        self._copy(self._slot(), 0, 0, 0, out=False).wait()

    def add(self, g, dq_Ht):
        slot = self._slot()
        self.slots[slot, g] = self.slots[slot, g] + dq_Ht

    def send(self, b, k, i):
        """Starts to write the block."""
        slot = self._slot()
        self._copy(slot, b, k, i, out=True).start()
        self.state[self.PENDING + slot] = 1
        self.state[self.COUNT] = self.state[self.COUNT] + 1

    def end(self):
        """Until all is written."""
        self._settle(0)
        self._settle(1)

    def _slot(self):
        return self.state[self.COUNT] & 1

    def _settle(self, slot):
        @pl.when(self.state[self.PENDING + slot] == 1)
        def _():
            self._copy(slot, 0, 0, 0, out=True).wait()
            self.state[self.PENDING + slot] = 0

    def _copy(self, slot, b, k, i, out: bool):
        there, here = self.dq.at[b, k, i], self.slots.at[slot]
        pair = (here, there) if out else (there, here)
        return pltpu.make_async_copy(*pair, self.semaphores.at[int(out), slot])


def _when_seen(flags, absorb):
    """absorb(masked), without the mask where all is seen, not at all where nothing is."""
    seen = flags & (SEEN | MASKED)
    pl.when(seen == SEEN | MASKED)(lambda: absorb(True))
    pl.when(seen == SEEN)(lambda: absorb(False))


def _seen(at_t, at_s):
    return mask.visible(at_t[0, 0:1], at_t[0, 1:2], at_s[0, :, 0:1], at_s[0, :, 1:2])


def _scores(k_sH, q_tH, seen_st):
    score_st = _dot(k_sH, q_tH, 1, 1) * k_sH.shape[-1] ** -0.5
    return score_st if seen_st is None else jnp.where(seen_st, score_st, HIDDEN)


def _dropped(x_st, hashes, g, at_s, rate):
    if not rate:
        return x_st
    keep_st = mask.kept(hashes[0, 0, g : g + 1], at_s[0, :, 1:2].astype(jnp.uint32), rate)
    return jnp.where(keep_st, x_st / (1 - rate), 0.0)


def _dot(a, b, axis_a: int, axis_b: int):
    """Product over these axes, summed in float32; float32 inputs are not rounded first."""
    full = a.dtype == jnp.float32  # said either way: a global default does not suit 16 bits
    precision = jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), precision=precision,
                               preferred_element_type=jnp.float32)  # fmt: skip
