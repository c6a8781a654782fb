"""Keys and values of the tokens that a decoder has read, and attention to them.

B batch  T query position  S slot  N heads  K kv heads  G heads per kv head  H head dim
s slots of one block

A slot has room for one token of every row, and all rows are written at one index; where a row has
no token, its segment is 0 and nobody sees the slot. Only blocks with something in them are read.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from emu3_jax.kernels import mask
from emu3_jax.mesh import place, spec

BLOCK = dict(cpu=256)  # slots that are read at once: on CPU what fits its caches
USUAL_BLOCK = 2048
DIMS = dict(k="BKSH", v="BKSH", k_scale="BKS", v_scale="BKS")  # as products take them


class Cache(NamedTuple):
    """`layers` of arrays k_BKSH and v_BKSH; in int8 each with the factor of a token and head.

    `length` slots are written; those of `segments_BS` and `positions_BS` say whom they hold.
    """

    layers: tuple[dict[str, jax.Array], ...]
    segments_BS: jax.Array
    positions_BS: jax.Array
    length: jax.Array

    def behind(self, segments_BT, positions_BT) -> "Cache":
        """The cache with places for more tokens, whose keys and values come by layers."""
        return self._replace(
            segments_BS=_write(self.segments_BS, segments_BT, self.length, "BS"),
            positions_BS=_write(self.positions_BS, positions_BT, self.length, "BS"),
            length=self.length + segments_BT.shape[1],
        )


def empty(layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype) -> Cache:
    """A cache of at least so many slots; `dtype` int8 takes half of bfloat16's memory."""
    block = _block()
    slots = slots if slots <= block else -(-slots // block) * block
    sizes = dict(B=batch, S=slots, K=kv_heads, H=head_dim)

    def zeros(dims, dtype):
        shape = [sizes[dim] for dim in dims]
        return jnp.zeros(shape, dtype, out_sharding=spec(dims))

    names = {"k": dtype, "v": dtype}
    if jnp.dtype(dtype) == jnp.int8:
        names |= {"k_scale": jnp.float32, "v_scale": jnp.float32}
    return Cache(
        layers=tuple({n: zeros(DIMS[n], kind) for n, kind in names.items()} for _ in range(layers)),
        segments_BS=zeros("BS", jnp.int32), positions_BS=zeros("BS", jnp.int32),
        length=jnp.int32(0),
    )  # fmt: skip


def written(layer: dict, k_BTKH, v_BTKH, index) -> dict:
    """A layer's arrays with new keys and values from slot `index` on."""
    new = dict(k=k_BTKH.swapaxes(1, 2), v=v_BTKH.swapaxes(1, 2))
    if "k_scale" in layer:
        new = {name: array for kind in new for name, array in _quantized(kind, new[kind]).items()}
    return {name: _write(layer[name], new[name], index, DIMS[name]) for name in layer}


def attention(q_BTNH, layer: dict, segments_BT, positions_BT, cache: Cache) -> jax.Array:
    """softmax(q k / sqrt(H)) v over what the queries see of a cache that holds their own keys.

    As attention.attention otherwise, for a few queries a row. Heads and rows may be sharded; T may
    not.
    """
    places = segments_BT, positions_BT, cache.segments_BS, cache.positions_BS
    layer_specs = {name: spec(DIMS[name]) for name in layer}
    return jax.shard_map(
        _local, in_specs=(spec("BTNH"), layer_specs, *map(spec, ("BT", "BT", "BS", "BS", ""))),
        out_specs=spec("BTNH"), check_vma=False,
    )(q_BTNH, layer, *places, cache.length)  # fmt: skip


def _local(q_BTNH, layer, seg_BT, pos_BT, seg_BS, pos_BS, length):
    """One device's rows and heads: a running softmax over blocks of slots."""
    B, T, N, H = q_BTNH.shape
    K, S = layer["k"].shape[1:3]
    block = min(_block(), S)
    q_BTKGH = q_BTNH.reshape(B, T, K, -1, H)

    def at(x, j, axis):
        return jax.lax.dynamic_slice_in_dim(x, j * block, block, axis)

    def absorb(j, state):
        out_BKTGH, total_BKTG, peak_BKTG = state
        near = {name: at(x, j, 2) for name, x in layer.items()}
        score_BKTGs = jnp.einsum("BTKGH,BKsH->BKTGs", q_BTKGH, near["k"].astype(q_BTNH.dtype),
                                 preferred_element_type=jnp.float32)  # fmt: skip
        score_BKTGs *= _scale(near, "k") * H**-0.5
        seen_BTs = mask.visible(seg_BT[..., None], pos_BT[..., None], at(seg_BS, j, 1)[:, None],
                                at(pos_BS, j, 1)[:, None])  # fmt: skip
        score_BKTGs += jnp.where(seen_BTs, 0.0, mask.HIDDEN)[:, None, :, None]
        new_BKTG = jnp.maximum(peak_BKTG, score_BKTGs.max(-1))
        exp_BKTGs = jnp.exp(score_BKTGs - new_BKTG[..., None])
        shrink_BKTG = jnp.exp(peak_BKTG - new_BKTG)
        more_BKTGH = jnp.einsum(
            "BKTGs,BKsH->BKTGH", (exp_BKTGs * _scale(near, "v")).astype(q_BTNH.dtype),
            near["v"].astype(q_BTNH.dtype), preferred_element_type=jnp.float32,
        )  # fmt: skip
        total_BKTG = total_BKTG * shrink_BKTG + exp_BKTGs.sum(-1)
        return out_BKTGH * shrink_BKTG[..., None] + more_BKTGH, total_BKTG, new_BKTG

    shape = (B, K, T, N // K)
    start = jnp.zeros((*shape, H)), jnp.zeros(shape), jnp.full(shape, mask.HIDDEN)
    out_BKTGH, total_BKTG, peak_BKTG = jax.lax.fori_loop(0, -(-length // block), absorb, start)
    seen_BKTG = peak_BKTG > mask.NOTHING
    out_BKTGH *= jnp.where(seen_BKTG, 1 / jnp.where(seen_BKTG, total_BKTG, 1), 0)[..., None]
    return out_BKTGH.swapaxes(1, 2).reshape(B, T, N, H).astype(q_BTNH.dtype)


def _block() -> int:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return BLOCK.get(device.platform if device else "cpu", USUAL_BLOCK)


def _quantized(name: str, x_BKTH) -> dict:
    """In int8: the largest of a token's and head's numbers is 127."""
    x_BKTH = x_BKTH.astype(jnp.float32)
    scale_BKT = jnp.maximum(jnp.abs(x_BKTH).max(-1), 1e-8) / 127
    return {name: jnp.round(x_BKTH / scale_BKT[..., None]).astype(jnp.int8),
            f"{name}_scale": scale_BKT}  # fmt: skip


def _scale(near: dict, name: str):
    """What a block's scores or probabilities are to be multiplied with, [B, K, 1, 1, s], or 1."""
    if f"{name}_scale" not in near:
        return 1.0
    return near[f"{name}_scale"][:, :, None, None]


def _write(store, new, index, dims):
    """`store` with `new` written at `index` of its slots."""
    return jax.lax.dynamic_update_slice_in_dim(
        store, place(new.astype(store.dtype), dims), index, axis=dims.index("S")
    )
