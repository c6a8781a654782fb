"""cuDNN's attention without a GPU: when it is chosen, what it is given, that it lowers for CUDA.

What surrounds it is held to dense float64 in test_attention.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice

from emu3_jax import mesh
from emu3_jax.attention import attention, usual_kernel
from emu3_jax.kernels import cudnn, mask

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
MI300 = AbstractDevice(device_kind="AMD Instinct MI300X", num_cores=None, platform="gpu")
TPU = AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
CPU = AbstractDevice(device_kind="cpu", num_cores=None, platform="cpu")
# Emu3-8B's second stage of training, but for the length.
ASKED = dict(dtype=jnp.bfloat16, head_dim=128, length=5120, ring=False, dropout=0.0,
             with_lse=False)  # fmt: skip


@pytest.mark.parametrize("device, kernel", [
    (H100, "cudnn"), (MI300, "reference"), (TPU, "tpu"), (CPU, "reference"), (None, "reference"),
])  # fmt: skip
def test_the_usual_kernel_of_a_device(device, kernel):
    assert usual_kernel(device, **ASKED) == kernel


@pytest.mark.parametrize("asked, message", [
    (dict(dtype=jnp.float32), "takes bfloat16 or float16, not float32"),
    (dict(head_dim=256), "has heads of multiples of 8 up to 128, not of 256"),
    (dict(head_dim=100), "has heads of multiples of 8 up to 128, not of 100"),
    (dict(length=8193), "has a mask for rows of up to 8192 tokens, not 8193"),
    (dict(ring=True), "gives no log-sum-exp of 32 bits, which a ring and with_lse need"),
    (dict(with_lse=True), "gives no log-sum-exp of 32 bits, which a ring and with_lse need"),
    (dict(dropout=0.1), r"has no dropout by our hash, asked for at 0\.1"),
])  # fmt: skip
def test_what_it_cannot_do_is_the_references(asked, message):
    assert usual_kernel(H100, **ASKED | asked) == "reference"
    assert usual_kernel(TPU, **ASKED | asked) == "tpu"
    objection = cudnn.objection(**ASKED | asked)
    assert objection == f"cuDNN's attention {message}; take another kernel".replace("\\", "")


@pytest.mark.parametrize("asked", [
    dict(dtype=jnp.float16), dict(head_dim=64), dict(head_dim=8), dict(length=8192),
    dict(length=1),
])  # fmt: skip
def test_what_it_can_do_is_its_own(asked):
    assert usual_kernel(H100, **ASKED | asked) == "cudnn"


def test_named_it_refuses_what_it_cannot_do(one_device):
    q, seg = jnp.zeros((1, 4, 1, 64)), jnp.ones((1, 4), jnp.int32)
    message = "^cuDNN's attention takes bfloat16 or float16, not float32; take another kernel$"
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, seg, seg, kernel="cudnn")


@pytest.mark.parametrize("length", [1, 100, 128, 192])
def test_every_query_sees_something_and_blocks_are_whole(length, monkeypatch):
    given = []

    def spy(q, k, v, mask, **kwargs):
        given.append((q.shape[1], k.shape[1], mask))
        return q, q[..., 0]

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    q, k = jnp.ones((2, length, 2, 64), jnp.bfloat16), jnp.ones((2, 200, 1, 64), jnp.bfloat16)
    # One row of padding alone, and one without any.
    seg_BS = jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32)[:, None], (2, 200))
    pos_BS = jnp.broadcast_to(jnp.arange(200, dtype=jnp.int32), (2, 200))
    places = mask.Places(seg_BS[:, :length], pos_BS[:, :length], seg_BS, pos_BS)
    out, lse = cudnn.forward(q, k, k, places, mask.Dropout(0.0, None))
    ((T, S, see_B1TS),) = given
    assert (T, S) == (128 if length <= 128 else 256, 256) and see_B1TS.shape == (2, 1, T, S)
    assert np.asarray(see_B1TS).any(-1).all()
    np.testing.assert_array_equal(see_B1TS[1, 0, :length], np.tri(length, S, dtype=bool))
    assert out.shape == q.shape and not np.any(out[0]) and np.all(out[1] == 1)
    assert np.all(lse[0] == mask.HIDDEN) and np.all(lse[1] == 1)


def test_on_a_mesh_of_gpus_it_lowers_for_cuda(monkeypatch):
    """Chosen by what is asked, forward and backward, with batch, rows and heads all cut."""
    fused = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{fused}.check_cudnn_version", lambda: 91900)  # there is none to ask
    monkeypatch.setattr("emu3_jax.attention.usual_kernel",
                        lambda device, **asked: usual_kernel(H100, **asked))  # fmt: skip
    device_mesh = mesh.Mesh(data=2, fsdp=1, context=2, tensor=2).make(jax.devices())

    def shape(dims, *sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=mesh.sharding(device_mesh, dims))

    where = [shape("BT", 4, 300, dtype=jnp.int32)] * 2
    k = shape("BTKH", 4, 300, 2, 64)

    @jax.jit
    def step(q, k, v, *where):
        out, pullback = jax.vjp(lambda *qkv: attention(*qkv, *where), q, k, v)
        return out, pullback(out)

    with jax.set_mesh(device_mesh):
        traced = step.trace(shape("BTNH", 4, 300, 4, 64), k, k, *where)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for call in ("__cudnn$fmhaScaleBiasSoftmax(", "__cudnn$fmhaScaleBiasSoftmaxBackward("):
        (line, *_) = [line for line in text.splitlines() if call in line]
        # A device's part: 2 rows, 150 of 300 queries and all keys padded to tiles, half the heads.
        for tensor in ("2x256x2x64xbf16", "2x384x1x64xbf16", "2x1x256x384xbf16"):
            assert f"tensor<{tensor}>" in line
