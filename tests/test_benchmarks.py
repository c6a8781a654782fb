"""The benchmarks run where they can, and their counting of blocks is right."""

import pytest

from benchmarks import attention_tpu


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


@pytest.mark.slow
def test_the_ring_compiles_for_a_pod_and_its_sends_overlap():
    pytest.importorskip("libtpu", reason="libtpu has wheels for Linux on x86_64 only")
    figures = attention_tpu.ring()
    assert "error" not in figures, figures
    assert figures["sends"]["around_the_kernel"] > 0
