"""cuDNN's attention, by way of jax.nn.dot_product_attention: the usual choice on a GPU.

B batch  T query position  S key position  N heads  K kv heads  H head dim

The public interface knows no segments. So what is visible goes in as a boolean mask, which JAX
makes a bias of 16 bits; cuDNN reads it whole and computes all of T by S, future and other
documents too. Nor does the interface take a saved log-sum-exp back: the backward pass computes
the forward's again (4 products' worth of FLOPs to 10), but keeps no mask between the two.

Not yet run on a GPU. JAX's own tests leave cuDNN's attention out on CUDA 13.0, where it finds no
execution plan (jax-ml/jax#32430); `kernel="reference"` does without.
"""

import jax
import jax.numpy as jnp

from emu3_jax.kernels import mask
from emu3_jax.kernels.mask import HIDDEN, Dropout, Places

IMPLEMENTATION = "cudnn"  # "xla" takes the same arguments on any device
DTYPES = (jnp.bfloat16, jnp.float16)
# Of what the backward pass has on every GPU from Ampere on (docs.nvidia.com/cudnn, Attention,
# support matrix of 9.18); Hopper has 256.
LARGEST_HEAD = 128
HEAD_MULTIPLE = 8
# Tokens in a row: a bias of 134 MB for each row of a device, and in JAX before 0.11.1 as much again
# for its gradient, which nobody asks for (jax-ml/jax#34685).
LONGEST = 8192
# T and S are padded to multiples of this: an odd one is refused, and backward with a mask gives
# NaN where S leaves 64 over (pytorch/pytorch#196678).
TILE = 128


def objection(
    dtype, head_dim: int, length: int, ring: bool, dropout: float, with_lse: bool
) -> str:
    """Why cuDNN cannot do this for `attention`, as an error says it; "" if it can.

    `ring`: keys and values are sent around; `length` is of a whole row.
    """
    names = " or ".join(jnp.dtype(x).name for x in DTYPES)
    faults = {
        f"takes {names}, not {jnp.dtype(dtype).name}": jnp.dtype(dtype) not in DTYPES,
        f"has heads of multiples of {HEAD_MULTIPLE} up to {LARGEST_HEAD}, not of {head_dim}":
            head_dim > LARGEST_HEAD or head_dim % HEAD_MULTIPLE,
        f"has a mask for rows of up to {LONGEST} tokens, not {length}": length > LONGEST,
        "gives no log-sum-exp of 32 bits, which a ring and with_lse need": ring or with_lse,
        f"has no dropout by our hash, asked for at {dropout}": dropout,
    }  # fmt: skip
    return next((f"cuDNN's attention {fault}; take another kernel"
                 for fault, applies in faults.items() if applies), "")  # fmt: skip


def forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, places: Places, dropout: Dropout,
    dtype=None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(out_BTNH in `dtype` or the queries' own, float32 lse_BTN); as reference.forward.

    But lse_BTN is rounded to the queries' type on its way through jax.nn: good for looking at,
    not for computing with. `dropout` is of rate 0.
    """
    out_BTNH, lse_BTN = _attend(q_BTNH, k_BSKH, v_BSKH, places)
    return out_BTNH.astype(dtype or q_BTNH.dtype), lse_BTN


def backward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, places: Places, dropout: Dropout,
    lse_BTN: jax.Array, delta_BTN: jax.Array, dout_BTNH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """(dq_BTNH, dk_BSKH, dv_BSKH) of the inputs' types, from the cotangent dout_BTNH alone.

    cuDNN makes its own lse_BTN and delta_BTN; those given are not looked at.
    """

    def attend(*qkv):
        return _attend(*qkv, places)[0]

    return jax.vjp(attend, q_BTNH, k_BSKH, v_BSKH)[1](dout_BTNH)


def _attend(q_BTNH, k_BSKH, v_BSKH, places: Places):
    T, S = (-(-x.shape[1] // TILE) * TILE for x in (q_BTNH, k_BSKH))
    places = places.padded(T, S)
    see_BTS = mask.visible(places.seg_BT[..., None], places.pos_BT[..., None],
                           places.seg_BS[:, None], places.pos_BS[:, None])  # fmt: skip
    padding_BT = places.seg_BT == 0
    # A softmax over nothing may be NaN. So padding sees everything, and what it gets is dropped:
    # its cotangents, then, are zeros, and the keys' gradients have nothing of it.
    see_BTS |= padding_BT[..., None]
    q, k, v = (jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0), (0, 0)))
               for x, size in ((q_BTNH, T), (k_BSKH, S), (v_BSKH, S)))  # fmt: skip
    out, lse = jax.nn.dot_product_attention(
        q, k, v, mask=see_BTS[:, None], implementation=IMPLEMENTATION, return_residual=True
    )
    out = jnp.where(padding_BT[..., None, None], 0, out)
    lse = jnp.where(padding_BT[..., None], HIDDEN, lse.astype(jnp.float32))
    return out[:, : q_BTNH.shape[1]], lse[:, : q_BTNH.shape[1]]
