"""The jobs that draw, go on with a video and answer, over a tiny model that learnt nothing.

T frames  H rows and W columns of pixels  C colours
"""

import io
import json
import pathlib

import av
import jax
import numpy as np
import PIL.Image
import pytest

from data_pipelines import video_folder
from emu3_jax import convert, vocab
from emu3_jax.sampling import Sampling
from inference import artist, draw, files
from inference.artist import Canvas, Model
from inference.chat import Chat
from inference.draw import Generate, GoOn
from tests import toy
from tokenizer import convert as tokenizer_convert
from tokenizer import vq

CODES = 32


def tiny(directory: pathlib.Path) -> Model:
    """Untrained models in the published layouts; a code is 2 x 2 pixels, of 4 frames."""
    model = Model(*(str(directory / name) for name in ("tokenizer", "decoder", "vocab.tiktoken")))
    ranks = {bytes([byte]): byte for byte in range(256)}
    vocab.save_ranks(ranks, model.vocab)
    words = vocab.Vocab(ranks, CODES)
    decoder = toy.model(head_dim=4, vocab=words.size, first_visual=words.visual)
    params, _ = decoder.init(jax.random.key(0))
    convert.save(decoder, jax.tree.map(np.asarray, params), model.decoder, "official")
    config = vq.VQConfig(codebook_size=CODES, width=32, multipliers=(1, 2), res_blocks=1,
                         attention_levels=(1,))  # fmt: skip
    tokenizer = vq.merge(config, *vq.init(config, jax.random.key(1)))
    tokenizer_convert.save(tokenizer, model.tokenizer)
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with jax.set_mesh(toy.Single().make()):
        made = tiny(tmp_path_factory.mktemp("tiny"))
    made.mesh = toy.Single()
    return made


def test_images_hold_their_prompt_and_are_drawn_once(model, tmp_path, capsys):
    """The second time only what is missing, and it is what it was."""
    (tmp_path / "prompts.txt").write_text("\n a dog; in/the park \n")
    job = Generate(model, ("a cat",), str(tmp_path / "prompts.txt"), samples=2, batch=3,
                   canvas=Canvas("2:1", 128), sampling=Sampling(top_k=4),
                   directory=str(tmp_path / "out"))  # fmt: skip
    job.run()
    names = ["0000-0-a-cat.png", "0000-1-a-cat.png", "0001-0-a-dog-in-the-park.png",
             "0001-1-a-dog-in-the-park.png", "grid.png"]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    images = [PIL.Image.open(tmp_path / "out" / name) for name in names]
    assert [image.size for image in images] == [(16, 8)] * 4 + [(32, 16)]
    assert images[2].text["prompt"] == "a dog; in/the park"
    settings = json.loads(images[3].text["settings"])
    assert (settings["copy"], settings["top_k"], settings["guidance"]) == (1, 4, 3.0)
    pixels = [np.asarray(image) for image in images]
    assert (pixels[0] != pixels[1]).any() and (pixels[0] != pixels[2]).any()
    np.testing.assert_array_equal(pixels[4][:8, 16:], pixels[1])
    assert "100%" in capsys.readouterr().out
    (tmp_path / "out" / names[1]).unlink()
    job.run()
    again = np.asarray(PIL.Image.open(tmp_path / "out" / names[1]))
    np.testing.assert_array_equal(again, pixels[1])
    assert "3 of 4 are drawn" in capsys.readouterr().out


def test_a_video_is_drawn_and_gone_on_with(model, tmp_path):
    """One second of eight frames is two latent ones; as much follows, twice."""
    canvas = Canvas("1:1", 16 * 16, seconds=1.0, fps=8.0)
    Generate(model, ("waves",), canvas=canvas, directory=str(tmp_path)).run()
    path = tmp_path / "0000-0-waves.mp4"
    assert video_folder.info(path)[:2] == (8, 8.0)
    job = GoOn(model, str(path), "waves", times=2, canvas=canvas, path=str(tmp_path / "on.mp4"))
    job.run()
    with av.open(str(tmp_path / "on.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 24 and frames[0].shape == (16, 16, 3)
    with pytest.raises(ValueError, match="on.mp4 has 24 frames at 8 a second, 32 are needed"):
        GoOn(model, job.path, canvas=Canvas(area=256, seconds=4, fps=8)).run()


def test_questions_are_answered_in_turn(model, tmp_path, capsys, monkeypatch):
    """An answer depends on the image, and on what was asked before; a lone question is the same
    from the standard input."""
    rng = np.random.default_rng(0)
    for name in "ab":
        image = rng.integers(0, 256, (20, 30, 3), np.uint8)
        (tmp_path / f"{name}.png").write_bytes(files.png(image, {}))
    said = {}
    for image, questions in (("a", ("who", "what")), ("b", ("who",)), ("a", ("what",))):
        Chat(model, str(tmp_path / f"{image}.png"), questions=questions, length=12,
             canvas=Canvas(area=256)).run()  # fmt: skip
        said[image, questions] = capsys.readouterr().out.split("\n")
    assert said["a", ("who", "what")][:1] == ["who"] and len(said["b", ("who",)]) == 3
    assert said["a", ("who", "what")][1] != said["b", ("who",)][1]
    assert said["a", ("who", "what")][3] != said["a", ("what",)][1]
    monkeypatch.setattr("sys.stdin", io.StringIO("\nwho\n"))
    Chat(model, str(tmp_path / "b.png"), length=12, canvas=Canvas(area=256)).run()
    assert capsys.readouterr().out.split("\n")[0] == said["b", ("who",)][1]


@pytest.mark.parametrize(
    "job, message",
    [
        (Generate(), "there is no prompt, or an empty one; give prompts or prompts_file"),
        (Generate(prompts=("a", " ")), "there is no prompt, or an empty one"),
        (Generate(prompts=("a",)), "no tokenizer is named; give --config.model.tokenizer=PATH"),
        (Generate(prompts=("a",), samples=0), "batch = 4, samples = 0; want 1 or more"),
        (Generate(prompts_file="nowhere.txt"), "nowhere.txt cannot be read"),
        (GoOn(times=0), "canvas.fps = 24, times = 0; set both"),
        (Chat(image="a", video="b"), "both an image and a video are given"),
        (Chat(video="b"), "a video needs its frame rate: give --config.canvas.fps"),
    ],
)
def test_what_a_user_may_do_wrong(job, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        job.run()


@pytest.mark.parametrize(
    "ratio, area, grid",
    [
        # as Emu3's own code has them (section 6 of its processor)
        ("1:1", 262_144, (64, 64)), ("4:3", 262_144, (55, 74)), ("16:9", 262_144, (48, 85)),
        ("3:2", 262_144, (52, 78)), ("1:1", 518_400, (90, 90)), ("4:3", 518_400, (78, 104)),
        ("16:9", 518_400, (68, 120)), ("3:2", 518_400, (73, 110)),
    ],
)  # fmt: skip
def test_sizes_are_those_of_emu3(ratio, area, grid):
    assert artist.grid_of(ratio, area, 8) == grid


@pytest.mark.parametrize("ratio", ["", "1", "1:0", "1:2:3", "a:b", "-1:2"])
def test_a_ratio_that_is_none(ratio):
    with pytest.raises(ValueError, match="want width:height, as in 16:9"):
        artist.grid_of(ratio, 512, 8)


def test_progress_says_what_is_left(capsys, monkeypatch):
    times = iter([0.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(draw.time, "monotonic", lambda: next(times))
    told = draw.Progress("all", every=2.0)
    for done in (10, 20, 30, 50):
        told(np.zeros((2, done)), 100)
    assert capsys.readouterr().out == (
        "all  30%  20 codes/s  0:07 left\nall  50%  20 codes/s  0:05 left\n"
    )
