"""Images and videos for the scorers of GenEval, T2I-CompBench, DPG-Bench, MSCOCO-30K and VBench.

The scorers are programs of their own, each of which reads files laid out in its own way: the table
BENCHMARKS has those ways. Nothing else is written into their folders, as most count what they find.

T frames  H rows and W columns of pixels, C colours
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from data_pipelines import progress
from emu3_jax import packages
from emu3_jax.sampling import PRESETS, Sampling
from inference import files, prompts
from inference.artist import Canvas, Model

# Prompts and the seed of each -> uint8 image_HWC of each, or of videos (uint8 video_THWC, frames a
# second). A prompt comes with the seeds 0, 1, 2... and where it occurs again they go on.
Draw = Callable[[list[str], list[int]], Sequence]

DRAFT = 8  # characters that packages.write_whole adds to the name of a file that is not whole yet
LONGEST_NAME = 255 - DRAFT  # bytes, on the usual file systems


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """How the prompts of a benchmark are read, and what its scorer expects.

    file      a template of the files' names; `number` counts the samples of a list through
    metadata  the same for a prompt's metadata
    samples   of each prompt
    fitting   the numbers of samples that the scorer can read, where it cannot read any
    banned    characters that a prompt or id in a file's name may not have: the scorer reads it off
    tiled     the samples of a prompt are one image, side by side from left to right, then below
    """

    read: Callable[[pathlib.Path], list[prompts.Prompt]]
    file: str
    samples: int
    fitting: tuple[int, ...] = ()
    banned: str = "/"
    tiled: bool = False
    metadata: str = ""


BENCHMARKS = {
    # djghosh13/geneval, README.md (four digits; its generation/diffusers_generate.py has five) and
    # evaluation/evaluate_images.py: folders named by digits, in them metadata.jsonl and every
    # samples/DIGITS.png. grid.png is optional, and not written.
    "geneval": Benchmark(
        prompts.geneval, "{index:05}/samples/{sample:04}.png", 4,
        metadata="{index:05}/metadata.jsonl",
    ),
    # Karine-Huang/T2I-CompBench, Readme.md and GORS_finetune/inference_eval.py: numbers of six
    # digits through all samples, ten a prompt. BLIPvqa_eval/BLIP_vqa.py takes the prompt from the
    # name, up to the first underscore, and every file in samples/ as an image.
    "t2i_compbench": Benchmark(
        prompts.t2i_compbench, "{group}samples/{prompt}_{number:06}.png", 10, banned="/_"
    ),
    # TencentQQGYLab/ELLA, README.md and dpg_bench/compute_dpg_bench.py: one image a prompt, from
    # which squares are cut (--pic-num of them), with its id up to the first dot of the name.
    "dpg": Benchmark(
        prompts.dpg, "{id}.png", 4, fitting=(1, 4), banned="/.", tiled=True
    ),
    # mseitzer/pytorch-fid, src/pytorch_fid/fid_score.py, and GaParmar/clean-fid, cleanfid/fid.py:
    # every image in a folder, whatever its name.
    "mscoco_30k": Benchmark(prompts.mscoco, "{id}.png", 1, fitting=(1,)),
    # Vchitect/VBench, prompts/README.md and vbench/__init__.py: the prompt is not cut, the ending
    # that of whatever file comes first in the folder.
    "vbench": Benchmark(prompts.vbench, "{prompt}-{sample}.mp4", 5),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Unit:
    """One file to write: its path in the folder, the prompt, and the seed of each drawing in it.

    `metadata` is what has to lie beside it, by path.
    """

    path: str
    prompt: str
    seeds: tuple[int, ...]
    metadata: dict[str, bytes]


@dataclasses.dataclass
class WriteBenchmark:
    """Job: draws the prompts of a benchmark (one of BENCHMARKS) into the files its scorer reads.

    `prompts` is the benchmark's own file or folder of prompts: see prompts.py. Each is drawn
    `samples` times (0: as often as the benchmark says), `batch` images or videos at a time. What is
    there is not drawn again, so a job that ended early goes on, also with another number of
    processes; another model needs another directory. PNGs hold their prompt and seed as text; of
    videos, the number in the name is the seed.
    """

    benchmark: str = "geneval"
    prompts: str = ""
    directory: str = ""
    samples: int = 0
    batch: int = 16
    model: Model = dataclasses.field(default_factory=Model)
    canvas: Canvas = dataclasses.field(default_factory=Canvas)
    sampling: Sampling = dataclasses.field(
        default_factory=lambda: dataclasses.replace(PRESETS["paper"])
    )

    def run(self) -> None:
        """Writes what is missing; each of several hosts its own part."""
        with self.model.load() as artist:

            def draw(texts: list[str], seeds: list[int]) -> list:
                pairs = zip(texts, seeds, strict=True)
                pictures = [self.canvas.picture(artist, text, seed) for text, seed in pairs]
                drawn = artist.draw(pictures, self.sampling)
                shown = [artist.shown(*pair) for pair in zip(pictures, drawn, strict=True)]
                return [(x_THWC, self.canvas.fps) for x_THWC in shown] if self.canvas.fps else shown

            self.run_with(draw, jax.process_index(), jax.process_count())

    def run_with(self, draw: Draw, process: int = 0, processes: int = 1) -> None:
        """Writes the files of one of several processes: each n-th, so they need not talk.

        Raises ValueError for prompts that cannot be used, and a directory of other prompts.
        """
        if self.batch < 1:
            raise ValueError(f"batch = {self.batch}; want 1 or more")
        directory = pathlib.Path(self.directory)
        every = units(self.benchmark, self.prompts, self.samples)
        mine = every[process::processes]
        _tidy(directory, every, mine)
        missing = [unit for unit in mine if not (directory / unit.path).exists()]
        there = len(mine) - len(missing)
        print(f"{directory}: {there} of {len(mine)} files are there", flush=True)
        for unit in mine:
            _write_metadata(directory, unit)
        told, drawn = progress.Progress(self.benchmark, len(missing)), []
        wanted = [(unit, seed) for unit in missing for seed in unit.seeds]
        for start in range(0, len(wanted), self.batch):
            part = wanted[start : start + self.batch]
            made = draw([unit.prompt for unit, _ in part], [seed for _, seed in part])
            for (unit, _), one in zip(part, made, strict=True):
                drawn.append(one)
                if len(drawn) == len(unit.seeds):
                    packages.write_whole(directory / unit.path, self._encoded(unit, drawn))
                    told.add(1, 0)
                    drawn = []
        print(f"{directory}: {len(mine)} files, {len(missing)} of them new", flush=True)

    def _encoded(self, unit: Unit, drawn: list) -> bytes:
        if unit.path.endswith(".mp4"):
            return files.mp4(*drawn[0])
        if BENCHMARKS[self.benchmark].tiled:
            drawn = [tiled(drawn)]
        about = dict(prompt=unit.prompt, seed=",".join(map(str, unit.seeds)))
        return files.png(drawn[0], about)


def units(name: str, path: str, samples: int = 0) -> list[Unit]:
    """All files of a benchmark, in the order of its prompts, each drawn `samples` times.

    Raises ValueError for an unknown benchmark, a number of samples that does not fit, and prompts
    that cannot be read, or cannot be told apart or named in a file system.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"no benchmark {name!r}; take one of {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    fitting = benchmark.fitting
    if samples < 0 or (samples and fitting and samples not in fitting):
        want = " or ".join(map(str, fitting)) if fitting else "1 or more"
        raise ValueError(f"samples = {samples}; the scorer of {name} reads {want} (0: its own)")
    found: list[Unit] = []
    where: dict[str, str] = {}
    again = collections.Counter()  # a prompt that was there goes on with other seeds
    for prompt in benchmark.read(pathlib.Path(path)):
        count = samples or prompt.samples or benchmark.samples
        first = again[prompt.text]
        again[prompt.text] += count
        for unit in _units_of(benchmark, prompt, count, first):
            if unit.path in where:
                raise ValueError(f"{prompt.where}: {unit.path} is also that of {where[unit.path]}")
            where[unit.path] = prompt.where
            found.append(unit)
    return found


def _units_of(benchmark: Benchmark, prompt: prompts.Prompt, count: int, first: int) -> list[Unit]:
    """The files of one prompt, which is drawn `count` times with seeds from `first` on."""
    _check_name(benchmark, prompt)
    known = dict(index=prompt.index, id=prompt.id, group=prompt.group, prompt=prompt.text)
    metadata = {}
    if benchmark.metadata:
        metadata = {benchmark.metadata.format(**known): prompt.metadata}
    seeds = range(first, first + count)
    groups = [tuple(seeds)] if benchmark.tiled else [(seed,) for seed in seeds]
    found = []
    for sample, group in enumerate(groups):
        number = prompt.index * count + sample
        path = benchmark.file.format(**known, sample=sample, number=number)
        size = len(path.rpartition("/")[2].encode())
        if size > LONGEST_NAME:
            raise ValueError(
                f"{prompt.where}: its file's name has {size} bytes, at most {LONGEST_NAME} can be "
                "written; the scorer wants it whole, so shorten the prompt or leave it out"
            )
        found.append(Unit(path, prompt.text, group, metadata))
    return found


def _check_name(benchmark: Benchmark, prompt: prompts.Prompt) -> None:
    named = prompt.text if "{prompt}" in benchmark.file else prompt.id
    for character in benchmark.banned + "\0":
        if character in named:
            raise ValueError(
                f"{prompt.where}: {character!r} in {named[:60]!r}, which names a file that "
                "the scorer could not read; rename it or leave it out"
            )


def _tidy(directory: pathlib.Path, every: list[Unit], mine: list[Unit]) -> None:
    """Leaves in the folders only what belongs there, as a scorer would count the rest.

    Removes what a killed job has half written of `mine`; other such files may be another process's
    at work. Raises ValueError for images or videos of other prompts.
    """
    known, own = ({directory / unit.path for unit in some} for some in (every, mine))
    for folder in {path.parent for path in known}:
        for path in folder.iterdir() if folder.exists() else []:
            if path.with_name(path.name[:-DRAFT] or "-") in own:
                path.unlink(missing_ok=True)
            elif path.suffix in (".png", ".mp4") and path not in known:
                raise ValueError(f"{path} is of other prompts or samples; take another directory")


def _write_metadata(directory: pathlib.Path, unit: Unit) -> None:
    for name, data in unit.metadata.items():
        path = directory / name
        if not path.exists():
            packages.write_whole(path, data)
        elif path.read_bytes() != data:
            raise ValueError(f"{path} is of other prompts; take another directory")


def tiled(images: list[np.ndarray]) -> np.ndarray:
    """One square image, or four as one of twice the size: left to right, then below."""
    H, W, _ = images[0].shape
    if H != W:
        raise ValueError(f"images of {W}x{H} px are drawn; the scorer cuts squares, so draw such")
    if len(images) == 1:
        return images[0]
    return np.concatenate([np.concatenate(images[:2], 1), np.concatenate(images[2:], 1)])
