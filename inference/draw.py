"""Jobs that draw: images and videos for prompts, and videos gone on with.

T pixel frames, H rows, W columns, C colours
"""

import dataclasses
import functools
import json
import pathlib
import re
import time
from collections.abc import Callable

import numpy as np

from emu3_jax import metrics, packages
from emu3_jax.sampling import Sampling
from inference import files
from inference.artist import Artist, Canvas, Model, Picture


@dataclasses.dataclass
class Generate:
    """Job: draws each of `prompts` (and the lines of `prompts_file`) `samples` times.

    Files are DIRECTORY/NUMBER-COPY-PROMPT.png or .mp4; those that are there are not drawn again.
    Images hold their prompt and settings as text, and grid.png has all of them, a prompt a row.
    `batch` are drawn at once.
    """

    model: Model = dataclasses.field(default_factory=Model)
    prompts: tuple[str, ...] = ()
    prompts_file: str = ""
    samples: int = 1
    batch: int = 4
    canvas: Canvas = dataclasses.field(default_factory=Canvas)
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    directory: str = "runs/generate"

    def run(self) -> None:
        """Draws what is missing."""
        prompts, directory = self._prompts(), pathlib.Path(self.directory)
        ending = ".mp4" if self.canvas.fps else ".png"
        paths = {
            (number, copy): directory / f"{number:04}-{copy}-{slug(prompt)}{ending}"
            for number, prompt in enumerate(prompts)
            for copy in range(self.samples)
        }
        missing = [unit for unit, path in paths.items() if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        print(f"{directory}: {len(paths) - len(missing)} of {len(paths)} are drawn")
        if missing:
            with self.model.load() as artist:
                self._draw(artist, prompts, [(unit, paths[unit]) for unit in missing])
        if not self.canvas.fps and len(paths) > 1:
            path = directory / "grid.png"
            packages.write_whole(path, files.grid(list(paths.values()), self.samples))
            print(f"{path}: all of them, a prompt a row")

    def _prompts(self) -> list[str]:
        prompts = list(self.prompts)
        if self.prompts_file:
            prompts += files.lines(self.prompts_file)
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise ValueError("there is no prompt, or an empty one; give prompts or prompts_file")
        if self.batch < 1 or self.samples < 1:
            raise ValueError(f"batch = {self.batch}, samples = {self.samples}; want 1 or more")
        return prompts

    def _draw(self, artist: Artist, prompts: list[str], units: list) -> None:
        for start in range(0, len(units), self.batch):
            part = units[start : start + self.batch]
            pictures = [self.canvas.picture(artist, prompts[number], copy)
                        for (number, copy), _ in part]  # fmt: skip
            if start:  # the last ones are filled up, so that nothing new is compiled
                pictures += pictures[-1:] * (self.batch - len(part))
            told = Progress(f"{start + 1} to {start + len(part)} of {len(units)}")
            drawn = artist.draw(pictures, self.sampling, told)
            for picture, (_, path), codes_thw in zip(pictures, part, drawn, strict=False):
                pixels = artist.shown(picture, codes_thw)
                packages.write_whole(path, file(pixels, picture, self.model, self.sampling))
                print(f"{path}: {picture.caption}")


@dataclasses.dataclass
class GoOn:
    """Job: takes the last `seconds` of `video` and draws as many more, `times` times on.

    The video is read at `canvas.fps` and cropped to the canvas. `caption` says what it shows.
    """

    model: Model = dataclasses.field(default_factory=Model)
    video: str = ""
    caption: str = ""
    times: int = 1
    canvas: Canvas = dataclasses.field(default_factory=lambda: Canvas(seconds=2.0, fps=24.0))
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    path: str = "runs/go_on.mp4"

    def run(self) -> None:
        """Writes `path`."""
        if not self.canvas.fps or self.times < 1:
            raise ValueError(f"canvas.fps = {self.canvas.fps:g}, times = {self.times}; set both")
        with self.model.load() as artist:
            video = self.drawn(artist, Progress("going on"))
            packages.write_whole(pathlib.Path(self.path), video)
        print(f"{self.path}: {self.canvas.seconds:g} s, and {self.times} times as many more")

    def drawn(self, artist: Artist, watch: Callable | None = None) -> bytes:
        """The mp4: what was taken of the video, and what follows; `watch` as in Artist.draw."""
        picture = self.canvas.picture(artist, self.caption)
        x_THWC = files.last_frames(
            self.video, picture.frames * artist.temporal, picture.fps,
            [side * artist.factor for side in picture.grid],
        )  # fmt: skip
        given_thw = artist.video_codes(x_THWC[None])[0]
        picture = picture._replace(given_thw=given_thw, frames=2 * picture.frames)
        codes_thw = artist.go_on(picture, self.times, self.sampling, watch)
        return files.mp4(artist.video_pixels(codes_thw[None])[0], picture.fps)


class Progress:
    """A line now and then: how much of a batch is drawn, codes a second, the time left.

    It is told to `tell`, or printed.
    """

    def __init__(self, name: str, every: float = 5.0, tell: Callable[[str], None] | None = None):
        self._name, self._every, self._steps = name, every, 0
        self._tell = tell or functools.partial(print, flush=True)

    def __call__(self, drawn_RT: np.ndarray, steps: int) -> None:
        """As Generator.codes wants it."""
        now, (rows, done) = time.monotonic(), drawn_RT.shape
        if done <= self._steps or not self._steps:
            self._begun = self._told = now  # what comes before is compiling, too
            self._first = done
        self._steps = done
        if done > self._first and (now - self._told >= self._every or done == steps):
            self._told, rate = now, (done - self._first) / max(now - self._begun, 1e-9)
            left = metrics.time_left((steps - done) / rate)
            self._tell(f"{self._name}  {done / steps:.0%}  {rate * rows:,.0f} codes/s  {left} left")


def file(pixels: np.ndarray, picture: Picture, model: Model, sampling: Sampling) -> bytes:
    """A drawn picture as a file: an mp4, or a PNG that holds its prompt and settings as text."""
    if picture.fps:
        return files.mp4(pixels, picture.fps)
    settings = dataclasses.asdict(sampling) | dict(
        copy=picture.copy, decoder=model.decoder, suffix=model.suffix, negative=model.negative
    )
    return files.png(pixels, dict(prompt=picture.caption, settings=json.dumps(settings)))


def slug(prompt: str) -> str:
    """A prompt as a part of a file's name."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:40] or "prompt"
