"""What the model sees, as a page: packed rows of a training run, and statistics of their stores.

Legend: B images, T frames, H rows, W columns, C colours of pixels; t h w a grid of codes, K codes.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from data_pipelines import anatomy, documents, page, statistics, store
from data_pipelines.mixture import Mixture, MixtureRows
from emu3_jax import config
from emu3_jax import vocab as vocabulary
from emu3_jax.train import Train
from tokenizer import convert, pixels, report

_PLANNED = 1000  # rows, at least, that shares, fill and epochs are taken over
_FRAMES = 4  # shown of a video
_LARGEST = 320  # pixels of the longer side of a picture on the page


@dataclasses.dataclass
class Inspect:
    """Job: `directory`/inspect.html shows `rows` packed rows of a run from those of `step` on.

    train      the run's config file, as in configs/demo.py:decoder
    set        fields of it to change, as in "data.length=512 batch=4"
    tokenizer  a directory that tokenizer.convert.load reads, to decode pictures with; "" draws
               their codes, each in a colour of its own
    sample     documents of a store whose codes are counted (0: all)
    """

    train: str = "configs/demo.py:decoder"
    set: str = ""
    tokenizer: str = ""
    rows: int = 8
    step: int = 0
    sample: int = 2000
    directory: str = "runs/inspect"

    def run(self) -> None:
        """Writes the page and prints its tables.

        Raises ValueError for a config file without a mixture and for another tokenizer than the
        stores were made with.
        """
        job = self.job()
        data = job.data
        vocab = vocabulary.Vocab.load(data.vocab, data.codes)
        opened = {c.store: store.Store(c.store) for c in data.components}
        pictures = Coloured() if not self.tokenizer else Decoded(self.tokenizer, opened)
        packed = data.open(job.batch)
        rows = self._rows(packed, vocab)
        colours = page.Colours(list(rows.values()))
        tables, plots = self._statistics(job, packed, opened, vocab)
        tables.append(statistics.targets(list(rows.values()), colours))
        print("\n\n".join(table.text() for table in tables), end="\n\n")
        said = f"{self.train} {self.set}; pictures are "
        said += f"decoded by {self.tokenizer}" if self.tokenizer else "codes, a colour for each"
        blocks = [table.html() + plots.pop(table.title, "") for table in tables]
        html = page.make(said, [_checks(rows), *blocks], rows, colours, pictures)
        path = pathlib.Path(self.directory, "inspect.html")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html, encoding="utf-8")
        for name, row in rows.items():
            for problem in row.problems:
                print(f"{name}, position {problem.position}: {problem.reason}")
        print(f"{path}: {len(rows)} rows")

    def job(self) -> Train:
        """The run whose data is shown; ValueError if it is another job or has no mixture."""
        job = config.load([f"--config={self.train}", *(f"--config.{f}" for f in self.set.split())])
        if not isinstance(job, Train):
            raise ValueError(f"{self.train} is a job {type(job).__name__}; Inspect wants a Train")
        if not isinstance(job.data, Mixture):
            raise ValueError(
                f"{self.train} trains on {type(job.data).__name__}; Inspect wants a Mixture"
            )
        return job

    def _rows(self, packed: MixtureRows, vocab: vocabulary.Vocab) -> dict[str, anatomy.Row]:
        """The rows by name: those of `step`, and as many of the steps after it as are asked for."""
        rows, first = {}, packed.row(self.step)
        for i in range(first, first + self.rows):
            step, place = divmod(i, packed.batch)
            name = f"Row {i:,} (row {place} of step {step:,})"
            rows[name] = anatomy.take_apart(packed.dataset[i], vocab)
        return rows

    def _statistics(
        self, job: Train, packed: MixtureRows, opened: dict[str, store.Store],
        vocab: vocabulary.Vocab,
    ) -> tuple[list[page.Table], dict[str, str]]:  # fmt: skip
        """Tables, and plots by the title of the table that each belongs to."""
        data, steps = job.data, max(self.step + 1, -(-_PLANNED // job.batch))
        lengths = {}
        for component in data.components:
            writer = documents.Writer(opened[component.store], component.layout, vocab)
            lengths[component.title] = statistics.count_lengths(writer)
        tables = [
            statistics.mixture(data, packed, steps),
            statistics.stores(opened),
            statistics.lengths(lengths, data.length),
        ]
        plots = {"Lengths": report.plot(page.lengths(lengths, data.length), "lengths")}
        counted = {
            path: statistics.count_codes(s, self.sample, vocab.codes)
            for path, s in opened.items()
            if s.info["codes"]
        }
        if counted:
            tables.append(statistics.use_of_codes(counted))
            counts = {path: count_K for path, (_, count_K) in counted.items()}
            plots[tables[-1].title] = report.plot(report.ranks(counts), "use of the codes")
        return tables, plots


def _checks(rows: dict[str, anatomy.Row]) -> str:
    """A line that says whether the rows keep the contract."""
    targets = sum(row.targets.total() for row in rows.values())
    problems = sum(len(row.problems) for row in rows.values())
    if problems:
        return f"<p class=problem>{problems} problems in these {len(rows)} rows: see below</p>"
    return (
        f"<p class=fine>{len(rows)} rows of {targets:,} targets checked: no target crosses "
        "documents, positions begin with each, images and frames are whole, padding is at the end"
        "</p>"
    )


class Coloured:
    """Pictures of codes: each code has a colour of its own."""

    def __call__(self, block: anatomy.Block) -> list[np.ndarray]:
        """Frames [h, w, 3] in 8 bits, a pixel a code."""
        t, _, _ = block.codes_thw.shape
        hashed_thw = (block.codes_thw[_some(t)].astype(np.uint64) + 1) * 0x9E3779B97F4A7C15
        return [
            np.stack([(h_hw >> np.uint64(s)) & np.uint64(255) for s in (40, 48, 56)], -1)
            .astype(np.uint8)
            for h_hw in hashed_thw
        ]  # fmt: skip


class Decoded:
    """Pictures as the tokenizer decodes them."""

    def __init__(self, directory: str, opened: dict[str, store.Store]):
        """Raises ValueError if it is not the one that the stores were made with."""
        self._vq = convert.load(directory)
        made = convert.fingerprint(self._vq)
        for path, one in opened.items():
            wanted = one.info["tokenizer"]
            if wanted and wanted != made:
                raise ValueError(
                    f"store {path} was made with tokenizer {wanted[:12]}, {directory} is "
                    f"{made[:12]}; give the one the store was made with"
                )
        self._stream = {one.info["video"] for one in opened.values()} - {""} == {"stream"}

    def __call__(self, block: anatomy.Block) -> list[np.ndarray]:
        """Frames in 8 bits, reduced to the size that the page shows."""
        shown = _some(len(block.codes_thw))
        if not block.fps:
            frames_THWC = self._vq.decode(jnp.asarray(block.codes_thw))
        elif self._stream:
            frames_THWC = self._streamed(jnp.asarray(block.codes_thw), shown)
        else:
            codes_Bthw = jnp.asarray(block.codes_thw[shown, None])
            frames_THWC = self._vq.decode_clips(codes_Bthw)[:, 0]
        return [_reduced(x_HWC) for x_HWC in np.asarray(pixels.to_uint8(frames_THWC))]

    def _streamed(self, codes_thw: jax.Array, shown: list[int]) -> jax.Array:
        """The first frame of each latent one `shown`, for which all before must be decoded."""
        past, frames = None, []
        for i in range(shown[-1] + 1):
            x_BTHWC, past = self._vq.decode_stream(codes_thw[None, i : i + 1], past)
            frames += [x_BTHWC[0, 0]] if i in shown else []
        return jnp.stack(frames)


def _some(count: int) -> list[int]:
    """At most so many of `count` frames as are shown, evenly spaced."""
    return np.linspace(0, count - 1, min(count, _FRAMES)).round().astype(int).tolist()


def _reduced(x_HWC: np.ndarray) -> np.ndarray:
    image = PIL.Image.fromarray(x_HWC)
    image.thumbnail((_LARGEST, _LARGEST))
    return np.asarray(image)
