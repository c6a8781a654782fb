"""The evaluation job on tokenizers whose errors are known, and on a real one."""

import csv
import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from configs import evaluate_tokenizer
from emu3_jax import launch
from tokenizer import convert, evaluate, lpips, measures, records, vq
from tokenizer.config import VQConfig

NOTHING = evaluate.Judges({}, ())


class Greys:
    """A code for every 8x8 pixels: the mean level, in steps of 16 (of 256)."""

    config = VQConfig(codebook_size=16)

    def __init__(self):
        self.clips = []

    def encode(self, x_BHWC):
        B, H, W, _ = x_BHWC.shape
        mean_Bhw = jnp.mean(x_BHWC.reshape(B, H // 8, 8, W // 8, 8, 3), axis=(2, 4, 5))
        return ((mean_Bhw + 1) * 127.5 / 16).astype(jnp.int32)

    def decode(self, codes_Bhw):
        level_BHW = jnp.repeat(jnp.repeat(codes_Bhw * 16 + 8.0, 8, axis=1), 8, axis=2)
        return jnp.repeat(level_BHW[..., None] / 127.5 - 1, 3, axis=3)

    def encode_clips(self, x_BTHWC):
        self.clips.append(x_BTHWC)
        return jnp.stack([self.encode(x_THWC[::4]) for x_THWC in x_BTHWC])

    def decode_clips(self, codes_Bthw):
        return jnp.stack([jnp.repeat(self.decode(codes_thw), 4, 0) for codes_thw in codes_Bthw])


@dataclasses.dataclass
class Record:
    key: str
    image_HWC: np.ndarray


@dataclasses.dataclass
class Video:
    """A second of frames, each of one level; at another rate the nearest of them."""

    key: str
    levels: list[int]

    def frames(self, fps):
        for t in range(int(fps)):
            yield np.full((16, 16, 3), self.levels[t * len(self.levels) // int(fps)], np.uint8)


def flat(*levels, size=16):
    return [Record(f"{level}", np.full((size, size, 3), level, np.uint8)) for level in levels]


class Reads(list):
    """A source that counts what was read; what is an error is raised."""

    read = 0

    def __getitem__(self, index):
        self.read += 1
        record = super().__getitem__(index)
        if isinstance(record, Exception):
            raise record
        return record


def psnr(*errors):
    return np.mean([10 * np.log10(255**2 / error**2) for error in errors])


def test_figures_are_means_over_images_and_counts_over_the_set():
    # Levels 8, 25 and 20 become 8 + 16 k: 8 (exact), 24 and 24.
    job = evaluate.Evaluate(batch=2, shown=2)
    result = evaluate.measure(job, Greys(), NOTHING, flat(10, 25, 20), "images", 16)
    expected = dict(
        psnr_db=psnr(2, 1, 4), codebook_usage=2 / 16, tokens=12, count=3, skipped=0,
        bits_per_pixel=4 / 64, entropy_bits=pytest.approx(np.log2(3) - 2 / 3),
        perplexity=pytest.approx(3 / 2 ** (2 / 3)),
    )  # fmt: skip
    assert {name: result.figures[name] for name in expected} == pytest.approx(expected)
    assert [row["key"] for row in result.rows] == ["10", "25", "20"]
    assert [card.row["key"] for card in result.cards["worst"]] == ["20", "10"]
    assert [card.row["key"] for card in result.cards["best"]] == ["25", "10"]
    card = result.cards["worst"][0]
    assert (card.real_HWC == 20).all() and (card.made_HWC == 24).all()


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_filling_up_a_batch_changes_nothing(batch):
    rng = np.random.default_rng(0)
    images = [Record(str(i), rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for i in range(5)]
    two, other = (
        evaluate.measure(evaluate.Evaluate(batch=b), Greys(), NOTHING, images, "images", 16)
        for b in (2, batch)
    )
    assert other.figures == pytest.approx(two.figures, rel=1e-6)
    assert [r["key"] for r in other.rows] == ["0", "1", "2", "3", "4"]


def test_a_size_compiles_once():
    before = evaluate.compare._cache_size()
    for count in (5, 7):
        images = flat(*range(count), size=24)
        evaluate.measure(evaluate.Evaluate(batch=3), Greys(), NOTHING, images, "images", 24)
    assert evaluate.compare._cache_size() == before + 1


def test_videos_are_means_over_frames_then_videos():
    """12 frames a second of 24; the 6 taken are 0, 20, ..., 100 and 7 throughout."""
    videos = [Video("ramp", list(range(0, 240, 10))), Video("flat", [7] * 24), Video("cut", [])]
    videos[2].frames = lambda fps: iter(list(videos[1].frames(fps))[:4])
    model, job = Greys(), evaluate.Evaluate(batch=16, frames=6)
    result = evaluate.measure(job, model, NOTHING, Reads(videos), "videos", 16)
    # Every clip is 4 frames, the second one filled up; its first frame stands for all (see Greys).
    (clips_BTHWC,) = model.clips
    np.testing.assert_allclose((clips_BTHWC[0, :, 0, 0, 0] + 1) * 127.5,
                               [0, 20, 40, 60, 80, 100, 100, 100], atol=1e-4)  # fmt: skip
    ramp = psnr(8, 12, 32, 52, 8, 12)  # frames 0 and 80 become 8 and 88
    np.testing.assert_allclose([row["psnr_db"] for row in result.rows], [ramp, psnr(1)], rtol=1e-12)
    assert result.figures["psnr_db"] == pytest.approx((ramp + psnr(1)) / 2)
    assert result.figures["tokens"] == 2 * 2 * 4
    assert result.figures["bits_per_pixel"] == pytest.approx(4 * 16 / (2 * 6 * 256))
    assert result.figures["count"] == 2 and result.figures["skipped"] == 1
    assert result.cards["best"][0].real_HWC[0, 0, 0] == 7


def test_a_short_video_is_told(capsys):
    videos = Reads([Video("short", [1, 2]), Video("long", [3] * 12)])
    videos[0].frames = lambda fps: iter([np.zeros((16, 16, 3), np.uint8)] * 5)
    evaluate.measure(evaluate.Evaluate(), Greys(), NOTHING, videos, "videos", 16)
    assert "skipped: short: 5 frames at 12 a second, not 8" in capsys.readouterr().err


def test_bad_records_are_named_and_counted(capsys):
    images = Reads([*flat(1), ValueError("b.png: corrupt"), *flat(2, 3)])
    job = evaluate.Evaluate(batch=2, max_bad=1)
    result = evaluate.measure(job, Greys(), NOTHING, images, "images", 16)
    assert result.figures["count"] == 3 and result.figures["skipped"] == 1
    assert capsys.readouterr().err == "skipped: b.png: corrupt\n"
    images.append(ValueError("e.png: corrupt"))
    with pytest.raises(ValueError) as error:
        evaluate.measure(job, Greys(), NOTHING, images, "images", 16)
    assert str(error.value) == (
        "images: more than max_bad = 1 cannot be used, the last: e.png: corrupt; "
        "repair them or raise max_bad"
    )
    with pytest.raises(ValueError) as error:
        evaluate.measure(job, Greys(), NOTHING, Reads(images[1:2]), "images", 16)
    assert str(error.value) == "images: none of 1 can be used, the last: b.png: corrupt"


def test_a_limit_takes_the_first():
    images = Reads(flat(10, 20, 30, 40))
    result = evaluate.measure(
        evaluate.Evaluate(limit=3), Greys(), NOTHING, images, "images", 16
    )
    assert [row["key"] for row in result.rows] == ["10", "20", "30"] and images.read == 3


def test_reading_ahead_is_bounded():
    images = Reads(flat(*range(200)))
    found = records.read(images, 200, records.image_frame, 16)
    for _ in range(10):
        next(found)
    assert 10 <= images.read <= 10 + records.READ_AHEAD + 1
    assert len(list(found)) == 190


def test_fitting_resizes_the_shorter_side_and_cuts_the_centre():
    wide_HWC = np.zeros((16, 40, 3), np.uint8)
    wide_HWC[:, 12:28] = 200
    assert (records.fit(wide_HWC, 16) == 200).all()
    for size in (8, 32):
        fitted = records.fit(wide_HWC, size)
        assert fitted.shape == (size, size, 3)
        assert (fitted[:, size // 4 : -size // 4] == 200).all()
    tall_HWC = np.random.default_rng(0).integers(0, 256, (30, 10, 3), dtype=np.uint8)
    whole = PIL.Image.fromarray(tall_HWC).resize((8, 24), PIL.Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(records.fit(tall_HWC, 8), np.asarray(whole)[8:16])


@pytest.fixture
def judges(monkeypatch):
    """LPIPS is the largest value it is given; the features are the image's mean level."""
    monkeypatch.setattr(
        lpips, "distance", lambda name, params, x, y: jnp.max(y, (1, 2, 3)) + params.shape[0]
    )
    levels = lambda params, x: jnp.repeat(x.mean((1, 2)), params.shape[0], 1)  # noqa: E731
    monkeypatch.setattr(evaluate, "FEATURES", {"fd_vgg16": levels, "rfid": levels})
    params = {"vgg": jnp.ones(2), "alex": jnp.zeros(3), "inception": jnp.zeros(5)}
    return evaluate.Judges(params, ("lpips_alex", "lpips_vgg", "fd_vgg16", "rfid"))


class Bright(Greys):
    """A grey image is made too bright for pixels: 1.4 beside 0.3 of a level."""

    def decode(self, codes_Bhw):
        x_BHWC = super().decode(codes_Bhw)
        return jnp.full_like(x_BHWC, 1.4).at[:, ::2].set(0.3 / 127.5 - 1)


def test_networks_see_clipped_pixels_and_the_frechet_distance_8_bit_ones(judges):
    result = evaluate.measure(
        evaluate.Evaluate(batch=2), Bright(), judges, flat(0, 100, 255), "images", 16
    )
    assert result.figures["lpips_alex"] == pytest.approx(1 + 3)
    assert result.figures["lpips_vgg"] == pytest.approx(1 + 2)
    real_N, made = np.array([0, 100, 255]) / 127.5 - 1, 0.0  # 8-bit: 255 beside 0
    apart = (real_N.mean() - made) ** 2 + np.var(real_N, ddof=1)  # of each of 3 x 2, 3 x 5 features
    assert result.figures["fd_vgg16"] == pytest.approx(6 * apart, rel=1e-5)
    assert result.figures["rfid"] == pytest.approx(15 * apart, rel=1e-5)
    alone = evaluate.measure(evaluate.Evaluate(), Bright(), judges, flat(1), "images", 16)
    assert "fd_vgg16" not in alone.figures


TINY = VQConfig(codebook_size=64, width=32, multipliers=(1, 1), res_blocks=1, attention_levels=())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tokenizer's directory and one of five images and a broken one."""
    params, stats = vq.init(TINY, jax.random.key(0))
    path = tmp_path_factory.mktemp("evaluate")
    convert.save(vq.merge(TINY, params, stats), path / "tokenizer")
    rng = np.random.default_rng(0)
    names = ["one.png", "two.png", "<b>.png", "four.png", "five.png", "lost.png"]
    for name in names[:-1]:
        pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(path / name)
    lines = [json.dumps({"file": name}) for name in names]
    (path / "captions.jsonl").write_text("\n".join(lines))
    return path


def job_of(path, directory, **fields):
    job = evaluate_tokenizer.get_config()
    job.images.directory = str(path)
    job.tokenizer, job.directory = str(path / "tokenizer"), str(directory)
    fields = dict(sizes=(16, 24), batch=2, figures=(), shown=2) | fields
    for name, value in fields.items():
        setattr(job, name, value)
    return job


def test_the_job_writes_figures_report_and_values(tiny, tmp_path, capsys):
    job_of(tiny, tmp_path).run()
    assert "lost.png: no such file" in capsys.readouterr().err
    values = json.loads((tmp_path / "evaluation.json").read_text())
    model = convert.load(tiny / "tokenizer")
    assert values["fingerprint"] == convert.fingerprint(model)
    assert list(values["figures"]) == ["images-16", "images-24"]
    figures = values["figures"]["images-24"]
    assert (figures["count"], figures["skipped"], figures["tokens"]) == (5, 1, 5 * 12 * 12)
    assert set(figures) <= set(evaluate.MEANING)

    image_HWC = records.fit(np.asarray(PIL.Image.open(tiny / "<b>.png")), 24)
    codes_Bhw = model.encode(image_HWC[None] / np.float32(127.5) - 1)
    made_BHWC = np.asarray(measures.rounded(model.decode(codes_Bhw)))
    rows = list(csv.DictReader((tmp_path / "images-24" / "values.csv").open()))
    assert rows[2]["key"] == "<b>.png"
    expected = measures.psnr_db(image_HWC[None], made_BHWC)[0]
    assert float(rows[2]["psnr_db"]) == pytest.approx(expected, abs=0.01)
    assert np.mean([float(row["ssim"]) for row in rows]) == pytest.approx(figures["ssim"])

    page = (tmp_path / "report.html").read_text()
    assert "<b>.png" not in page and "&lt;b&gt;.png" in page
    assert len(re.findall("<img alt=made src='data:image/png;base64,", page)) == 2 * 3 * 2
    assert page.count("<img class=plot") == 1
    for name, value in figures.items():
        assert f"<code>{name}</code>" in page and evaluate.MEANING[name] in page
        assert f"{value:,}" in page or f"{value:.4g}" in page


def test_what_is_measured_is_not_measured_again(tiny, tmp_path, capsys, monkeypatch):
    job_of(tiny, tmp_path, sizes=(16,)).run()
    before = (tmp_path / "evaluation.json").read_text()
    asked = []
    measure = evaluate.measure
    monkeypatch.setattr(
        evaluate, "measure", lambda *args: (asked.append(args[-1]), measure(*args))[1]
    )
    job_of(tiny, tmp_path, sizes=(16,)).run()
    assert asked == [] and (tmp_path / "evaluation.json").read_text() == before
    assert f"{tmp_path}/images-16: evaluated" in capsys.readouterr().out
    job_of(tiny, tmp_path).run()  # one more size
    assert asked == [24]
    (tmp_path / "images-16" / "figures.json").unlink()  # as if it had been interrupted
    job_of(tiny, tmp_path).run()
    assert asked == [24, 16]
    job_of(tiny, tmp_path, limit=2).run()
    assert asked == [24, 16, 16, 24]
    values = json.loads((tmp_path / "evaluation.json").read_text())
    assert values["figures"]["images-16"]["count"] == 2


def test_the_command_line(tiny, tmp_path, capsys):
    command = ["--config=configs/evaluate_tokenizer.py", f"--config.tokenizer={tiny}/tokenizer",
               f"--config.images.directory={tiny}", f"--config.directory={tmp_path}",
               "--config.figures=()"]  # fmt: skip
    assert launch.main([*command, "--config.sizes=16,"]) == 0
    assert (tmp_path / "report.html").exists()
    assert launch.main([*command, "--config.sizes=17,"]) == 2
    assert "error: size 17 is no multiple of the tokenizer's 2 pixels a code; change sizes" in (
        capsys.readouterr().err
    )
    command[0] += ":sounds"
    assert launch.main(command) == 2
    assert "no source 'sounds'; take one of images, tfds, videos" in capsys.readouterr().err


def test_sources_and_figures_that_are_not_there():
    videos, data_set = (evaluate_tokenizer.get_config(kind) for kind in ("videos", "tfds"))
    assert videos.images is None and data_set.videos is None
    together = "rfid among the figures and inception, the weights it needs, come together"
    for job, text in [
        (evaluate.Evaluate(figures=("lpips_squeeze",)), "figure 'lpips_squeeze' is unknown; take"),
        (evaluate.Evaluate(figures=("rfid",)), together),
        (evaluate.Evaluate(inception="inception.pt"), together),
        (evaluate.Evaluate(), "nothing to evaluate on: set images or videos"),
        (videos, "runs/videos/captions.jsonl does not exist; write a list with the columns file"),
        (data_set, "runs/tfds is no TFDS data set; give the directory that holds dataset_info"),
    ]:
        with pytest.raises(ValueError, match=f"^{text}"):
            job.run()
