"""What the writers leave for each benchmark's scorer, file by file, with pictures of one colour.

The colour of a drawing says its prompt and seed.
"""

import hashlib
import json
import os
import pathlib
import re

import av
import numpy as np
import PIL.Image
import pytest

from emu3_jax import packages
from inference import benchmarks, prompts
from inference.benchmarks import WriteBenchmark

SIDE = 8


def colour(prompt: str, seed: int) -> list[int]:
    """The colour of a drawing."""
    return [*hashlib.sha256(prompt.encode()).digest()[:2], seed]


class Artist:
    """Draws squares of one colour; stops with an error once `last` are drawn, if that is given."""

    def __init__(self, last: int | None = None, shape: tuple[int, ...] = (SIDE, SIDE)):
        self.calls, self._left, self._shape = [], last, shape

    def __call__(self, texts: list[str], seeds: list[int]) -> list:
        self.calls.append(list(zip(texts, seeds, strict=True)))
        if self._left is not None:
            if self._left < len(texts):
                raise KeyboardInterrupt
            self._left -= len(texts)
        return [self.one(text, seed) for text, seed in self.calls[-1]]

    @property
    def drawn(self) -> list[tuple[str, int]]:
        """All (prompt, seed) so far."""
        return [one for call in self.calls for one in call]

    def one(self, text: str, seed: int):
        """One picture."""
        return np.full((*self._shape, 3), colour(text, seed), np.uint8)


class Filmmaker(Artist):
    """Draws videos of grey frames that become lighter."""

    def one(self, text: str, seed: int):
        """One video of four frames, eight a second."""
        frames = [np.full((*self._shape, 3), 40 * t + 10 * seed, np.uint8) for t in range(4)]
        return np.stack(frames), 8


def files(directory: pathlib.Path) -> list[str]:
    """Every file below a directory."""
    found = (p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    return sorted(found)


def read(path: pathlib.Path) -> tuple[np.ndarray, dict]:
    """The pixels and texts of a PNG."""
    with PIL.Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.asarray(image), image.text


def write(path: pathlib.Path, content: str | bytes) -> str:
    """A file with this content -> its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


# Unusual spacing, an escape and no newline at the end: all of it stays in metadata.jsonl.
METADATA = [
    b'{"tag": "single_object", "include": [{"class": "bench"}], "prompt": "a photo of a bench"}\n',
    b'{"prompt":"a caf\\u00e9","tag":"colors",   "include":[]}\r\n',
    b'{"tag": "counting", "prompt": "two cows"}',
]


@pytest.fixture
def geneval(tmp_path) -> WriteBenchmark:
    path = write(tmp_path / "evaluation_metadata.jsonl", b"".join(METADATA))
    return WriteBenchmark("geneval", path, str(tmp_path / "out"), batch=5)


def test_geneval(geneval, tmp_path):
    geneval.run_with(Artist())
    out = tmp_path / "out"
    samples = [f"samples/{sample:04}.png" for sample in range(4)]
    assert files(out) == [
        f"{index:05}/{name}" for index in range(3) for name in ["metadata.jsonl", *samples]
    ]
    for index, (line, text) in enumerate(
        zip(METADATA, ["a photo of a bench", "a caf\u00e9", "two cows"], strict=True)
    ):
        assert (out / f"{index:05}/metadata.jsonl").read_bytes() == line
        for seed in range(4):
            image_HWC, about = read(out / f"{index:05}/samples/{seed:04}.png")
            assert about == dict(prompt=text, seed=str(seed))
            assert image_HWC.shape == (SIDE, SIDE, 3)
            assert (image_HWC == colour(text, seed)).all()


def test_geneval_of_more_prompts_needs_a_directory_of_its_own(geneval, tmp_path):
    geneval.run_with(Artist())
    pathlib.Path(geneval.prompts).write_bytes(METADATA[2] + b"\n" + METADATA[1])
    with pytest.raises(ValueError, match="metadata.jsonl is of other prompts; take another dir"):
        geneval.run_with(Artist())


def test_t2i_compbench(tmp_path):
    """Numbers go through all samples, also of a prompt that is there twice: with other seeds."""
    path = write(tmp_path / "color_val.txt", "a red bench\r\na {b} cat.\tcolor\r\na red bench\r\n")
    WriteBenchmark("t2i_compbench", path, str(tmp_path / "out"), samples=2).run_with(Artist())
    names = {
        "a red bench_000000": 0, "a red bench_000001": 1, "a {b} cat._000002": 0,
        "a {b} cat._000003": 1, "a red bench_000004": 2, "a red bench_000005": 3,
    }  # fmt: skip
    assert files(tmp_path / "out") == sorted(f"samples/{name}.png" for name in names)
    for name, seed in names.items():
        image_HWC, about = read(tmp_path / f"out/samples/{name}.png")
        text = name.split("_")[0]  # as the scorer does
        assert about == dict(prompt=text, seed=str(seed))
        assert (image_HWC == colour(text, seed)).all()


def test_t2i_compbench_draws_ten_a_prompt_of_all_lists_in_a_folder(tmp_path):
    for name in ("color_val.txt", "shape_val.txt", "shape_train.txt", "shape_val_seen.txt"):
        write(tmp_path / "dataset" / name, f"a thing of {name[0]}")
    found = [unit.path for unit in benchmarks.units("t2i_compbench", str(tmp_path / "dataset"))]
    assert found == [
        f"{name}_val/samples/a thing of {name[0]}_{number:06}.png"
        for name in ("color", "shape") for number in range(10)
    ]  # fmt: skip


def test_dpg(tmp_path):
    """Four squares in the order in which compute_dpg_bench.py cuts them; ids with text in them."""
    texts = {"0": "a pool.", "COCOval2014000000516542": "two\nlines", "vrd3": "a bus"}
    for name, text in texts.items():
        write(tmp_path / "prompts" / f"{name}.txt", text + " \n")
    write(tmp_path / "prompts" / "readme.md", "no prompt")
    job = WriteBenchmark("dpg", str(tmp_path / "prompts"), str(tmp_path / "out"), batch=3)
    job.run_with(Artist())
    assert files(tmp_path / "out") == [f"{name}.png" for name in sorted(texts)]
    for name, text in texts.items():
        image_HWC, about = read(tmp_path / f"out/{name}.png")
        assert about == dict(prompt=text, seed="0,1,2,3")
        assert image_HWC.shape == (2 * SIDE, 2 * SIDE, 3)
        cuts = [(0, 0), (SIDE, 0), (0, SIDE), (SIDE, SIDE)]  # left, upper
        for seed, (x, y) in enumerate(cuts):
            assert (image_HWC[y : y + SIDE, x : x + SIDE] == colour(text, seed)).all()


def test_dpg_of_one_image_a_prompt(tmp_path):
    write(tmp_path / "prompts" / "7.txt", "a bus")
    job = WriteBenchmark("dpg", str(tmp_path / "prompts"), str(tmp_path / "out"), samples=1)
    job.run_with(Artist())
    assert (read(tmp_path / "out/7.png")[0] == np.full((SIDE, SIDE, 3), colour("a bus", 0))).all()


def test_dpg_takes_squares_only(tmp_path):
    write(tmp_path / "prompts" / "7.txt", "a bus")
    job = WriteBenchmark("dpg", str(tmp_path / "prompts"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="images of 16x8 px are drawn; the scorer cuts squares"):
        job.run_with(Artist(shape=(8, 16)))
    assert files(tmp_path) == ["prompts/7.txt"]


@pytest.mark.parametrize("layout", ["official", "list"])
def test_mscoco(tmp_path, layout):
    """A caption that two images share gives two pictures."""
    captions = [
        dict(image_id=203564, id=37, caption="A bicycle. "), dict(image_id=9, id=5, caption="A"),
        dict(image_id=203564, id=38, caption="A bicycle."),
    ]  # fmt: skip
    value = dict(info={}, annotations=captions) if layout == "official" else captions
    path = write(tmp_path / "captions.json", json.dumps(value, indent=1))
    WriteBenchmark("mscoco_30k", path, str(tmp_path / "out")).run_with(Artist())
    assert files(tmp_path / "out") == ["37.png", "38.png", "5.png"]
    for name, text, seed in (("37", "A bicycle.", 0), ("38", "A bicycle.", 1), ("5", "A", 0)):
        image_HWC, about = read(tmp_path / f"out/{name}.png")
        assert about == dict(prompt=text, seed=str(seed))
        assert (image_HWC == colour(text, seed)).all()


def test_mscoco_of_more_captions_is_30_000_of_them(tmp_path):
    value = [dict(image_id=f"{i:06}", caption=f"caption {i}") for i in range(30_500)]
    path = pathlib.Path(write(tmp_path / "captions.json", json.dumps(value)))
    found = [prompt.id for prompt in prompts.mscoco(path)]
    assert len(set(found)) == len(found) == 30_000 and found == sorted(found)
    assert found == [prompt.id for prompt in prompts.mscoco(path)]
    assert found[-1] > "030000", "not just the first"


def test_vbench(tmp_path):
    path = write(tmp_path / "color.txt", " A cat, close-up.\nA dog-1\n\u732b\n")
    job = WriteBenchmark("vbench", path, str(tmp_path / "out"), batch=4)
    job.run_with(Filmmaker(shape=(32, 48)))
    texts = ["A cat, close-up.", "A dog-1", "\u732b"]
    names = {f"{text}-{seed}.mp4": (text, seed) for text in texts for seed in range(5)}
    assert files(tmp_path / "out") == sorted(names)
    for name, (text, seed) in names.items():
        with av.open(str(tmp_path / "out" / name)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
            assert stream.average_rate == 8
        found_THWC, (wanted_THWC, _) = np.stack(frames), Filmmaker(shape=(32, 48)).one(text, seed)
        assert found_THWC.shape == wanted_THWC.shape
        assert np.abs(found_THWC.astype(int) - wanted_THWC).max() <= 3


def test_vbench_full_info(tmp_path):
    """A prompt of two dimensions is drawn once, one of temporal flickering 25 times."""
    entries = [
        dict(prompt_en="a", dimension=["color"]), dict(prompt_en="b", dimension=["scene"]),
        dict(prompt_en="c", dimension=["temporal_flickering"]),
        dict(prompt_en="a", dimension=["object_class"], auxiliary_info={}),
    ]  # fmt: skip
    path = write(tmp_path / "VBench_full_info.json", json.dumps(entries))
    found = [unit.path for unit in benchmarks.units("vbench", path)]
    wanted = {"a": 5, "b": 5, "c": 25}
    assert found == [f"{text}-{i}.mp4" for text, count in wanted.items() for i in range(count)]
    path = write(tmp_path / "temporal_flickering.txt", "d")
    assert len(benchmarks.units("vbench", path)) == 25
    assert len(benchmarks.units("vbench", path, samples=2)) == 2


def test_a_job_that_was_killed_goes_on(geneval, tmp_path):
    """After half of the files, one of them half written; nothing is drawn twice."""
    first = Artist(last=6)
    geneval.batch = 2
    with pytest.raises(KeyboardInterrupt):
        geneval.run_with(first)
    out = tmp_path / "out"
    done = [name for name in files(out) if name.endswith(".png")]
    assert len(done) == 6
    before = {name: os.stat(out / name).st_mtime_ns for name in done}
    draft = out / "00002/samples/0001.pngabcd_123"
    write(draft, b"half a fil")
    second = Artist()
    geneval.run_with(second)
    assert not draft.exists()
    assert {name: os.stat(out / name).st_mtime_ns for name in done} == before
    assert sorted(first.drawn[:6] + second.drawn) == sorted(
        (text, seed) for text in ("a photo of a bench", "a caf\u00e9", "two cows")
        for seed in range(4)
    )  # fmt: skip
    third = Artist()
    geneval.run_with(third)
    assert third.drawn == []
    other = tmp_path / "at once"
    WriteBenchmark("geneval", geneval.prompts, str(other)).run_with(Artist())
    assert files(other) == files(out)
    assert all((other / name).read_bytes() == (out / name).read_bytes() for name in files(out))


def test_what_is_half_written_has_the_name_that_is_removed(geneval, tmp_path, monkeypatch):
    """Left by the function that writes files, killed before it renames."""
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packages.write_whole(tmp_path / "out/00001/samples/0000.png", b"half")
    monkeypatch.undo()
    assert len(files(tmp_path / "out")) == 1
    geneval.run_with(Artist())
    assert len(files(tmp_path / "out")) == 15


def test_three_processes_share_the_work(geneval, tmp_path):
    """Each draws something, none what another does; half written files of others stay."""
    artists = [Artist() for _ in range(3)]
    write(tmp_path / "out/00000/samples/0001.pngabcd_123", b"of process 1")
    for process, artist in enumerate(artists):
        geneval.run_with(artist, process, 3)
        assert len(artist.drawn) == 4
        assert (tmp_path / "out/00000/samples/0001.pngabcd_123").exists() == (process == 0)
    together = [one for artist in artists for one in artist.drawn]
    assert len(together) == len(set(together)) == 12
    geneval.directory = str(tmp_path / "alone")
    geneval.run_with(Artist())
    assert files(tmp_path / "alone") == files(tmp_path / "out")


def test_a_tile_belongs_to_one_process(tmp_path):
    for index in range(5):
        write(tmp_path / "prompts" / f"{index}.txt", f"prompt {index}")
    job = WriteBenchmark("dpg", str(tmp_path / "prompts"), str(tmp_path / "out"), batch=3)
    artists = [Artist() for _ in range(3)]
    for process, artist in enumerate(artists):
        job.run_with(artist, process, 3)
    assert [len({text for text, _ in artist.drawn}) for artist in artists] == [2, 2, 1]
    assert files(tmp_path / "out") == [f"{index}.png" for index in range(5)]


def test_drawing_is_done_in_batches(geneval):
    """Of which only the last one is short, and each has other seeds of a prompt."""
    artist = Artist()
    geneval.run_with(artist)
    assert [len(call) for call in artist.calls] == [5, 5, 2]
    assert artist.calls[0] == [("a photo of a bench", seed) for seed in range(4)] + [
        ("a caf\u00e9", 0)
    ]


def test_files_of_another_number_of_samples_are_an_error(tmp_path):
    """They would be scored, too; what a scorer writes is left alone."""
    path = write(tmp_path / "color_val.txt", "a cat\na dog\n")
    out = tmp_path / "out"
    WriteBenchmark("t2i_compbench", path, str(out), samples=1).run_with(Artist())
    write(out / "samples/result.txt", "0.5")
    WriteBenchmark("t2i_compbench", path, str(out), samples=1).run_with(Artist(last=0))
    with pytest.raises(ValueError, match="a dog_000001.png is of other prompts or samples"):
        WriteBenchmark("t2i_compbench", path, str(out), samples=2).run_with(Artist())


GOOD = '{"tag": "a", "prompt": "b"}'
BAD = [
    ("geneval", "m.jsonl", GOOD + '\n{"tag": "a"}', "m.jsonl, line 2: prompt is missing"),
    ("geneval", "m.jsonl", '{"prompt": "a"}', "m.jsonl, line 1: tag is missing"),
    ("geneval", "m.jsonl", '{"tag": "a", "prompt": " "}', "m.jsonl, line 1: the prompt is empty"),
    ("geneval", "m.jsonl", '{"tag": "a", "prompt": 3}', "m.jsonl, line 1: prompt is 3, want text"),
    ("geneval", "m.jsonl", GOOD + "\n\n" + GOOD, "m.jsonl, line 2 is no JSON: Expecting value"),
    ("geneval", "m.jsonl", "[1]", "m.jsonl, line 1 is [1], want an object"),
    ("geneval", "m.jsonl", "", "m.jsonl holds no prompts"),
    ("t2i_compbench", "c.txt", "a\n\nb\n", "c.txt, line 2: the prompt is empty"),
    ("t2i_compbench", "c.txt", "a\nb/c\n", "c.txt, line 2: '/' in 'b/c', which names a file"),
    ("t2i_compbench", "c.txt", "a_b", "c.txt, line 1: '_' in 'a_b'"),
    ("t2i_compbench", "c.txt", "a\n" + 240 * "\u00e9",
     "c.txt, line 2: its file's name has 491 bytes, at most 247"),
    ("t2i_compbench", "c.txt", b"caf\xe9", "c.txt is no UTF-8 (unexpected end of data at byte 3)"),
    ("dpg", "1.txt", "a", "1.txt is no directory; give DPG-Bench's folder"),
    ("dpg", "p/1.txt", "\n", "p/1.txt: the prompt is empty"),
    ("dpg", "p/1.5.txt", "a", "p/1.5.txt: '.' in '1.5', which names"),
    ("dpg", "p/1.md", "a", "p holds no prompts"),
    ("mscoco_30k", "c.json", "{}", "c.json: annotations is missing"),
    ("mscoco_30k", "c.json", "3", "c.json holds 3, want captions"),
    ("mscoco_30k", "c.json", '[{"id": 1,\n]', "c.json is no JSON: "),
    ("mscoco_30k", "c.json", '[{"caption": "a"}]', "c.json, entry 1: image_id is missing"),
    ("mscoco_30k", "c.json", '[{"id": 1}]', "c.json, entry 1: caption is missing"),
    ("mscoco_30k", "c.json", json.dumps(2 * [dict(id=1, caption="a")]),
     "c.json, entry 2: 1.png is also that of "),
    ("mscoco_30k", "c.json", '[{"id": "../a", "caption": "a"}]', "c.json, entry 1: '/' in '../a'"),
    ("vbench", "v.txt", "a\n \n", "v.txt, line 2: the prompt is empty"),
    ("vbench", "v.json", '[{"prompt": "a"}]', "v.json, entry 1: prompt_en is missing"),
    ("vbench", "v.json", '[{"prompt_en": "\\ud83d", "dimension": []}]',
     "v.json, entry 1: prompt_en is"),
    ("vbench", "v.json", "{}", "v.json holds {}, want VBench's list"),
    ("vbench", "v.txt", "a/b", "v.txt, line 1: '/' in 'a/b'"),
]  # fmt: skip


@pytest.mark.parametrize("name, file, content, message", BAD)
def test_bad_prompts_are_told_in_one_line_before_anything_is_drawn(
    name, file, content, message, tmp_path
):
    write(tmp_path / file, content)
    given = tmp_path / file.partition("/")[0]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        WriteBenchmark(name, str(given), str(tmp_path / "out")).run_with(Artist())
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("genneval", {}, "no benchmark 'genneval'; take one of geneval, t2i_compbench, dpg, msco"),
        ("geneval", dict(samples=-1), "samples = -1; the scorer of geneval reads 1 or more"),
        ("dpg", dict(samples=3), "samples = 3; the scorer of dpg reads 1 or 4"),
        ("mscoco_30k", dict(samples=2), "samples = 2; the scorer of mscoco_30k reads 1"),
        ("geneval", dict(batch=0), "batch = 0; want 1 or more"),
        ("geneval", {}, "missing.jsonl can't be read: No such file"),
    ],
)
def test_bad_settings_are_told(name, fields, message, tmp_path):
    job = WriteBenchmark(name, str(tmp_path / "missing.jsonl"), str(tmp_path / "out"), **fields)
    with pytest.raises(ValueError, match=re.escape(message)):
        job.run_with(Artist())


def test_a_name_that_just_fits_is_written(tmp_path):
    text = "a" * (benchmarks.LONGEST_NAME - len("_000000.png"))
    path = write(tmp_path / "color_val.txt", text)
    WriteBenchmark("t2i_compbench", path, str(tmp_path / "out"), samples=1).run_with(Artist())
    assert files(tmp_path / "out") == [f"samples/{text}_000000.png"]


def test_videos_of_odd_sides_are_an_error(tmp_path):
    path = write(tmp_path / "color.txt", "a")
    job = WriteBenchmark("vbench", path, str(tmp_path / "out"))
    with pytest.raises(ValueError, match="frames of 33x32 px; mp4 takes even sides"):
        job.run_with(Filmmaker(shape=(32, 33)))
