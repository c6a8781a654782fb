"""Attention on one H100 or H200 at Emu3-8B's shape: our kernel beside the others.

    python -m benchmarks.attention_gpu [--quick]

Prints one JSON line. `correct`: every implementation's output and gradients on a packed row of
1,000 tokens, as the largest error over the largest exact value, exact being dense attention in
float64. `rows`: milliseconds (median of 10 or more, after warming up) of forward and of forward
and backward together for dense causal rows and for three packings (benchmarks/packings.py), and
TFLOP/s counted on visible pairs only: what is computed in vain counts as time, not as work.
Implementations: ours are "gpu" (emu3_jax/kernels/flash_gpu.py), "reference" (the same in XLA) and
"cudnn" (kernels/cudnn.py: a mask, whatever the row, and forward again in backward); `usual` says
which of them `attention` takes for the row. The others are "jax.nn" (cuDNN called directly, told
that rows are causal) and "tokamax" where it is installed. cuDNN and tokamax know no segments, so
packed rows go to them as a boolean mask, up to 8,192 tokens. Whatever fails or is left out has an
`error` or a `skipped` in place of its numbers. `--quick` takes the shortest rows. Without such a
GPU: one line, and exit code 2.

T position in a row  S key position  N heads  K kv heads  G heads per kv head  H head dim
"""

import argparse
import contextlib
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.packings import packing
from emu3_jax import mesh
from emu3_jax.attention import KERNELS, attention, usual_kernel
from emu3_jax.kernels import cudnn

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DENSE = (4096, 8192, 32_768, 131_072)
PACKED = (("images", 5120), ("short", 5120), ("short", 131_072), ("long", 131_072))
QUICK = 8192  # tokens, with --quick
REFERENCE = 32_768  # the longest row for the reference; beyond, a round takes many seconds
ROUNDS, ROUND_SECONDS = 10, 0.02
FORWARD_FLOP, BOTH_FLOP = 4, 14  # per visible pair, head and head dim: 2 products, and 5 more


def main() -> None:
    """Prints the JSON line; exits with 2 without a Hopper GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "none")
    if device.platform != "gpu" or not str(capability).startswith("9."):
        print(f"needs a Hopper GPU (compute capability 9.0); this is {device.device_kind}",
              file=sys.stderr)  # fmt: skip
        sys.exit(2)
    rows = [("dense", length) for length in DENSE] + list(PACKED)
    rows = [(name, length) for name, length in rows if not quick or length <= QUICK]
    result = dict(
        benchmark="attention_gpu", device=device.device_kind, jax=jax.__version__,
        heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="bfloat16",
        correct={name: _attempt(_correct, name) for name in IMPLEMENTATIONS},
        rows=[_row(name, length) for name, length in rows],
    )  # fmt: skip
    print(json.dumps(result))


def _ours(kernel: str):
    def attend(q, k, v, seg, pos, dense):
        out = attention(q, k, v, seg, pos, kernel=kernel)
        return mesh.place(out, "....")  # laid out as dout is, on one device in name only

    return attend


def _jax_nn(q, k, v, seg, pos, dense):
    return jax.nn.dot_product_attention(
        q, k, v, mask=_mask(seg, pos, dense), is_causal=True, implementation="cudnn"
    )


def _tokamax(q, k, v, seg, pos, dense):
    import tokamax

    return tokamax.dot_product_attention(q, k, v, mask=_mask(seg, pos, dense), is_causal=dense)


IMPLEMENTATIONS = {
    "gpu": _ours("gpu"), "reference": _ours("reference"), "cudnn": _ours("cudnn"),
    "jax.nn": _jax_nn, "tokamax": _tokamax,
}  # fmt: skip


def _mask(seg_BT, pos_BT, dense: bool):
    """[B, 1, T, S] of visible keys; padding sees itself, lest a softmax over nothing is NaN."""
    if dense:
        return None
    same = seg_BT[:, None, :, None] == seg_BT[:, None, None, :]
    past = pos_BT[:, None, None, :] <= pos_BT[:, None, :, None]
    itself = jnp.eye(seg_BT.shape[1], dtype=bool)
    return (same & past & (seg_BT > 0)[:, None, :, None]) | itself


def _attempt(measure, *args) -> dict:
    try:
        return measure(*args)
    except Exception as error:  # one that fails is a result, and the others go on
        return dict(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _place(name: str):
    """The mesh that our own attention asks for; the others know nothing of explicit axes."""
    if name in KERNELS:
        return jax.set_mesh(mesh.Mesh().make(jax.devices()[:1]))
    return contextlib.nullcontext()


def _inputs(length: int, seed: int = 0):
    """Random (q, k, v, dout) of one row in bfloat16."""
    keys = jax.random.split(jax.random.key(seed), 4)
    heads = HEADS, KV_HEADS, KV_HEADS, HEADS
    return [jax.random.normal(key, (1, length, n, HEAD_DIM), jnp.bfloat16)
            for key, n in zip(keys, heads, strict=True)]  # fmt: skip


def _both(attend):
    def both(q, k, v, dout, seg, pos):
        out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, seg, pos), q, k, v)
        return out, *pullback(dout)

    return both


def _correct(name: str) -> dict:
    """Errors of the output and of the gradients, relative to the largest exact value."""
    segments_T, positions_T = packing("short", 1000 + 1100)
    # Documents of 389, 1 and 550 tokens and a padding of 60: no multiple of any block.
    segments_T, positions_T = (x[:1000].copy() for x in (segments_T, positions_T))
    for segment, (first, last) in enumerate(((0, 389), (389, 390), (390, 940), (940, 1000)), 1):
        segments_T[first:last] = segment % 4
        positions_T[first:last] = np.arange(last - first)
    with _place(name):
        q, k, v, dout = _inputs(len(segments_T))
        seg, pos = (jnp.asarray(x)[None] for x in (segments_T, positions_T))
        dout = jnp.where(seg[..., None, None] > 0, dout, 0)  # what padding gives is nobody's
        both = _both(lambda *args: IMPLEMENTATIONS[name](*args, False))
        got = jax.jit(both)(q, k, v, dout, seg, pos)
        got = [np.asarray(x[0].astype(jnp.float32), np.float64) for x in got]
        arrays = [np.asarray(x[0].astype(jnp.float32), np.float64) for x in (q, k, v, dout)]
    exact = _exact(*arrays, segments_T, positions_T)
    got[0] = np.where(segments_T[:, None, None] > 0, got[0], 0)
    return {which: float(f"{np.abs(x - y).max() / np.abs(y).max():.3g}")
            for which, x, y in zip(("out", "dq", "dk", "dv"), got, exact, strict=True)}  # fmt: skip


def _exact(q_TNH, k_SKH, v_SKH, dout_TNH, seg_T, pos_T):
    """Dense attention and its gradients in float64."""
    scale = q_TNH.shape[-1] ** -0.5
    seen_TS = (seg_T[:, None] == seg_T) & (pos_T <= pos_T[:, None]) & (seg_T > 0)[:, None]
    out, dq = np.zeros_like(q_TNH), np.zeros_like(q_TNH)
    dk, dv = np.zeros_like(k_SKH), np.zeros_like(v_SKH)
    groups = q_TNH.shape[1] // k_SKH.shape[1]
    for n in range(q_TNH.shape[1]):
        q_TH, k_SH, v_SH, dout_TH = (
            q_TNH[:, n], k_SKH[:, n // groups], v_SKH[:, n // groups], dout_TNH[:, n]
        )  # fmt: skip
        score_TS = np.where(seen_TS, q_TH @ k_SH.T * scale, -np.inf)
        peak_T1 = np.maximum(score_TS.max(1, keepdims=True), -1e30)
        p_TS = np.exp(score_TS - peak_T1)
        p_TS /= np.maximum(p_TS.sum(1, keepdims=True), 1e-300)
        out[:, n] = p_TS @ v_SH
        dp_TS = dout_TH @ v_SH.T
        dscore_TS = p_TS * (dp_TS - (p_TS * dp_TS).sum(1, keepdims=True)) * scale
        dq[:, n] = dscore_TS @ k_SH
        dk[:, n // groups] += dscore_TS.T @ q_TH
        dv[:, n // groups] += p_TS.T @ dout_TH
    return out, dq, dk, dv


def _row(name: str, length: int) -> dict:
    """All implementations on one row."""
    dense = name == "dense"
    segments_T, positions_T = np.ones(length, np.int32), np.arange(length, dtype=np.int32)
    if not dense:
        segments_T, positions_T = packing(name, length)
    lengths = np.bincount(segments_T)[1:].astype(np.int64)
    pairs = int((lengths * (lengths + 1) // 2).sum())
    figures = dict(row=name, length=length, documents=len(lengths), visible_pairs=pairs)
    figures["usual"] = usual_kernel(
        jax.devices()[0], dtype=jnp.bfloat16, head_dim=HEAD_DIM, length=length,
        ring=False, dropout=0.0, with_lse=False,
    )  # fmt: skip
    for which in IMPLEMENTATIONS:
        if reason := _reason_to_skip(which, length, dense):
            figures[which] = dict(skipped=reason)
        else:
            figures[which] = _attempt(_times, which, segments_T, positions_T, dense, pairs)
    return figures


def _reason_to_skip(which: str, length: int, dense: bool) -> str:
    if which == "reference" and length > REFERENCE:
        return f"rows above {REFERENCE} take the reference too long"
    masked = which == "cudnn" or which in ("jax.nn", "tokamax") and not dense
    if masked and length > cudnn.LONGEST:
        return f"no boolean mask above {cudnn.LONGEST}: {length**2 / 1e9:.1f} GB"
    return ""


def _times(name: str, segments_T, positions_T, dense: bool, pairs: int) -> dict:
    """Milliseconds and TFLOP/s; a backward that fails leaves the forward's numbers."""
    with _place(name):
        q, k, v, dout = _inputs(len(segments_T))
        seg, pos = (jnp.asarray(x)[None] for x in (segments_T, positions_T))

        def attend(q, k, v, seg, pos):
            return IMPLEMENTATIONS[name](q, k, v, seg, pos, dense)

        def measure(function, flop, *args):
            ms = _median_ms(jax.jit(function), *args)
            return dict(ms=round(ms, 4),
                        tflops=round(flop * pairs * HEADS * HEAD_DIM / ms / 1e9, 1))  # fmt: skip

        return dict(
            forward=_attempt(measure, attend, FORWARD_FLOP, q, k, v, seg, pos),
            both=_attempt(measure, _both(attend), BOTH_FLOP, q, k, v, dout, seg, pos),
        )


def _median_ms(function, *args) -> float:
    """Of ROUNDS rounds; a short call is repeated within a round, so that launching it is hidden."""

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*args)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls

    seconds(2)  # compiles, and warms up
    calls = max(1, int(ROUND_SECONDS / seconds(1)))
    return 1e3 * float(np.median([seconds(calls) for _ in range(ROUNDS)]))


if __name__ == "__main__":
    main()
