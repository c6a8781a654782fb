"""The training benchmark at toy size: both sides take the same step.

B batch  T query position  S key position
"""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import train_gpu


@pytest.mark.slow
def test_both_sides_start_alike_and_learn_alike(monkeypatch, capsys):
    """The script itself on a CPU, with the one choice that computes what we do."""
    monkeypatch.setattr(train_gpu, "OTHERS", train_gpu.OTHERS[:1])
    monkeypatch.setattr(sys, "argv", ["train_gpu", "--tiny"])
    train_gpu.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    ours, (theirs,) = result["emu3_jax"], result["pytorch"]
    assert "error" not in ours and "error" not in theirs, (ours, theirs)
    assert (theirs["weights"], theirs["attention"]) == ("float32", "documents")
    assert ours["kernel"] == "reference" and theirs["rows_at_a_time"] == 4
    assert ours["losses"][-1] < ours["losses"][0] - 0.1
    np.testing.assert_allclose(theirs["losses"], ours["losses"], rtol=2e-6)
    for side in (ours, theirs):
        speed = result["tokens"] / side["seconds_per_step"]
        np.testing.assert_allclose(side["tokens_per_second"], speed, rtol=1e-3)
        assert side["mfu"] is None  # of a CPU


def test_a_side_that_fails_is_a_result(monkeypatch, tmp_path):
    class Flags:
        packing, kernel, tiny = "images", "", True

    failed = subprocess.CompletedProcess([], 1, "", "a long story\nOutOfMemory: a GiB too much\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    figures = train_gpu._apart(Flags, {}, "pytorch", str(tmp_path), "float32", "documents")
    assert figures["choices"] == ("float32", "documents")
    assert figures["error"].endswith("OutOfMemory: a GiB too much")


def test_without_a_gpu_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_gpu"])
    with pytest.raises(SystemExit) as end:
        train_gpu.main()
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "needs a Hopper GPU (compute capability 9.0); this is a CPU\n"


def test_pytorch_is_told_of_documents_or_not():
    job = train_gpu.training(tiny=True)
    batch = train_gpu.rows(job, "images")
    seg_BT, pos_BT = batch["segments"], batch["positions"]
    inputs = train_gpu._pytorch_inputs(batch, "cpu", "documents")
    seen_BTS = inputs["attention_mask"][:, 0].numpy()
    for b, t, s in np.random.default_rng(0).integers(0, (8, 256, 256), (300, 3)):
        assert seen_BTS[b, t, s] == (seg_BT[b, t] == seg_BT[b, s] and pos_BT[b, s] <= pos_BT[b, t])
    labels_BT = inputs["shift_labels"].numpy()
    np.testing.assert_array_equal(labels_BT == -100, seg_BT == 0)
    assert "attention_mask" not in train_gpu._pytorch_inputs(batch, "cpu", "causal")


def test_the_work_is_what_training_metrics_count():
    job = train_gpu.training(tiny=True)
    batch = train_gpu.rows(job, "images")
    work, counts = train_gpu._work(job, batch), job.task.counts(batch)
    for key in ("tokens", "flops", "flops_dense"):
        np.testing.assert_allclose(work[key], float(counts[key]), rtol=1e-5)
    full = train_gpu.training(tiny=False)
    assert (full.batch, full.data.length, full.task.dtype) == (8, 5120, "bfloat16")
    assert work["flops"] < work["flops_dense"]
