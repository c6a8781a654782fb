"""The video demo in small: every stage, a second start, and what predictions may look at."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from configs import demo_video
from data_pipelines import clip_folder, video_folder
from demo import prediction

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo with a few steps a stage, run through."""
    job = demo_video.build(str(tmp_path_factory.mktemp("demo")), 64, 3, 3)
    job.clips.heldout = 8
    job.tokenizer.task.codebook_init_step = 1
    job.decoder.task.layers = job.decoder.task.unroll = 1
    job.predict.count = job.predict.batch = 8  # a clip a device
    job.run()
    return job


def test_all_figures_are_there_for_each_list_and_motion(finished):
    values = json.loads(open(f"{finished.run_dir}/evaluation.json").read())
    assert values.keys() == {"heldout", "train"}
    for groups in values.values():
        assert groups.keys() == {"all", "slowly", "quickly"}
        assert all(figures.keys() == prediction.MEANING.keys() for figures in groups.values())


def test_the_report_shows_each_figure_and_clip(finished):
    page = open(f"{finished.run_dir}/report.html").read()
    for name in prediction.MEANING:
        assert name in page
    assert page.count("<img alt='real over predicted'") == 8
    assert page.count("<img class=plot") == 3


def test_a_second_start_only_says_where_to_look(finished, capsys):
    finished.run()
    out = capsys.readouterr().out
    assert out == f"The demo is complete: open {finished.run_dir}/report.html\n"


def test_predictions_look_at_no_frame_after_the_given_ones(finished, tmp_path):
    job = finished.predict
    shutil.copytree(job.clips, tmp_path / "clips")
    for video in video_folder.VideoFolder(job.clips, "heldout.jsonl"):
        x_THWC = video.clip(job.frames)
        x_THWC[job.given :] = 0
        clip_folder.write_clip(tmp_path / "clips" / video.key, x_THWC, 8)
    dataclasses.replace(
        job, clips=str(tmp_path / "clips"), directory=str(tmp_path), lists=("heldout.jsonl",)
    ).run()
    before, after = (prediction.Predicted(path, "heldout.jsonl").pixels for path in
                     (job.directory, tmp_path))  # fmt: skip
    assert (before["real"] != after["real"]).any()
    np.testing.assert_array_equal(before["predicted"], after["predicted"])


def test_frames_that_make_no_whole_latent_frame_are_refused(finished, tmp_path):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(finished.predict, given=6, directory=str(tmp_path)).run()
    assert str(error.value) == (
        "6 of 16 frames given; take multiples of 4, which make one latent frame, and leave some to "
        "predict"
    )
