"""The Hopper kernel without a GPU: it lowers for CUDA, and interpreted it equals the reference.

The interpreter knows one device and deadlocks where XLA has one thread; so a process of its own.
"""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu3_jax.kernels import flash_gpu, mask, reference


def inputs(length: int, head_dim: int, dtype):
    """q, k, v and a cotangent for 2 heads over 1, and a packed row with padding behind."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((1, length, n, head_dim)), dtype)
              for n in (2, 1, 1, 2)]  # fmt: skip
    lengths = [70, 1, length - 90]
    seg = np.repeat([1, 2, 3, 0], [*lengths, 19])[None].astype(np.int32)
    pos = np.concatenate([*map(np.arange, lengths), np.arange(19)])[None].astype(np.int32)
    return arrays, mask.Places(*(jnp.asarray(x) for x in (seg, pos, seg, pos)))


@pytest.mark.parametrize("head_dim, dropout", [(64, 0.0), (128, 0.1)])
def test_it_lowers_for_cuda(head_dim, dropout, monkeypatch):
    monkeypatch.setattr(flash_gpu, "_interpreted", lambda: False)
    (q, k, v, dout), places = inputs(300, head_dim, jnp.bfloat16)
    hash_BTN = jnp.ones(q.shape[:3], jnp.uint32) if dropout else None
    drop = mask.Dropout(dropout, hash_BTN)

    @jax.jit
    def both(q, k, v, dout):
        out, lse = flash_gpu.forward(q, k, v, places, drop)
        return out, flash_gpu.backward(q, k, v, places, drop, lse, lse, dout)

    text = both.trace(q, k, v, dout).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 3  # forward, dq, dk and dv


@pytest.mark.parametrize("head_dim, dtype, message", [
    (256, jnp.bfloat16, r"the GPU kernel has heads of \(64, 128\), not of 256; take another"),
    (64, jnp.float32, "the GPU kernel takes bfloat16 or float16, not float32 queries .*"),
])  # fmt: skip
def test_what_it_refuses(head_dim, dtype, message):
    (q, k, v, _), places = inputs(100, head_dim, dtype)
    with pytest.raises(ValueError, match=f"^{message}$"):
        flash_gpu.forward(q, k, v, places, mask.Dropout(0.0, None))


@pytest.mark.slow
def test_interpreted_it_equals_the_reference():
    # More threads than cores: the interpreter's warpgroups wait for each other.
    environment = os.environ | dict(PJRT_NPROC="8", XLA_FLAGS="")
    command = [sys.executable, "-m", "tests.test_flash_gpu"]
    subprocess.run(command, env=environment, check=True, timeout=500)


def compare():
    """Values and gradients in bfloat16, with and without dropout, against the reference."""
    (q, k, v, dout), places = inputs(150, 64, jnp.bfloat16)
    for rate in (0.0, 0.2):
        hash_BTN = jax.random.bits(jax.random.key(0), q.shape[:3]) if rate else None
        drop = mask.Dropout(rate, hash_BTN)

        def both(kernel, *args, drop=drop):
            q, k, v, dout = args
            out, lse = kernel.forward(q, k, v, places, drop, jnp.float32)
            delta = jnp.einsum("BTNH,BTNH->BTN", out, dout.astype(jnp.float32))
            return out, lse, *kernel.backward(q, k, v, places, drop, lse, delta, dout)

        found = both(flash_gpu, q, k, v, dout)
        exact = [x.astype(jnp.float32) for x in (q, k, v, dout)]
        wanted = jax.jit(functools.partial(both, reference))(*exact)
        for name, x, want in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
            bound = 1e-5 if name == "lse" else 0.02
            np.testing.assert_allclose(x, want, rtol=1e-6, atol=bound, err_msg=f"{name} {rate}")


if __name__ == "__main__":
    compare()
