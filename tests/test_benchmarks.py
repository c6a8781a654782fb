"""The benchmarks run where they can, and their counting of blocks is right."""

import jax.numpy as jnp
import pytest

from benchmarks import attention_gpu, attention_tpu
from emu3_jax.kernels import cudnn


@pytest.mark.parametrize("name, length", attention_tpu.PACKINGS)
def test_visited_blocks_of_real_packings(name, length):
    figures = attention_tpu.visited(name, length)
    for direction in ("forward", "backward"):
        counts = figures[direction]
        assert counts["ideal"] <= counts["visited"] <= 1.15 * counts["ideal"]
        assert counts["visited"] <= counts["triangle"]
    assert figures["pairs_of_triangle"] < 1


def test_the_tpu_kernels_compile_without_a_tpu(monkeypatch):
    pytest.importorskip("libtpu", reason="libtpu has wheels for Linux on x86_64 only")
    monkeypatch.setattr(attention_tpu, "HEADS", 2)
    monkeypatch.setattr(attention_tpu, "KV_HEADS", 1)
    figures = attention_tpu.compiled("v5e", 1100, attention_tpu.ours)
    assert "error" not in figures, figures
    assert 0 < figures["vmem_mb"] < 64


@pytest.fixture
def small_heads(monkeypatch):
    """The GPU benchmark's own, for a CPU, and XLA in cuDNN's place."""
    monkeypatch.setattr(attention_gpu, "HEADS", 2)
    monkeypatch.setattr(attention_gpu, "KV_HEADS", 1)
    monkeypatch.setattr(attention_gpu, "HEAD_DIM", 64)
    monkeypatch.setattr(attention_gpu, "ROUNDS", 1)
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")


@pytest.mark.parametrize("name", ["reference", "cudnn"])
def test_the_gpu_benchmark_checks_against_float64(name, small_heads, monkeypatch):
    assert max(attention_gpu._correct(name).values()) < 0.02

    def wrong(q, k, v, seg, pos, dense):  # the documents see each other
        return attention_gpu._ours(name)(q, k, v, jnp.ones_like(seg), pos, dense)

    monkeypatch.setitem(attention_gpu.IMPLEMENTATIONS, name, wrong)
    assert min(attention_gpu._correct(name).values()) > 0.1


def test_a_row_of_the_gpu_benchmark(small_heads, monkeypatch):
    for name in ("gpu", "tokamax"):  # interpreted, and not installed
        monkeypatch.delitem(attention_gpu.IMPLEMENTATIONS, name)
    figures = attention_gpu._row("dense", 300)
    assert figures["visible_pairs"] == 300 * 301 // 2 and figures["usual"] == "reference"
    for name in ("reference", "cudnn"):
        for direction in ("forward", "both"):
            assert figures[name][direction]["ms"] > 0
    assert "error" in figures["jax.nn"]["forward"]  # there is no cuDNN here
    assert attention_gpu._reason_to_skip("cudnn", 32_768, True)
    assert not attention_gpu._reason_to_skip("jax.nn", 32_768, True)


@pytest.mark.slow
def test_the_ring_compiles_for_a_pod_and_its_sends_overlap():
    pytest.importorskip("libtpu", reason="libtpu has wheels for Linux on x86_64 only")
    figures = attention_tpu.ring()
    assert "error" not in figures, figures
    assert figures["sends"]["around_the_kernel"] > 0
