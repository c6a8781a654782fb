"""The demo in small: every stage, a second start, and what PyTorch makes of the export."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers

from configs import demo
from demo import evaluate
from emu3_jax import launch


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo with a few steps a stage, run through."""
    job = demo.build(str(tmp_path_factory.mktemp("demo")), ("food",), 0, 12, 6)
    job.tokenizer.save_every = 6
    job.decoder.task.layers = job.decoder.task.unroll = 2
    job.decoder.task.width, job.decoder.task.ffn, job.decoder.batch = 64, 96, 8
    job.images.skin_tone_heldout = 3
    job.images.select = ("food", "animals", "faces", "person", "man", "woman")
    job.draw.count = job.draw.batch = 8  # a picture a device
    job.report.shown = 3
    job.run()
    return job


def test_all_figures_are_there_and_are_shares_or_decibels(finished):
    values = json.loads(open(f"{finished.run_dir}/evaluation.json").read())
    assert values.keys() == evaluate.MEANING.keys()
    assert 3 < values.pop("tokenizer_psnr_db") < 40
    assert all(0 <= value <= 1 for value in values.values())


def test_the_report_shows_each_figure_and_picture(finished):
    page = open(f"{finished.run_dir}/report.html").read()
    for name in evaluate.MEANING:
        assert name in page
    assert page.count("<img title=drawn") == 6
    assert page.count("<img class=plot") == 2


def test_a_second_start_only_says_where_to_look(finished, capsys):
    finished.run()
    out = capsys.readouterr().out
    assert out == f"The demo is complete: open {finished.run_dir}/report.html\n"


def test_torch_loads_the_export_and_agrees(finished):
    path = finished.export.convert.target
    model, loading = transformers.AutoModelForImageTextToText.from_pretrained(
        path, output_loading_info=True
    )
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    parity = np.load(f"{path}/parity.npz")
    assert len(parity["ids_BT"]) == 4
    with torch.no_grad():
        logits_BTV = model(input_ids=torch.from_numpy(parity["ids_BT"]).long()).logits.numpy()
    for ours_TV, theirs_TV, length in zip(
        parity["logits_BTV"], logits_BTV, parity["length_B"], strict=True
    ):
        np.testing.assert_allclose(ours_TV[:length], theirs_TV[:length], atol=1e-4)


def test_too_few_captions_for_the_vocabulary(finished):
    few = dataclasses.replace(finished.vocabulary, list="heldout_skin_tone.jsonl", path="nowhere")
    with pytest.raises(ValueError) as error:
        few.run()
    assert str(error.value) == (
        "3 captions of heldout_skin_tone.jsonl give 277 ranks, not 512; "
        "set size to that, and the decoder's vocabulary with it"
    )


def test_a_stage_by_name(capsys):
    assert demo.get_config("decoder").run_dir == "runs/demo/decoder"
    assert launch.main(["--config=configs/demo.py:decode"]) == 2
    assert "the demo has no stage 'decode'" in capsys.readouterr().err


def test_nearest_picture_and_tone():
    pictures_BHWC = np.zeros((2, 32, 32, 3), np.uint8)
    pictures_BHWC[1] = 200
    assert evaluate.small(pictures_BHWC).shape == (2, 16 * 16 * 3)
