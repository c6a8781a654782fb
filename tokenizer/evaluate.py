"""The evaluation job: what a tokenizer keeps of images and videos, in figures and pictures.

Each source is measured at each size in one pass whose memory does not grow with the source: records
are read ahead by threads, fitted, and go through the tokenizer in batches of one shape, the last
one filled up, so that each size compiles once. DIR/evaluation.json holds the figures (MEANING says
how each is taken), DIR/report.html shows them, DIR/images-256/values.csv and the like have those of
every record. A size that is done is not done again.

Legend: B items of a batch (images or videos), T frames of each (1 of an image), F = B x T frames,
H rows, W columns, C colours of pixels; N codes of an item.
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emu3_jax import config as config_lib
from emu3_jax import metrics
from tokenizer import (
    convert,
    frechet,
    inception,
    lpips,
    measures,
    pixels,
    records,
    report,
    tally,
    vq,
)

MEANING = {
    "psnr_db": "peak signal-to-noise ratio in dB of each image, its reconstruction rounded to 8 "
    "bits, data range 255; then the mean over images",
    "ssim": "structural similarity of the same 8-bit pairs: uniform windows of 7x7 within the "
    "image, sample covariance, each colour alone, data range 1.0 on [0, 1]; the mean over images",
    "lpips_alex": "LPIPS v0.1 with AlexNet, of images in [-1, 1] and clipped reconstructions; the "
    "mean over images; lower is better. Images are taken at this size: compare equal sizes only",
    "lpips_vgg": "the same with VGG16, on another scale",
    "fd_vgg16": "Frechet distance between the images and their 8-bit reconstructions in VGG16's "
    "features; lower is better, and it falls with the number of images. It is not the FID, which "
    "needs Inception",
    "rfid": "the same with Inception's features (2015-12-05): FID of reconstructions",
    "codebook_usage": "share of the codes seen at least once in the whole set; it grows with the "
    "number of tokens",
    "perplexity": "exp of the entropy of the codes, counted over the whole set",
    "entropy_bits": "that entropy in bits a token",
    "bits_per_pixel": "log2 of the codebook's size, times tokens, over the pixels of all frames",
    "tokens": "tokens counted",
    "count": "images or videos measured; a video's figure is the mean over its frames",
    "skipped": "images or videos that could not be used; stderr named them",
}

NETWORKS = {"lpips_alex": "alex", "lpips_vgg": "vgg", "fd_vgg16": "vgg", "rfid": "inception"}
FEATURES = {"fd_vgg16": frechet.features, "rfid": inception.features}


@dataclasses.dataclass
class Evaluate:
    """Job: measures `tokenizer` on `images` and `videos` (see records.Opens; either may be None).

    tokenizer      a directory that tokenizer.convert.load reads
    dtype          what its 2-D layers compute in: float32 or bfloat16
    directory      gets evaluation.json, report.html and a folder for each source and size
    sizes          in pixels: shorter sides are resized to each, up or down, with PIL's bicubic
                   filter, then the centre is cut out
    frames, fps    a video's first so many frames, at so many a second. Emu3's protocol is 8 at 12
                   of clips of 5 s. They are encoded in clips of the tokenizer's 4 frames; a clip
                   that is not full repeats its last frame
    limit          takes the first so many of each source; 0 takes all
    batch          frames that are encoded together
    figures        those of MEANING that take a network: lpips_alex, lpips_vgg, fd_vgg16, rfid
    inception, inception_sha256   for rfid: the file of Inception's weights (see inception.py)
    shown          how many of the worst, the best and of random ones the report shows
    max_bad        how many records of a source may be skipped
    """

    tokenizer: str = "runs/tokenizer"
    dtype: str = "float32"
    directory: str = "runs/evaluation"
    images: Any = None
    videos: Any = None
    sizes: tuple[int, ...] = (256, 512)
    frames: int = 8
    fps: float = 12.0
    limit: int = 0
    batch: int = 8
    figures: tuple[str, ...] = ("lpips_alex", "lpips_vgg", "fd_vgg16")
    inception: str = ""
    inception_sha256: str = ""
    shown: int = 8
    max_bad: int = 100

    def run(self) -> None:
        """Measures what is missing and writes the report anew.

        Raises ValueError for an unknown figure, for a size that the tokenizer cannot take, for too
        many bad records, and for a source, a tokenizer or a network that cannot be read.
        """
        self._check_figures()
        kinds = [kind for kind in ("images", "videos") if getattr(self, kind) is not None]
        if not kinds:
            raise ValueError("nothing to evaluate on: set images or videos")
        sources = {kind: getattr(self, kind).open() for kind in kinds}
        model = convert.load(self.tokenizer, self.dtype)
        check_sizes(self.sizes, model.config)
        fingerprint = convert.fingerprint(model)
        judges = None
        results = {}
        for kind, size in [(kind, size) for kind in kinds for size in self.sizes]:
            name = f"{kind}-{size}"
            path, about = pathlib.Path(self.directory, name), self._about(kind, fingerprint)
            results[name] = tally.read(path)
            if results[name] is not None and results[name].about == about:
                print(f"{path}: evaluated")
                continue
            judges = judges or self.judges()
            results[name] = measure(self, model, judges, sources[kind], kind, size)
            results[name].about = about
            results[name].write(path)
        self._finish(model.config, fingerprint, results)

    def _check_figures(self) -> None:
        for name in self.figures:
            if name not in NETWORKS:
                raise ValueError(f"figure {name!r} is unknown; take of {', '.join(NETWORKS)}")
        if ("rfid" in self.figures) != bool(self.inception):
            raise ValueError("rfid among the figures and inception, the weights it needs, come "
                             "together: set both, or neither")  # fmt: skip

    def judges(self) -> "Judges":
        """The networks in memory. ValueError for weights not to be had."""
        params = {
            network: inception.load(self.inception, self.inception_sha256)
            if network == "inception" else lpips.load(network)
            for network in sorted({NETWORKS[name] for name in self.figures})
        }  # fmt: skip
        return Judges(jax.device_put(params), tuple(self.figures))

    def _about(self, kind: str, fingerprint: str) -> dict:
        """All that a source's figures depend on, as JSON values."""
        fields = {f.name: config_lib.to_json(getattr(self, f.name)) for f in
                  dataclasses.fields(self)}  # fmt: skip
        others = ("tokenizer", "directory", "images", "videos", "sizes", "batch", "inception",
                  "max_bad")  # fmt: skip
        fields = {name: value for name, value in fields.items() if name not in others}
        source = config_lib.to_json(getattr(self, kind))
        return {"tokenizer": fingerprint, "source": source, **fields}

    def _finish(
        self, config: vq.VQConfig, fingerprint: str, results: dict[str, tally.Result]
    ) -> None:
        """evaluation.json, report.html and the figures in the terminal."""
        directory = pathlib.Path(self.directory)
        figures = {name: result.figures for name, result in results.items()}
        values = dict(tokenizer=self.tokenizer, fingerprint=fingerprint,
                      codebook_size=config.codebook_size, figures=figures)  # fmt: skip
        (directory / "evaluation.json").write_text(json.dumps(values, indent=1) + "\n")
        for name, row in figures.items():
            print(name, *(f"{key} {value:.5g}" for key, value in row.items()), sep="  ")
        path = directory / "report.html"
        path.write_text(report.evaluation(values, results, MEANING))
        print(f"{path}: written")


def check_sizes(sizes: Sequence[int], config: vq.VQConfig) -> None:
    """Raises ValueError if the tokenizer would not give an image of one of the sizes back."""
    for size in sizes:
        if size < 1 or size % config.spatial_factor:
            raise ValueError(
                f"size {size} is no multiple of the tokenizer's {config.spatial_factor} pixels a "
                "code; change sizes"
            )


@dataclasses.dataclass
class Judges:
    """Networks that compare images: their weights by name, and the figures that are asked for."""

    params: dict[str, Any]
    figures: tuple[str, ...]


def measure(
    job: Evaluate, model: vq.VQ, judges: Judges, source: records.Source, kind: str, size: int
) -> tally.Result:
    """One pass over a source at one size. ValueError for too many bad records, or none good."""
    total, count = min(len(source), job.limit or len(source)), job.batch
    take = records.image_frame
    if kind == "videos":
        count = max(1, job.batch // job.frames)
        take = functools.partial(records.first_frames, count=job.frames, fps=job.fps)
    bad = []
    found = records.good(records.read(source, total, take, size), kind, bad, job.max_bad)
    adding = tally.Tally(model.config.codebook_size, job.shown, total)
    progress = Progress(f"{kind} at {size} px", total)
    for items in records.batches(found, count):
        frames_BTHWC = [item.frames_THWC for item in items]
        real_BTHWC = np.stack(frames_BTHWC + frames_BTHWC[-1:] * (count - len(items)))
        adding.add([item.key for item in items], judge(model, judges, real_BTHWC))
        progress.show(adding.count + len(bad))
    if not adding.count:
        raise ValueError(f"{kind}: none of {total} can be used, the last: {bad[-1]}")
    result = adding.finish()
    result.figures["skipped"] = len(bad)
    return result


def judge(model: vq.VQ, judges: Judges, real_BTHWC: np.ndarray) -> tally.Judged:
    """Reconstructs a batch of 8-bit clips, and compares; products are exact on every device."""
    with jax.default_matmul_precision("highest"):
        return _judge(model, judges, real_BTHWC)


def _judge(model: vq.VQ, judges: Judges, real_BTHWC: np.ndarray) -> tally.Judged:
    made_BTHWC, codes_BN = reconstruct(model, jnp.asarray(real_BTHWC))
    real_FHWC = real_BTHWC.reshape(-1, *real_BTHWC.shape[2:])
    made_FHWC, values, features = compare(
        judges.params, judges.figures, jnp.asarray(real_FHWC), made_BTHWC.reshape(real_FHWC.shape)
    )
    made_FHWC = np.asarray(made_FHWC)
    values = {"psnr_db": measures.psnr_db(real_FHWC, made_FHWC)} | values
    values_BT = {
        name: np.asarray(value_F).reshape(real_BTHWC.shape[:2]) for name, value_F in values.items()
    }
    made_BTHWC = made_FHWC.reshape(real_BTHWC.shape)
    return tally.Judged(
        real_BTHWC, made_BTHWC, np.asarray(codes_BN), values_BT, jax.device_get(features)
    )


def reconstruct(model: vq.VQ, real_BTHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """8-bit clips to (floats made_BTHWC, codes_BN). A single frame is an image."""
    x_BTHWC = pixels.to_float(real_BTHWC)
    B, T = x_BTHWC.shape[:2]
    if T == 1:
        codes_Bhw = model.encode(x_BTHWC[:, 0])
        return model.decode(codes_Bhw)[:, None], codes_Bhw.reshape(B, -1)
    last_BTHWC = jnp.repeat(x_BTHWC[:, -1:], -T % model.config.temporal_factor, axis=1)
    codes_Bthw = model.encode_clips(jnp.concatenate([x_BTHWC, last_BTHWC], axis=1))
    return model.decode_clips(codes_Bthw)[:, :T], codes_Bthw.reshape(B, -1)


# The networks' weights are arguments: XLA would compute with constants while it compiles.
@functools.partial(jax.jit, static_argnums=1)
def compare(
    params: dict, figures: tuple[str, ...], real_FHWC: jax.Array, made_FHWC: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, list[jax.Array]]]:
    """8-bit images and floats -> (the latter made_FHWC in 8 bits, values_F and features by figure).

    Features are those of the real and the made images, in 8 bits.
    """
    eight_FHWC = measures.rounded(made_FHWC)
    x_FHWC, y_FHWC = pixels.to_float(real_FHWC), jnp.clip(made_FHWC, -1, 1)
    values, features = {"ssim": measures.ssim(real_FHWC, eight_FHWC)}, {}
    for name in figures:
        network = NETWORKS[name]
        if name in FEATURES:
            pair = x_FHWC, pixels.to_float(eight_FHWC)
            features[name] = [FEATURES[name](params[network], z_FHWC) for z_FHWC in pair]
        else:
            values[name] = lpips.distance(network, params[network], x_FHWC, y_FHWC)
    return eight_FHWC, values, features


class Progress:
    """A line every few seconds: records done, rate, time left."""

    def __init__(self, name: str, total: int):
        self._name, self._total = name, total
        self._start = self._shown = time.time()

    def show(self, done: int) -> None:
        """Prints, if the last line is old enough."""
        now = time.time()
        if now - self._shown < 5:
            return
        self._shown = now
        rate = done / (now - self._start)
        left = metrics.time_left((self._total - done) / rate)
        print(f"{self._name}  {done}/{self._total}  {rate:.1f}/s  {left} left", flush=True)
