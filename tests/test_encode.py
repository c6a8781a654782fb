"""Encoding at scale: plans, all devices, videos, and processes that are killed."""

import base64
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import PIL.Image
import pytest
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor

from benchmarks import tokenizer_encode
from data_pipelines import (
    documents,
    encode,
    encoder,
    filters,
    image_folder,
    plan,
    progress,
    reader,
    sources,
    store,
    video_folder,
)
from data_pipelines import parts as store_parts
from emu3_jax import config as emu3_config
from emu3_jax import vocab as vocabulary
from tests import encoding
from tokenizer import convert, pixels, vq

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = vq.VQConfig(
    codebook_size=64, width=32, multipliers=(1, 2), res_blocks=1, attention_levels=()
)


@pytest.fixture(scope="module")
def tokenizer():
    """A tiny one, with 2x2 pixels a code."""
    return vq.merge(CONFIG, *vq.init(CONFIG, jax.random.key(0)))


@pytest.fixture
def vocab():
    return vocabulary.Vocab({bytes([i]): i for i in range(256)}, codes=64)


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def write_list(directory, files):
    lines = [json.dumps({"file": name, "caption": f"caption of {name}"}) for name in files]
    (directory / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return image_folder.ImageFolder(directory)


# Plans


def test_batches_are_of_one_size_and_full(tmp_path):
    """Equal sizes far apart in the list come together, in its order; a video is alone."""
    sizes = [(16, 16), (24, 16), (16, 16), None, (16, 16), (24, 16), (15, 17)]
    names = [f"{i}.png" if size else f"{i}.MP4" for i, size in enumerate(sizes)]
    for name, size in zip(names, sizes, strict=True):
        if size:
            PIL.Image.new("RGB", size).save(tmp_path / name)
    folder = write_list(tmp_path, [*names, "absent.png"])
    limits = plan.Sizes(min_pixels=64, max_pixels=1 << 20, factor=8)
    most = {(16, 16): 3, (16, 24): 5}
    planner = plan.Planner(folder, limits, lambda *size: most[size], lambda file: [(0.0, 5.0)])
    made = planner.plan(range(1, 8))
    assert made.batches == [
        plan.Batch((1, 5), (16, 24)), plan.Batch((2, 4, 6), (16, 16)),
        plan.Batch((3,), None, 0.0, 5.0),
    ]  # fmt: skip
    assert [str(error) for error in made.bad] == [f"{tmp_path / 'absent.png'}: no such file"]
    most[16, 16] = 2
    batches = planner.plan(range(8)).batches
    assert [batch.members for batch in batches] == [(0, 2), (1, 5), (3,), (4, 6)]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_headers_tell_the_size_that_reading_gives(tmp_path, suffix, orientation):
    path = tmp_path / f"turned.{suffix}"
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = orientation
    PIL.Image.new("RGB", (30, 20)).save(path, exif=exif)
    size = plan.read_size(path)
    assert size == image_folder.read_image(path).shape[:2]
    assert size == ((30, 20) if orientation > 4 else (20, 30))


def test_headers_are_read_without_decoding(tmp_path, monkeypatch):
    names = ["a.png", "a.jpg", "a.webp"]
    for name in names:
        PIL.Image.new("RGB", (30, 20)).save(tmp_path / name)
    monkeypatch.setattr(PIL.Image.Image, "load", None)
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", None)
    assert {plan.read_size(tmp_path / name) for name in names} == {(20, 30)}


def test_without_aspects_sizes_are_emu3s():
    limits = plan.Sizes(512 * 512, 1024 * 1024, 8)
    for height, width in np.random.default_rng(0).integers(400, 2000, (50, 2)).tolist():
        assert limits.target(height, width) == pixels.smart_resize(height, width)
    with pytest.raises(ValueError, match="aspect ratio above 5"):
        limits.target(100, 600)


def test_aspects_make_sizes_few():
    limits = plan.Sizes(512 * 512, 1024 * 1024, 8, aspects=9)
    seen = set()
    for height, width in np.random.default_rng(0).uniform(np.log(100), np.log(4000), (999, 2)):
        height, width = round(np.exp(height)), round(np.exp(width))
        if max(height, width) > 5 * min(height, width):
            continue
        new_height, new_width = limits.target(height, width)
        assert new_height % 8 == new_width % 8 == 0
        assert 0.96 * 512 * 512 < new_height * new_width < 1.04 * 1024 * 1024
        # ratios are a factor of 25 ** (1 / 9) apart
        stretch = (height / width) / (new_height / new_width)
        assert abs(np.log(stretch)) < np.log(25) / 18 + 0.03
        seen.add((new_height, new_width))
    assert len(seen) == 27 and {(512, 512), (1024, 1024)} <= seen
    assert limits.target(800, 800) == (728, 728) and limits.target(720, 720) == (512, 512)


def test_what_stands_out_is_cut_only_with_aspects(tmp_path):
    """A dark frame around a light square: gone where the square is the target."""
    image_HWC = np.zeros((16, 24, 3), np.uint8)
    image_HWC[:, 4:20] = 200
    PIL.Image.fromarray(image_HWC).save(tmp_path / "a.png")
    folder = write_list(tmp_path, ["a.png"])
    batch = plan.Batch((0,), None)
    for aspects, size in ((0, (16, 24)), (3, (16, 16))):
        sizes = plan.Sizes(256, 400, 8, aspects)
        assert sizes.target(16, 24) == size
        batch = plan.Batch((0,), size)
        [(_, [read_HWC])] = reader.Reader(folder, sizes, 0).read([batch])
        assert read_HWC.shape == (*size, 3)
        assert read_HWC.min() == (200 if aspects else 0)


@pytest.mark.parametrize("side", [512, 720])
def test_an_area_is_the_references_preparation_of_data(tmp_path, side):
    """Resized to the area by PIL, as the published script does it, then by the processor."""
    processor = Emu3ImageProcessor(do_rescale=False, do_normalize=False)
    sizes = plan.Sizes(512 * 512, 1024 * 1024, 8, area=side * side)
    for i, (height, width) in enumerate(((300, 400), (720, 720), (901, 1203), (200, 960))):
        image = PIL.Image.fromarray(noise(i, height // 8, width // 8)).resize((width, height))
        image.save(tmp_path / f"{i}.png")
        scale = (side * side / (width * height)) ** 0.5
        image = image.resize((int(round(width * scale)), int(round(height * scale))))
        want_CHW = processor(image, return_tensors="np")["pixel_values"][0]
        folder = write_list(tmp_path, [f"{i}.png"])
        batches = plan.Planner(folder, sizes, lambda *size: 1).plan([0]).batches
        assert batches == [plan.Batch((0,), want_CHW.shape[1:])]
        [(_, [read_HWC])] = reader.Reader(folder, sizes, 0).read(batches)
        np.testing.assert_array_equal(read_HWC, want_CHW.transpose(1, 2, 0))


def test_an_area_is_not_a_range_of_one_area():
    """That would round both sides down, or both up."""
    assert plan.Sizes(512 * 512, 1024 * 1024, 8, area=720 * 720).target(901, 1203) == (624, 832)
    assert plan.Sizes(720 * 720, 720 * 720, 8).target(901, 1203) == (616, 824)
    with pytest.raises(ValueError, match="area 9 keeps each image's shape, aspects 3 does not; s"):
        plan.Sizes(1, 1, 8, aspects=3, area=9).check()


# Filters


def test_what_filters_leave_out_is_counted_by_reason(tmp_path, capsys):
    sizes = {"a": (40, 40), "b": (24, 40), "c": (40, 40), "d": (90, 16), "e": (40, 48)}
    for name, size in sizes.items():
        PIL.Image.new("RGB", size).save(tmp_path / f"{name}.png")
    video_folder.write_video(tmp_path / "f.mp4", noise(1, 5, 16, 40), fps=10)
    video_folder.write_video(tmp_path / "g.mp4", noise(1, 5, 40, 40), fps=10)
    (tmp_path / "h.mp4").write_text("no video")
    names = [f"{name}.png" for name in sizes] + ["f.mp4", "g.mp4", "h.mp4"]
    lines = [{"file": name, "score": i, "caption": f"{name} has words"}
             for i, name in enumerate(names)]  # fmt: skip
    lines[2]["caption"] = "none"
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = sources.Images(str(tmp_path))
    chosen = filters.Filters(
        least_side=30, least_caption=5, columns=(filters.Column("score", most=3.0),)
    )

    def keys(name, **options):
        found = encoding.documents(source, tmp_path / name, parts=1, fps=5.0, **options)
        return [document[0] for document in found], store.Store(tmp_path / name).info

    # d.png is too long to be used at all, but what filters leave out is not counted as bad
    found, info = keys("chosen", filters=chosen)
    assert found == ["a.png"] and info["skipped"] == 1
    want = {"caption": 1, "column score": 2, "resolution": 3}
    part = json.loads((tmp_path / "chosen/part-00000-of-00001/part.json").read_text())
    assert part["dropped"] == want
    said = capsys.readouterr().out
    assert "part-00000-of-00001: 3 left out: resolution\n" in said
    assert ": 1 documents, 1 bad skipped, 6 left out\n" in said
    found, info = keys("all")
    assert found == [n for n in names if n not in ("d.png", "h.mp4")] and info["skipped"] == 2
    with pytest.raises(store.StoreError, match="this run has source"):
        keys("all", filters=chosen)
    lines[0]["score"] = 1
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    keys("all")  # without filters a column matters to nobody
    with pytest.raises(store.StoreError, match="this run has source"):
        keys("chosen", filters=chosen)
    with pytest.raises(ValueError, match="least_side -1 is negative"):
        keys("all", filters=filters.Filters(least_side=-1))


# Devices


def test_all_devices_encode_what_one_does(tokenizer):
    """Eight devices, two images each; a short batch is filled up."""
    made = encoder.Encoder(tokenizer, tokens=2 * 8 * 6)
    assert (made.batch(16, 12), made.batch(80, 80)) == (16, 8)
    x_BHWC = noise(0, 13, 16, 12)
    codes_Bthw = made.images(x_BHWC)()
    want_Bhw = tokenizer.encode(pixels.to_float(jax.numpy.asarray(x_BHWC)))
    np.testing.assert_array_equal(codes_Bthw, want_Bhw[:, None])
    assert len(np.unique(codes_Bthw)) > 20


@pytest.mark.parametrize("frames", [1, 10])
def test_videos_as_clips_and_as_a_stream(tokenizer, frames):
    """In pieces as a whole; the modes agree on the first four frames alone."""
    x_THWC = noise(frames, frames, 16, 12)
    filled_BTHWC = pixels.to_float(jax.numpy.asarray(vq.pad_frames(x_THWC, 4)[None]))
    for tokens in (1, 2 * 4 * 8 * 6):
        clips_Bthw = encoder.Encoder(tokenizer, tokens, "clips").video(x_THWC)()
        stream_Bthw = encoder.Encoder(tokenizer, tokens, "stream").video(x_THWC)()
        np.testing.assert_array_equal(clips_Bthw, tokenizer.encode_clips(filled_BTHWC))
        np.testing.assert_array_equal(stream_Bthw, tokenizer.encode_video(filled_BTHWC))
        same_t = (clips_Bthw == stream_Bthw).all((0, 2, 3))
        assert same_t.tolist() == [True] + [False] * (len(same_t) - 1)
    with pytest.raises(ValueError, match="video 'whole' is none of clips, stream"):
        encoder.Encoder(tokenizer, 1, "whole")


# Videos and threads


def make_lake(directory):
    """Twelve images of two sizes, two videos and one that is none."""
    directory.mkdir(exist_ok=True)
    names = [f"{i}.{suffix}" for i in range(4) for suffix in ("png", "jpg", "webp")]
    for i, name in enumerate(names):
        PIL.Image.fromarray(noise(i, 16, 16 + i % 2 * 8)).save(directory / name)
    for name, frames in (("long.mp4", 30), ("short.mp4", 5)):
        video_folder.write_video(directory / name, noise(99, frames, 16, 24), fps=10)
    (directory / "none.mp4").write_text("no video")
    return write_list(directory, [*names[:6], "long.mp4", "none.mp4", "short.mp4", *names[6:]])


def lake_config(directory, **options):
    settings = dict(min_pixels=64, max_pixels=400, factor=2, parts=2, fps=5.0, seconds=2.0)
    places = dict(source=sources.Images(str(directory)), directory=str(directory / "store"))
    return encode.Encode(**settings | places | options)


def test_videos_become_documents(tmp_path, tokenizer, vocab, capsys):
    folder = make_lake(tmp_path)
    made = encoder.Encoder(tokenizer, 256, "stream")
    config = lake_config(tmp_path, video="stream")
    assert encode.encode(config, made, "t", vocab)
    opened = store.Store(tmp_path / "store")
    keys = [entry["file"] for entry in folder.entries if entry["file"] != "none.mp4"]
    assert opened.keys() == keys and opened.info["skipped"] == 1
    assert (opened.info["video"], opened.info["dtype"]) == ("stream", "float32")
    assert "none.mp4: corrupt video" in capsys.readouterr().err
    documents = dict(zip(keys, opened.read(range(len(keys))), strict=True))
    for name, frames in (("long.mp4", 10), ("short.mp4", 3)):
        document = documents[name]
        assert (document.kind, document.fps, document.frames) == (store.VIDEO, 5.0, frames)
        read = list(video_folder.read_frames(tmp_path / name, 5.0, seconds=2.0))
        assert len(read) == frames
        np.testing.assert_array_equal(document.codes_thw, made.video(np.stack(read))()[0])
    assert documents["0.png"].kind == store.IMAGE and documents["0.png"].frames == 0
    np.testing.assert_array_equal(
        documents["0.png"].codes_thw, made.images(noise(0, 1, 16, 16))()[0]
    )
    with pytest.raises(store.StoreError, match="with video stream, this run has video clips; use"):
        encode.encode(dataclasses.replace(config, video="clips"), made, "t", vocab)
    with pytest.raises(store.StoreError, match="with source [0-9a-f]{12}, this run has source"):
        encode.encode(dataclasses.replace(config, fps=6.0), made, "t", vocab)


def test_a_videos_own_rate_is_kept_at_fps_0(tmp_path, tokenizer, vocab):
    make_lake(tmp_path)
    made = encoder.Encoder(tokenizer, 256)
    encode.encode(lake_config(tmp_path, fps=0.0, seconds=0.0), made, "t", vocab)
    opened = store.Store(tmp_path / "store")
    documents = opened.read(range(len(opened)))
    videos = [document for document in documents if document.kind == store.VIDEO]
    assert [(document.fps, document.frames) for document in videos] == [(10.0, 30), (10.0, 5)]


def test_videos_by_scenes(tmp_path, capsys):
    """Two seconds of one scene, 0.4 of another, three of a third; and a video without any."""
    levels = [(40, 20), (120, 4), (200, 30)]
    frames = [np.full((16, 24, 3), level, np.uint8) for level, n in levels for _ in range(n)]
    video_folder.write_video(tmp_path / "film.mp4", frames, fps=10)
    video_folder.write_video(tmp_path / "short.mp4", frames[:5], fps=10)
    write_list(tmp_path, ["film.mp4", "short.mp4"])

    def documents(name, **options):
        source = sources.Videos(str(tmp_path))
        settings = dict(parts=1, max_pixels=400, fps=5.0) | options
        return encoding.documents(source, tmp_path / name, **settings)

    found = documents("clips", clip_seconds=(1.0, 2.0))
    starts = [float(document[0].removeprefix("film.mp4#")) for document in found]
    assert starts == [0.0, 2.4, 3.8]
    assert [document[1] for document in found] == ["caption of film.mp4"] * 3
    assert [round(4 * np.mean(document[2]) / 20) for document in found] == [2, 10, 10]
    assert [document[3:] for document in found] == [(5.0, 10), (5.0, 7), (5.0, 8)]
    info = json.loads((tmp_path / "clips/part-00000-of-00001/part.json").read_text())
    assert (info["dropped"], info["skipped"]) == ({"scene": 1}, 0)
    assert "1 left out: scene\n" in capsys.readouterr().out
    assert [document[0] for document in documents("whole")] == ["film.mp4", "short.mp4"]
    with pytest.raises(store.StoreError, match="this run has source"):
        documents("clips", clip_seconds=(1.0, 3.0))
    with pytest.raises(ValueError, match="clip_seconds 2 to 1: want least and most, "):
        documents("clips", clip_seconds=(2.0, 1.0))


def files(directory) -> dict[str, bytes]:
    """The bytes of all files below a directory."""
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def test_stores_are_equal_whatever_the_timing(tmp_path, tokenizer, vocab, monkeypatch):
    """One thread or eight, and batches that are late in any order."""
    make_lake(tmp_path)
    made, read, chance = encoder.Encoder(tokenizer, 256), image_folder.read_image, random.Random(0)

    def late(path):
        time.sleep(chance.uniform(0, 0.02))
        return read(path)

    config = lake_config(tmp_path)
    encode.encode(config, made, "t", vocab)
    monkeypatch.setattr(image_folder, "read_image", late)
    for threads in (1, 8):
        monkeypatch.setattr(os, "cpu_count", lambda threads=threads: threads)
        again = dataclasses.replace(config, directory=str(tmp_path / f"with{threads}"))
        encode.encode(again, made, "t", vocab)
        assert files(tmp_path / f"with{threads}") == files(tmp_path / "store")


def test_a_batch_is_begun_before_the_one_before_is_fetched(tmp_path, vocab):
    for i in range(6):
        PIL.Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
    write_list(tmp_path, [f"{i}.png" for i in range(6)])
    events = []

    class Slow:
        def batch(self, height, width):
            return 2

        def images(self, x_BHWC):
            number = len([event for event in events if event[0] == "begin"])
            events.append(("begin", number))

            def fetch():
                events.append(("fetch", number))
                return np.zeros((len(x_BHWC), 1, 2, 2), np.int32)

            return fetch

    config = lake_config(tmp_path, factor=8, parts=1)
    encode.encode(config, Slow(), "t", vocab)
    want = [("begin", 0), ("begin", 1), ("fetch", 0), ("begin", 2), ("fetch", 1), ("fetch", 2)]
    assert events == want


def test_progress_tells_rates_and_the_time_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "time", lambda: now[0])
    shown = progress.Progress("store", 100)
    for now[0] in (1.0, 2.0, 8.0):
        shown.add(10, 40960)
    assert capsys.readouterr().out == (
        "store  30/100 files  3.75 files/s  15,360 tokens/s  0:19 left\n"
    )


@pytest.mark.parametrize(
    "kind, field, value",
    [("images", "list", ""), ("videos", "directory", "d"), ("webdataset", "shards", "d/a-*.tar"),
     ("parquet", "files", "d"), ("tfds", "split", "train[:9]")],
)  # fmt: skip
def test_the_command_takes_every_source(kind, field, value):
    flags = [f"--config.source.{field}={value}", "--config.filters.least_side=512"]
    flags += ["--config.clip_seconds=2,4.5", "--config.area=518400", "--config.aspects=0"]
    job = emu3_config.load([f"--config=configs/encode.py:{kind}", *flags])
    want = {"images": "Images", "videos": "Videos", "webdataset": "WebDataset",
            "parquet": "Parquet", "tfds": "Tfds"}[kind]  # fmt: skip
    assert type(job.source).__name__ == want and getattr(job.source, field) == value
    assert (job.filters, job.clip_seconds) == (filters.Filters(least_side=512), (2.0, 4.5))
    assert emu3_config.from_json(emu3_config.to_json(job)) == job
    with pytest.raises(ValueError, match="no source 'tar'; take one of images, videos, webd"):
        emu3_config.load(["--config=configs/encode.py:tar"])


# Processes


def test_many_finish_a_store_at_once(tmp_path):
    """Whole at any time, the same at the end, and nothing is left, also of who was killed."""
    for part in range(2):
        path = store.part_path(tmp_path, part, 2)
        store_parts.write(path, [store.Document("k", np.zeros(1, np.uint32))], store.Fingerprints())
    (tmp_path / "store.json.0123.tmp").write_text('{"half')

    def finish(_):
        done = store.finish(tmp_path, 2, "source", "CC0")
        return done and json.loads((tmp_path / "store.json").read_text())["documents"]

    for _ in range(20):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(finish, range(8))) == [2] * 8
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["part-00000-of-00002", "part-00001-of-00002", "store.json"]
        (tmp_path / "store.json").unlink()


class Run:
    """Encoding in two processes by the one command."""

    def __init__(self, directory: pathlib.Path, tokenizer: vq.VQ, parts: int):
        self.directory, self.parts = directory, parts
        convert.save(tokenizer, directory / "tokenizer")
        ranks = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
        (directory / "vocab.tiktoken").write_text("".join(ranks))
        names = [f"{i}.png" for i in range(3 * parts)]
        for i, name in enumerate(names):
            PIL.Image.fromarray(noise(i, 16, 16 + i % 2 * 8)).save(directory / name)
        write_list(directory, names)
        self.environ = os.environ | dict(
            XLA_FLAGS=os.environ["XLA_FLAGS"].replace("count=8", "count=2"),
            JAX_COMPILATION_CACHE_DIR=str(directory / "cache"),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        )  # fmt: skip

    def start(self, name: str, *overrides: str, **environ: str) -> tuple:
        """A process, and the file that it prints to."""
        settings = {"source.directory": self.directory} | dict(
            tokenizer=self.directory / "tokenizer", factor=2, codes=64, tokens=256,
            vocab=self.directory / "vocab.tiktoken", directory=self.directory / name,
            parts=self.parts, min_pixels=64, max_pixels=400, aspects=0,
        )  # fmt: skip
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        command = [sys.executable, "-m", "emu3_jax.launch", "--config=configs/encode.py", *flags]
        environ = self.environ | environ
        with tempfile.NamedTemporaryFile(dir=self.directory, suffix=".log", delete=False) as log:
            child = subprocess.Popen([*command, *overrides], cwd=ROOT, env=environ, stdout=log)
        return child, pathlib.Path(log.name)

    def start_two(self, name: str) -> list[subprocess.Popen]:
        """Two of one run, which divide the parts by themselves."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environ = dict(EMU3_NUM_PROCESSES="2", JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}")
        return [self.start(name, EMU3_PROCESS_ID=str(i), **environ)[0] for i in (0, 1)]


def kill_often(run: Run, worker: int, kills: int) -> int:
    """Kills a process again and again; how many parts these kills caught half-written.

    A moment is random, in the time that a part takes, after it has written one to three.
    """
    written = [p.stat().st_mtime for p in (run.directory / "undisturbed").glob("*/part.json")]
    seconds = (max(written) - min(written)) / (run.parts / 2 - 1)
    chance, caught = random.Random(worker), 0
    for _ in range(kills):
        child, log = run.start("killed", "--config.workers=2", f"--config.worker={worker}")
        parts = chance.randint(1, 3)
        while log.read_text().count(" documents\n") < parts:
            assert child.poll() is None, f"ended with {child.poll()} before {parts} parts"
            time.sleep(0.001)
        time.sleep(chance.uniform(0, seconds))
        child.kill()
        assert child.wait() == -9, "ended before it was killed"
        begun = [store.part_path(run.directory / "killed", part, run.parts)
                 for part in range(worker, run.parts, 2)]  # fmt: skip
        caught += sum(path.exists() and not (path / "part.json").exists() for path in begun)
    return caught


@pytest.mark.parametrize(
    "kills", [2, pytest.param(10, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_processes_that_are_killed_leave_the_same_store(tmp_path, tokenizer, kills):
    """kill -9 of each of two, often, at moments of its own; then one process goes on to the end.

    Not one byte differs from the store of two that nobody disturbed.
    """
    run = Run(tmp_path, tokenizer, parts=16 * kills)
    assert [child.wait() for child in run.start_two("undisturbed")] == [0, 0]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        caught = sum(pool.map(kill_often, [run, run], [0, 1], [kills, kills]))
    done = len(list((tmp_path / "killed").glob("*/part.json")))
    assert 2 * kills <= done < run.parts
    child, _ = run.start("killed")
    assert child.wait() == 0
    assert files(tmp_path / "killed") == files(tmp_path / "undisturbed")
    store.Store(tmp_path / "killed").verify()
    print(f"{2 * kills} kills caught {caught} parts half-written; {done} of {run.parts} were there")


# The benchmark


def test_the_benchmark_compares_equal_codes(capsys, monkeypatch):
    """In one process and on one device here, to save time."""

    def start(argv, directory, side, case=()):
        flags = [f"--side={side}", f"--directory={directory}", f"--case={json.dumps(case)}"]
        tokenizer_encode.main([*argv, *flags])
        out = capsys.readouterr().out
        return json.loads(out) if case else {}

    monkeypatch.setattr(tokenizer_encode, "start", start)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    tokenizer_encode.main(["--tiny", "--rounds=2"])
    figures = json.loads(capsys.readouterr().out)
    assert (figures["benchmark"], figures["cores"]) == ("tokenizer_encode", os.cpu_count())
    [case] = figures["cases"]
    assert case["equal_codes"] == 1 and case["different_codes"] > 10
    speed = case["images_per_second"]
    assert case["ratio"] == pytest.approx(speed["jax"] / speed["torch"], abs=0.01)
    assert min(case["peak_gib"].values()) > 0


def test_conversations_about_images(tmp_path, capsys):
    """The column's conversation is stored in its pieces, ready for the layout chat; bad ones are
    bad files."""
    talk = [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog"},
        {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes"},
    ]  # fmt: skip
    lines = [{"file": f"{i}.jpg"} for i in range(3)]
    lines[0]["talk"], lines[1]["talk"] = talk, talk[:1]
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(encoding.picture(i))
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = encode.Encode(source=sources.Images(str(tmp_path), "talks.jsonl"), conversation="talk",
                        directory=str(tmp_path / "s"), min_pixels=64, max_pixels=1024)  # fmt: skip
    assert encode.encode(job, encoding.FakeTokenizer(), "t" * 64, encoding.VOCAB)
    errors = capsys.readouterr().err
    assert "1.jpg: 1 turns: the last question has no answer" in errors
    assert "2.jpg: no column 'talk'" in errors
    (document,) = store.Store(str(tmp_path / "s")).read([0])
    ends = np.cumsum(document.turns)
    pieces = [encoding.VOCAB.decode(p) for p in np.split(document.text, ends)[:-1]]
    assert pieces == ["You are a helpful assistant. USER: ", "What?. ASSISTANT:", " A dog",
                      "USER: Sure?. ASSISTANT:", " Yes"]  # fmt: skip
    ids, _ = documents.build(document, documents.Layout("chat"), encoding.VOCAB)
    assert isinstance(encoding.VOCAB.parse(ids)[1], vocabulary.Image)
