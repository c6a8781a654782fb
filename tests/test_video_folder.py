"""Frames at any rate of any video, bad videos, written videos, clips as rows.

Every video here is made of frames whose brightness is 8 times their number, so that each frame that
is read tells which it was.
"""

import collections
import fractions
import io
import itertools
import json
import re

import av
import numpy as np
import PIL.Image
import pytest
from av.stream import Disposition

from data_pipelines import clip_rows, image_folder, video_folder

LEVEL = 8


def picture(number, height=32, width=32):
    return np.full((height, width, 3), LEVEL * number, np.uint8)


def write(path, count=30, fps=10, height=32, width=32):
    video_folder.write_video(path, (picture(i, height, width) for i in range(count)), fps)


def write_stream(path, times, codec="libx264", rotation=0, size=32, keyframes=250):
    """A video with frames at any times, in ms, and of any codec."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"g": str(keyframes)})
        stream.height = stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = fractions.Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number, size, size), format="rgb24")
            frame.pts, frame.time_base = time, fractions.Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def numbers(frames):
    return [round(x_HWC.mean() / LEVEL) for x_HWC in frames]


def read(path, fps=0.0, start=0.0, seconds=0.0):
    return numbers(video_folder.read_frames(path, fps, start, seconds))


@pytest.fixture
def video(tmp_path):
    """Three seconds of 10 frames each."""
    write(tmp_path / "a.mp4")
    return tmp_path / "a.mp4"


def test_written_frames_are_read_back(tmp_path):
    y, x = np.mgrid[0:48, 0:64]
    frames = [
        np.stack([4 * x, 4 * y, np.full_like(x, 12 * i)], -1).astype(np.uint8) for i in range(9)
    ]
    path = tmp_path / "a.mp4"
    video_folder.write_video(path, iter(frames), fps=30000 / 1001, quality=1)
    back = list(video_folder.read_frames(path))
    assert len(back) == 9 and all(x.dtype == np.uint8 and x.shape == (48, 64, 3) for x in back)
    # Chroma has half the resolution, so single pixels may be off by more.
    assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(frames, back, strict=True)) < 2
    assert video_folder.info(path) == (9, pytest.approx(30000 / 1001), 48, 64)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_quality_trades_size(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    for quality in (10, 40):
        video_folder.write_video(tmp_path / f"{quality}.mp4", noise, 10, quality)
    assert (tmp_path / "10.mp4").stat().st_size > 3 * (tmp_path / "40.mp4").stat().st_size


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, video):
    before = video.read_bytes()

    def breaks():
        yield picture(0)
        raise RuntimeError("no more")

    for frames, fps, message in (
        ([], 10, "a.mp4: no frames to write"),
        ([picture(0, 32, 33)], 10, "33x32 px; mp4 takes even sides, cut one"),
        ([picture(0)], 0, "0 frames a second; give a rate above 0"),
        ([picture(0), picture(0, 16)], 10, r"frames of \(32, 32, 3\) and \(16, 32, 3\); make them"),
    ):
        with pytest.raises(ValueError, match=message):
            video_folder.write_video(video, frames, fps)
    with pytest.raises(RuntimeError, match="no more"):
        video_folder.write_video(video, breaks(), 10)
    assert video.read_bytes() == before and list(tmp_path.iterdir()) == [video]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), range(30)),
        ((10,), range(30)),
        ((5,), range(0, 30, 2)),
        ((20,), [i // 2 for i in range(60)]),
        ((4, 0, 1.5), [0, 2, 5, 7, 10, 12]),
        ((10, 1.0, 1.0), range(10, 20)),
        ((0, 1.0, 1.0), range(10, 20)),
        ((4, 0.55, 1.0), [5, 8, 10, 13]),
        ((0, 0.55, 0.2), [5, 6, 7]),
        ((10, 2.9), [29]),
    ],
)
def test_rate_start_and_length(video, arguments, expected):
    """Frame k is the last that begins at start + k / fps or earlier."""
    assert read(video, *arguments) == list(expected)


def test_varying_rate(tmp_path):
    path = tmp_path / "a.mp4"
    write_stream(path, [0, 100, 150, 600, 1000])
    assert read(path) == [0, 1, 2, 3, 4]
    assert read(path, 10, 0, 1.0) == [0, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert read(path, 10, 0.7, 0.3) == [3, 3, 3]
    assert read(path, 2.5, 0, 1.0) == [0, 2, 3]


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.ts", "libx264")],
)
def test_other_files_resample_and_seek_as_well(tmp_path, name, codec):
    """Matroska rounds times to ms; a transport stream starts late and seeks badly."""
    path = tmp_path / name
    write_stream(path, range(0, 3000, 100), codec, keyframes=7)
    assert read(path) == read(path, 10) == list(range(30))
    assert [read(path, 10, k / 10, 0.3) for k in range(27)] == [
        [k, k + 1, k + 2] for k in range(27)
    ]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_open_files_are_read_as_files_by_name(tmp_path, name):
    """Once and again, also where seeking opens it anew; errors call it by its name."""
    write_stream(tmp_path / name, range(0, 3000, 100))
    with open(tmp_path / name, "rb") as file:
        assert video_folder.info(file) == video_folder.info(tmp_path / name)
        for start in (0.0, 1.45, 0.0):
            assert read(file, 5, start) == read(tmp_path / name, 5, start)
        with pytest.raises(video_folder.BadVideo, match=f"/{name}: no frame from 40 s on"):
            read(file, 5, 40)
    junk = io.BytesIO(b"junk" * 99)
    junk.name = "a.tar/junk.mp4"
    with pytest.raises(video_folder.BadVideo, match="^a.tar/junk.mp4: corrupt video"):
        read(junk)


def test_frames_are_turned_as_the_file_says(tmp_path):
    image_HWC = np.zeros((32, 48, 3), np.uint8)
    image_HWC[:8, :8] = 255
    turned = {}
    for rotation in (0, 90):
        path = tmp_path / f"{rotation}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
            stream.set_display_rotation(rotation)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image_HWC, format="rgb24")))
            container.mux(stream.encode(None))
        turned[rotation] = next(video_folder.read_frames(path))
    assert turned[0].shape == (32, 48, 3) and turned[0][4, 4, 0] > 250
    assert video_folder.info(tmp_path / "90.mp4")[2:] == (48, 32)
    np.testing.assert_array_equal(turned[90], np.rot90(turned[0]))  # counterclockwise


def test_reading_is_lazy(video):
    first = video_folder.read_frames(video, fps=1e9)  # a billion frames a second
    assert numbers(itertools.islice(first, 3)) == [0, 0, 0]


def bad(path):
    with pytest.raises(video_folder.BadVideo) as error:
        list(video_folder.read_frames(path))
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{path}: ")


def write_song(path):
    """Sound with a cover picture, which FFmpeg counts among the video streams."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=44100)
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(picture(9), format="rgb24")))
        container.mux(cover.encode(None))
        for i in range(3):
            silence = np.zeros((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, 1024 * i
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    with av.open(str(path)) as container:
        assert container.streams.video


def test_bad_videos_are_named(tmp_path, video):
    assert bad(tmp_path / "absent.mp4") == "no such file"
    whole = video.read_bytes()
    for name, data in (("junk", b"video?" * 99), ("empty", b""), ("end", whole[len(whole) // 2 :])):
        (tmp_path / f"{name}.mp4").write_bytes(data)
        assert bad(tmp_path / f"{name}.mp4").startswith("corrupt video (")
    write(tmp_path / "cut.mp4")
    with av.open(str(tmp_path / "cut.mp4")) as container:
        places = [packet.pos for packet in container.demux() if packet.size]
    for end, message in (
        (places[9], r"cut short after [01]\.\d\d of 3\.00 s"),
        (places[9] - 1, r"corrupt video \(.*\)"),
    ):
        (tmp_path / "cut.mp4").write_bytes(whole[:end])
        assert re.fullmatch(message, bad(tmp_path / "cut.mp4"))
    write_song(tmp_path / "song.mp4")
    assert bad(tmp_path / "song.mp4") == "no video stream"
    write(tmp_path / "small.mp4", 2, height=6)
    assert bad(tmp_path / "small.mp4") == "32x6 px, smaller than 8 px"
    write(tmp_path / "long.mp4", 2, height=8, width=42)
    assert bad(tmp_path / "long.mp4") == "42x8 px, aspect ratio above 5"
    write_stream(tmp_path / "slow.mp4", [0, 601_000])
    assert bad(tmp_path / "slow.mp4") == "a frame of 601 s, more than 600"


def test_a_list_of_other_files_is_no_video(tmp_path, video):
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"ffconcat version 1.0\nfile {video.name}\n")
    with av.open(str(playlist)) as container:  # FFmpeg itself would follow it
        assert container.streams.video
    assert bad(playlist).startswith("corrupt video (")


def test_frames_of_absurd_size_are_refused_before_decoding(video, monkeypatch):
    monkeypatch.setattr(video_folder, "MOST_PIXELS", 1000)
    monkeypatch.setattr(av.container.InputContainer, "decode", None, raising=True)
    assert bad(video) == "32x32 px, more than 1000 pixels"


def test_a_start_beyond_the_end_and_negative_arguments(video):
    with pytest.raises(video_folder.BadVideo, match="a.mp4: no frame from 4 s on; start earlier"):
        read(video, 10, 4)
    with pytest.raises(ValueError, match="fps -1, start 0.0, seconds 0.0: none may be negative"):
        read(video, -1)


@pytest.fixture
def folder(tmp_path):
    """Four good videos of 4 to 30 frames and 2 bad ones."""
    for name, count in (("a", 30), ("b", 20), ("c", 8), ("d", 4)):
        write(tmp_path / f"{name}.mp4", count, height=16, width=24)
    (tmp_path / "bad.mp4").write_bytes(b"?")
    names = ("a", "bad", "b", "absent", "c", "d")
    lines = [json.dumps({"file": f"{n}.mp4", "caption": f"video {n}"}) for n in names]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.csv").write_text("file\na.mp4")
    return tmp_path


def test_folder(folder):
    videos = video_folder.VideoFolder(str(folder))
    assert len(videos) == 6
    video = videos[2]
    assert (video.key, video.caption, video.path) == ("b.mp4", "video b", folder / "b.mp4")
    assert (video.fps, video.height, video.width) == (10, 16, 24)
    assert numbers(video.frames(5)) == list(range(0, 20, 2))
    assert numbers(video.clip(4, fps=5, start=1.5)) == [15, 17, 19, 19]
    assert video.clip(4).shape == (4, 16, 24, 3)
    for index, message in ((1, "bad.mp4: corrupt video"), (3, "absent.mp4: no such file")):
        with pytest.raises(video_folder.BadVideo, match=message):
            videos[index]
    assert video_folder.VideoFolder(str(folder), "a.csv")[0].caption == ""
    (folder / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match="none.jsonl lists no videos; write one video a line"):
        video_folder.VideoFolder(str(folder), "none.jsonl")


def test_rows_are_clips_of_every_good_video(folder, capsys):
    config = clip_rows.ClipRows(str(folder), size=16, frames=4)
    rows = config.rows()
    clips = [rows[i]["clip"] for i in range(36)]
    assert {x.shape for x in clips} == {(4, 16, 16, 3)} and {x.dtype.name for x in clips} == {
        "uint8"
    }
    for x_THWC in clips:
        first, *rest = numbers(x_THWC)
        assert rest == [first + 1, first + 2, first + 3]
    assert len({numbers(x)[0] for x in clips}) > 6
    again = config.rows()
    for i in reversed(range(36)):
        np.testing.assert_array_equal(again[i]["clip"], clips[i])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4  # each of the two once by either
    assert all(line.startswith("skipped: ") for line in lines)
    limited = clip_rows.ClipRows(str(folder), size=16, max_bad=1).rows()
    with pytest.raises(ValueError, match="more than max_bad = 1 bad videos, the last: .*raise max"):
        [limited[i] for i in range(36)]


def test_clips_start_anywhere_within_reach_of_a_keyframe(folder):
    """The three seconds of a.mp4 have one keyframe, the first."""

    def starts(**options):
        rows = clip_rows.ClipRows(str(folder), "a.csv", frames=2, **options).rows()
        return collections.Counter(numbers(rows[i]["clip"])[0] for i in range(60))

    assert set(starts(reach=0.5)) <= set(range(6))
    everywhere = starts(reach=3.0)
    assert min(everywhere) < 4 and max(everywhere) > 24
    assert set(starts(fps=0.5, reach=3.0)) <= set(range(10))  # two frames stand for 4 s: 0 and 2


def test_a_video_shorter_than_a_clip_repeats_its_last_frame(folder):
    (folder / "d.csv").write_text("file\nd.mp4")
    rows = clip_rows.ClipRows(str(folder), "d.csv", frames=6).rows()
    assert numbers(rows[0]["clip"]) == [0, 1, 2, 3, 3, 3]


def test_a_clip_is_cut_and_mirrored_as_one(tmp_path):
    x_HWC = np.zeros((16, 32, 3), np.uint8)
    x_HWC[:, :, :] = np.linspace(0, 240, 32)[:, None]
    video_folder.write_video(tmp_path / "a.mp4", [x_HWC] * 4, 10, quality=1)
    (tmp_path / "l.csv").write_text("file\na.mp4")
    rows = clip_rows.ClipRows(str(tmp_path), "l.csv", size=16, augment_flip=True).rows()
    slopes = collections.Counter()
    for i in range(40):
        x_THWC = rows[i]["clip"].astype(int)
        assert np.abs(x_THWC - x_THWC[0]).max() <= 3
        slopes[int(np.sign(x_THWC[0, 8, -1, 0] - x_THWC[0, 8, 0, 0]))] += 1
    assert slopes[1] + slopes[-1] == 40 and min(slopes.values()) > 10


def test_mixed_rows_hold_the_rows_of_both(folder):
    PIL.Image.new("RGB", (20, 20), (9, 9, 9)).save(folder / "i.png")
    (folder / "i.csv").write_text("file\ni.png")
    images = image_folder.ImageRows(str(folder), "i.csv", size=16, augment_shift=3)
    clips = clip_rows.ClipRows(str(folder), "a.csv", size=8)
    rows = clip_rows.MixedRows(images, clips).rows()
    for i in (0, 7, 10**9):
        assert set(rows[i]) == {"image", "clip"}
        np.testing.assert_array_equal(rows[i]["image"], images.rows()[i]["image"])
        np.testing.assert_array_equal(rows[i]["clip"], clips.rows()[i]["clip"])
    assert rows[0]["image"].shape == (16, 16, 3) and rows[0]["clip"].shape == (4, 8, 8, 3)
