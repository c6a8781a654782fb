"""Clips that move: drawn ones do what their captions say, emoji out of a package, what is held out,
and how predictions of them are judged."""

import base64
import hashlib
import io
import itertools
import json
import tarfile

import numpy as np
import PIL.Image
import pytest

from data_pipelines import animated_emoji, drawn_clips, video_folder
from demo import prediction

FRAMES = 16


@pytest.fixture(scope="module")
def scenes():
    return list(itertools.islice(drawn_clips.scenes(seed=0), 150))


def ink(x_THWC):
    """How much is drawn where, as a share of black: [T, H, W]."""
    return 1 - x_THWC.astype(float).min(axis=-1) / 255


def test_what_moves_goes_where_its_caption_says(scenes):
    """Each frame is the one before, moved; what came in over the border is left out."""
    for scene in scenes:
        ink_THW = ink(scene.draw(FRAMES))
        words = scene.caption().split()
        pixels = {"slowly": 1, "quickly": 2}[words[-1]]
        right = pixels * (("right" in words) - ("left" in words))
        down = pixels * (("down" in words) - ("up" in words))
        assert (right, down) != (0, 0)
        moved_THW = np.roll(ink_THW[:-1], (down, right), axis=(1, 2))
        inner = slice(2, -2)
        np.testing.assert_array_equal(moved_THW[:, inner, inner], ink_THW[1:, inner, inner])
        assert ink_THW[FRAMES // 2].sum() > 20


def test_the_caption_names_colour_and_shape():
    """A ball is round, and a square fills its corners; the rest of each picture is white."""
    for colour in drawn_clips.COLOURS:
        ball, square = (drawn_clips.Scene(shape, colour, "left", "slowly", 16, 16)
                        for shape in ("ball", "square"))  # fmt: skip
        assert ball.caption().split()[:3] == ["an" if colour == "orange" else "a", colour, "ball"]
        for scene, corner in ((ball, (255, 255, 255)), (square, drawn_clips.COLOURS[colour])):
            x_HWC = scene.draw(FRAMES)[FRAMES // 2]
            assert tuple(x_HWC[16, 16]) == drawn_clips.COLOURS[colour]
            assert tuple(x_HWC[10, 10]) == corner
            assert (x_HWC[:8] == 255).all()


def test_more_clips_than_differ_are_refused(tmp_path):
    with pytest.raises(ValueError) as error:
        drawn_clips.DrawnClips(str(tmp_path), train=10**6).run()
    assert str(error.value) == "1000000 and 128 clips; at most 28224 in all are drawn"


def test_clips_are_written_without_loss_and_held_out_ones_are_others(tmp_path, capsys):
    job = drawn_clips.DrawnClips(str(tmp_path), train=30, heldout=10)
    job.run()
    drawn = list(itertools.islice(drawn_clips.scenes(0), 40))
    found = []
    for name in ("train.jsonl", "heldout.jsonl"):
        found += list(video_folder.VideoFolder(str(tmp_path), name))
    assert len(found) == 40
    for video, scene in zip(found, drawn, strict=True):
        assert (video.fps, video.caption) == (8, scene.caption())
        np.testing.assert_array_equal(video.clip(FRAMES), scene.draw(FRAMES))
    assert len({scene.draw(FRAMES).tobytes() for scene in drawn}) == 40
    capsys.readouterr()
    job.run()
    assert capsys.readouterr().out == f"{tmp_path}: drawn (30 and 10 clips)\n"


def webp(frames, milliseconds):
    """An animated picture of grey frames, each so bright, that lies on nothing."""
    images = [PIL.Image.new("RGBA", (64, 64), (level, level, level, 255)) for level in frames]
    for image in images:
        image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    buffer = io.BytesIO()
    images[0].save(buffer, "webp", save_all=True, append_images=images[1:], lossless=True,
                   duration=milliseconds)  # fmt: skip
    return buffer.getvalue()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that puts an archive of animations, by key, in place of the package."""

    def put(animations):
        path = tmp_path / "fluent-emoji-anim-3-1.0.0.tgz"
        with tarfile.open(path, "w:gz") as archive:
            for key, data in animations.items():
                info = tarfile.TarInfo(f"package/assets/{key}.webp")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        digest = hashlib.sha512(path.read_bytes()).digest()
        monkeypatch.setattr(animated_emoji, "SHA512", base64.b64encode(digest).decode())
        return str(tmp_path)

    return put


def test_emoji_become_clips_where_they_move(tmp_path, package, capsys):
    moving = webp(list(range(0, 240, 10)) * 2, 42)
    cache = package({
        "1f415": moving, "1f697": moving, "1f697-1f3fb": moving, "1f388": moving,
        "1f30a": webp([10, 11] * 24, 42), "1f600": webp([10], 0),
    })  # fmt: skip
    job = animated_emoji.AnimatedEmoji(str(tmp_path / "clips"), heldout=3, cache_dir=cache)
    job.run()
    lists = {name: (tmp_path / "clips" / f"{name}.jsonl").read_text() for name in
             ("train", "heldout")}  # fmt: skip
    lists = {name: [json.loads(line) for line in text.splitlines()] for name, text in lists.items()}
    emoji = {name: {e["emoji"] for e in entries} for name, entries in lists.items()}
    assert len(emoji["heldout"]) == 1 and len(emoji["train"]) == 2
    assert emoji["train"] | emoji["heldout"] == {"1f415", "1f697", "1f388"}
    captions = {e["emoji"]: e["caption"] for entries in lists.values() for e in entries}
    assert captions == {"1f415": "dog", "1f697": "automobile", "1f388": "balloon"}
    clip = video_folder.VideoFolder(str(tmp_path / "clips"), "heldout.jsonl")[0].clip(FRAMES)
    assert clip.shape == (16, 32, 32, 3)
    assert (clip[:, :, :15] == 255).all()  # what is transparent is white
    capsys.readouterr()
    job.run()
    assert capsys.readouterr().out == f"{tmp_path / 'clips'}: cut\n"


def test_frames_of_an_animation_are_those_seen_at_their_time():
    x_THWC = animated_emoji.read(webp([0, 50, 100, 150], [100, 300, 100, 100]), 8, fps=10)
    assert x_THWC[:, 0, -1, 0].tolist() == [0, 50, 50, 50, 100, 150]


def test_another_package_than_expected_is_refused(tmp_path, package, monkeypatch):
    cache = package({"1f415": webp([0, 50], 42)})
    monkeypatch.setattr(animated_emoji, "SHA512", "another")
    with pytest.raises(ValueError, match="has sha512 .*, expected another; delete it to fetch"):
        animated_emoji.fetch(cache)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError) as error:
        animated_emoji.fetch(tmp_path / "empty")
    assert str(error.value) == (
        "could not fetch @lobehub/fluent-emoji-anim-3@1.0.0 with npm: npm is not here; install "
        "Node.js; or take drawn clips, which need nothing"
    )


def ramp(*levels):
    """A clip of one pixel of each of these levels of grey, [1, T, 1, 1, 3]."""
    return np.array(levels, np.uint8)[None, :, None, None, None].repeat(3, axis=-1)


def test_the_baselines():
    given = ramp(100, 130)
    assert prediction.repeat_last(given, 3)[0, :, 0, 0, 0].tolist() == [130, 130, 130]
    assert prediction.extrapolate(given, 5)[0, :, 0, 0, 0].tolist() == [160, 190, 220, 250, 255]
    assert prediction.extrapolate(ramp(90, 40), 2)[0, :, 0, 0, 0].tolist() == [0, 0]


def test_psnr_of_clips():
    clips = np.concatenate([ramp(10, 20), ramp(10, 20)])
    guess = np.concatenate([ramp(10, 20), ramp(10, 71)])  # half of the pixels off by a fifth
    np.testing.assert_allclose(prediction.psnr_B(guess, clips), [100, -10 * np.log10(0.02)])


def test_evaluation_compares_with_the_better_baseline(tmp_path):
    """The first clip goes on in a straight line, the second stands still; the model is near."""
    real = np.concatenate([ramp(0, 20, 40, 60, 80), ramp(9, 9, 9, 9, 9)])
    made = real[:, 3:] + 1
    np.savez(tmp_path / "heldout.npz", real=real, decoded=real + 2, predicted=made)
    entries = [dict(file="0.mkv", motion="moves"), dict(file="1.mkv", motion="rests")]
    (tmp_path / "heldout.json").write_text(json.dumps(entries))
    path = tmp_path / "evaluation.json"
    prediction.Evaluate(str(tmp_path), str(path), lists=("heldout.jsonl",)).run()
    groups = json.loads(path.read_text())["heldout"]
    one, two = (20 * np.log10(255 / off) for off in (1, 2))
    assert groups["moves"].keys() == prediction.MEANING.keys()
    assert groups["moves"]["linear_psnr_db"] == groups["rests"]["repeat_last_psnr_db"] == 100
    assert groups["moves"]["repeat_last_psnr_db"] == pytest.approx(
        -10 * np.log10((20**2 + 40**2) / 2 / 255**2)
    )
    assert groups["all"]["predicted_psnr_db"] == pytest.approx(one)
    assert groups["all"]["tokenizer_psnr_db"] == pytest.approx(two)
    assert groups["rests"]["gain_db"] == pytest.approx(one - 100)
    assert groups["rests"]["white_psnr_db"] == pytest.approx(20 * np.log10(255 / 246))
    assert groups["all"]["better_share"] == 0
