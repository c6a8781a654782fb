"""Attention over packed rows: causal by position, never across segments.

B batch  T query position  S key position  N heads  K kv heads  G heads per kv head  H head dim

One function for everybody; below it, one differentiation rule for every kernel, and the ring.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from emu3_jax.kernels import cudnn, flash_gpu, flash_tpu, mask, reference
from emu3_jax.kernels.mask import HIDDEN, Dropout, Places
from emu3_jax.mesh import place, shards, spec

RING = "context"  # the mesh axis that rows are cut along
KERNELS = {"reference": reference, "tpu": flash_tpu, "gpu": flash_gpu, "cudnn": cudnn}
CONTEXTS = ("gather", "ring")


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    context: str = "gather",
    kernel: str = "",
    with_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(q k / sqrt(H)) v over the visible keys -> out_BTNH, of the queries' type.

    A key is visible if it has the query's segment and a position not after the query's; segment 0
    is padding, which sees nothing and gets zeros. Each kv head serves N/K neighbouring heads.
    Softmax is in float32. Keys of a cache are cache.attention's.

    Args:
        dropout: rate at which attention probabilities are dropped (Emu3 trains with 0.1). The
            mask is a hash of `key` and of the row, segment, positions and head, so it is the same
            for every kernel, block size and mesh.
        context: what to do where T is sharded: "gather" all keys and values to every device, or
            send them around a "ring". The ring's work is even if rows are laid out by `balanced`.
        kernel: "reference" (plain XLA), "tpu" or "gpu" (Pallas, "gpu" for Hopper in 16 bits; on
            other machines interpreted, slowly) or "cudnn"; "" takes the `usual_kernel` of the
            mesh's devices. That is "tpu" on a TPU; "cudnn" on an NVIDIA GPU where it can: 16
            bits, heads of up to 128, rows of up to 8,192 tokens, without dropout, ring or
            with_lse; else "reference". It is never "gpu": no GPU has run that or "cudnn" yet, so
            there are no figures to choose by. benchmarks/attention_gpu.py makes them.
        with_lse: return (out_BTNH, lse_BTN): also the float32 log of the sum of exponentials,
            about HIDDEN for a query that sees nothing.

    Raises:
        ValueError: dropout without a key, an unknown `context` or `kernel`, or what "cudnn"
            cannot do.
    """
    if dropout and key is None:
        raise ValueError(f"attention dropout {dropout} needs a key")
    if context not in CONTEXTS:
        raise ValueError(f"context {context!r} is none of {', '.join(CONTEXTS)}")
    if kernel and kernel not in KERNELS:
        raise ValueError(f"attention kernel {kernel!r} is none of {', '.join(KERNELS)}")
    (parts,) = shards("T")
    ring = parts if context == "ring" else 1
    asked = dict(dtype=q_BTNH.dtype, head_dim=q_BTNH.shape[3], length=q_BTNH.shape[1],
                 ring=ring > 1, dropout=dropout, with_lse=with_lse)  # fmt: skip
    kernel = kernel or usual_kernel(jax.sharding.get_abstract_mesh().abstract_device, **asked)
    if kernel == "cudnn" and (objection := cudnn.objection(**asked)):
        raise ValueError(objection)
    method = Method(kernel, dropout, ring)
    seed = jax.random.bits(key) if dropout else jnp.uint32(0)
    index_B, index_N = (place(jnp.arange(size, dtype=jnp.uint32), dim)
                        for dim, size in zip("BN", (q_BTNH.shape[0], q_BTNH.shape[2]), strict=True))
    arrays = q_BTNH, k_BTKH, v_BTKH, segments_BT, positions_BT, index_B, index_N, seed
    dims = ("BTNH", "BTKH", "BTKH", "BT", "BT", "B", "N", "")
    placed = [place(array, dim) for array, dim in zip(arrays, dims, strict=True)]
    out_BTNH, lse_BTN = jax.shard_map(
        functools.partial(_local, method, parts > 1 and method.ring == 1),
        in_specs=tuple(map(spec, dims)), out_specs=(spec("BTNH"), spec("BTN")), check_vma=False,
    )(*placed)  # fmt: skip
    return (out_BTNH, lse_BTN) if with_lse else out_BTNH


def usual_kernel(device: jax.sharding.AbstractDevice | None, **asked) -> str:
    """The kernel that `attention` takes on such a device for what cudnn.objection is told."""
    if device is not None and device.platform == "tpu":
        return "tpu"
    nvidia = device is not None and device.device_kind.startswith("NVIDIA")  # AMD's are GPUs, too
    return "cudnn" if nvidia and not cudnn.objection(**asked) else "reference"


def balanced(length: int) -> jax.Array | None:
    """The order of a row's positions in which a ring's devices have equal work; None: as it is.

    Causal attention makes late positions dear. So the row is cut into twice as many chunks as
    there are devices along `context`, and each takes one from the front and one from the back
    (as Llama 3, arXiv 2407.21783, section 3.3.2). Raises ValueError if the row does not split so.
    """
    (parts,) = shards("T")
    if parts == 1:
        return None
    if length % (2 * parts):
        raise ValueError(
            f"rows of {length} positions do not split into a front and a back chunk for each of "
            f"context = {parts} devices; take a multiple of {2 * parts}"
        )
    chunks = jnp.arange(length).reshape(2 * parts, -1)
    front, back = chunks[:parts], chunks[parts:][::-1]
    return jnp.concatenate([front, back], axis=1).reshape(-1)


class Method(NamedTuple):
    """What is fixed when tracing: the kernel, dropout's rate, devices in the ring (1: none)."""

    kernel: str
    rate: float
    ring: int


def _local(method, gathers, q_BTNH, k_BSKH, v_BSKH, seg_BT, pos_BT, b_B, n_N, seed):
    """What one device computes: its rows, its heads, its queries, all keys."""
    seg_BS, pos_BS = seg_BT, pos_BT
    if gathers:
        k_BSKH, v_BSKH, seg_BS, pos_BS = (
            jax.lax.all_gather(x, RING, axis=1, tiled=True)
            for x in (k_BSKH, v_BSKH, seg_BS, pos_BS)
        )
    hash_BTN = mask.query_hash(seed, b_B, seg_BT, pos_BT, n_N) if method.rate else None
    places = Places(seg_BT, pos_BT, seg_BS, pos_BS)
    return _attend(method, q_BTNH, k_BSKH, v_BSKH, places, hash_BTN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(method: Method, q_BTNH, k_BSKH, v_BSKH, places, hash_BTN):
    forward = _ring_forward if method.ring > 1 else _forward
    return forward(method, q_BTNH, k_BSKH, v_BSKH, places, hash_BTN)


def _attend_forward(method, *args):
    # Named, so that a remat policy may keep them: all the kernel needs to go backward.
    out_BTNH, lse_BTN = checkpoint_name(_attend(method, *args), "attention")
    return (out_BTNH, lse_BTN), (*args, out_BTNH, lse_BTN)


def _attend_backward(method, saved, cotangents):
    q_BTNH, k_BSKH, v_BSKH, places, hash_BTN, out_BTNH, lse_BTN = saved
    dout_BTNH, dlse_BTN = cotangents
    # dscore = p * (dp - sum of p dp) and that sum over keys is the one over H of dout * out.
    delta_BTN = jnp.einsum("BTNH,BTNH->BTN", dout_BTNH, out_BTNH,
                           preferred_element_type=jnp.float32) - dlse_BTN  # fmt: skip
    backward = _ring_backward if method.ring > 1 else _backward
    grads = backward(
        method, q_BTNH, k_BSKH, v_BSKH, places, hash_BTN, lse_BTN, delta_BTN, dout_BTNH
    )
    inputs = q_BTNH, k_BSKH, v_BSKH
    return *(dx.astype(x.dtype) for dx, x in zip(grads, inputs, strict=True)), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(method, q_BTNH, k_BSKH, v_BSKH, places, hash_BTN, dtype=None):
    dropout = Dropout(method.rate, hash_BTN)
    return KERNELS[method.kernel].forward(q_BTNH, k_BSKH, v_BSKH, places, dropout, dtype)


def _backward(method, q_BTNH, k_BSKH, v_BSKH, places, hash_BTN, *lse_delta_dout):
    dropout = Dropout(method.rate, hash_BTN)
    return KERNELS[method.kernel].backward(q_BTNH, k_BSKH, v_BSKH, places, dropout, *lse_delta_dout)


class _Keys(NamedTuple):
    """What travels around the ring."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    seg_BS: jax.Array
    pos_BS: jax.Array


def _ring_forward(method, q_BTNH, k_BSKH, v_BSKH, places, hash_BTN):
    """Every device's keys pass by; each adds its part, weighed by its sum of exponentials."""

    def absorb(state, keys):
        def merge():
            at = places._replace(seg_BS=keys.seg_BS, pos_BS=keys.pos_BS)
            out_BTNH, lse_BTN = state
            part_BTNH, part_lse_BTN = _forward(
                method, q_BTNH, keys.k_BSKH, keys.v_BSKH, at, hash_BTN, jnp.float32
            )
            both_BTN = jnp.logaddexp(lse_BTN, part_lse_BTN)
            out_BTNH = out_BTNH * jnp.exp(lse_BTN - both_BTN)[..., None]
            return out_BTNH + part_BTNH * jnp.exp(part_lse_BTN - both_BTN)[..., None], both_BTN

        return jax.lax.cond(_anything(places, keys), merge, lambda: state)

    def step(carry, _):
        state, keys = carry
        following = _pass_on(method, keys)  # on its way while these are worked on
        return (absorb(state, keys), following), None

    lse_BTN = jnp.full(q_BTNH.shape[:3], HIDDEN)
    state = jnp.zeros(q_BTNH.shape, jnp.float32), lse_BTN
    keys = _Keys(k_BSKH, v_BSKH, places.seg_BS, places.pos_BS)
    (state, keys), _ = jax.lax.scan(step, (state, keys), length=method.ring - 1)
    out_BTNH, lse_BTN = absorb(state, keys)
    return out_BTNH.astype(q_BTNH.dtype), lse_BTN


def _ring_backward(
    method, q_BTNH, k_BSKH, v_BSKH, places, hash_BTN, lse_BTN, delta_BTN, dout_BTNH
):
    """Keys go around again; their gradients follow one step behind, so that nothing waits."""

    def step(carry, _):
        dq_BTNH, keys, dkeys = carry
        following, dkeys = _pass_on(method, keys), _pass_on(method, dkeys)

        def gradients():
            at = places._replace(seg_BS=keys.seg_BS, pos_BS=keys.pos_BS)
            return _backward(method, q_BTNH, keys.k_BSKH, keys.v_BSKH, at, hash_BTN,
                             lse_BTN, delta_BTN, dout_BTNH)  # fmt: skip

        def add():
            return jax.tree.map(jnp.add, (dq_BTNH, *dkeys), gradients())

        dq, *dkeys = jax.lax.cond(_anything(places, keys), add, lambda: (dq_BTNH, *dkeys))
        return (dq, following, tuple(dkeys)), None

    keys = _Keys(k_BSKH, v_BSKH, places.seg_BS, places.pos_BS)
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_BTNH, k_BSKH, v_BSKH))
    carry = zeros[0], keys, zeros[1:]
    (dq_BTNH, _, dkeys), _ = jax.lax.scan(step, carry, length=method.ring)
    return dq_BTNH, *_pass_on(method, dkeys)


def _anything(places: Places, keys: _Keys) -> jax.Array:
    """May any of these keys be seen from here, by the halves that `balanced` lays side by side."""
    size = places.seg_BT.shape[1] // (2 if places.seg_BT.shape[1] % 2 == 0 else 1)
    at = places._replace(seg_BS=keys.seg_BS, pos_BS=keys.pos_BS)
    return mask.blocks(at, size, size)[0].any()


def _pass_on(method: Method, arrays):
    """Each device's arrays to the next one of the ring."""
    to = [(i, (i + 1) % method.ring) for i in range(method.ring)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, RING, to), arrays)
