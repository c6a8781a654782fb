"""Clips of coloured shapes that move, each with a caption that says so.

One shape a clip, on white, goes evenly along a straight line, in at one side of the picture and out
at another: whoever has seen some frames can tell the next ones, and repeating the last is wrong.
Clips go to {NUMBER}.mkv and, one object a line ({"file", "caption", "motion"}), to the lists

    train.jsonl      what is learnt from
    heldout.jsonl    clips of which none is in training: another shape, colour, place or motion

No two clips are alike, and all follow from the settings.

Legend: T frames, H rows, W columns, C colours of pixels.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Iterator

import numpy as np

from data_pipelines import clip_folder

SIZE = 32  # pixels a side
RADIUS = 7
COLOURS = {
    "red": (214, 40, 40),
    "blue": (29, 78, 216),
    "green": (22, 140, 60),
    "orange": (245, 140, 20),
}
SHAPES = ("ball", "square", "triangle", "ring")
SPEEDS = {"slowly": 1, "quickly": 2}  # pixels a frame
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MARGIN = 6  # pixels from the border, where the centre is at least in the middle of a clip


@dataclasses.dataclass
class DrawnClips:
    """Job: draws `train` and `heldout` clips of `frames` frames, SIZE pixels a side, at `fps`."""

    directory: str = "runs/drawn_clips"
    train: int = 4000
    heldout: int = 128
    frames: int = 16
    fps: int = 8
    seed: int = 0

    def run(self) -> None:
        """Draws, or says that this has been done with the same settings.

        Raises ValueError for more clips than differ.
        """
        path = pathlib.Path(self.directory)
        done, wanted = path / "drawn_clips.json", json.dumps(dataclasses.asdict(self))
        if done.exists() and done.read_text() == wanted:
            print(f"{path}: drawn ({self.train} and {self.heldout} clips)")
            return
        if self.train + self.heldout > COUNT // 2:
            raise ValueError(
                f"{self.train} and {self.heldout} clips; at most {COUNT // 2} in all are drawn"
            )
        path.mkdir(parents=True, exist_ok=True)
        entries = []
        chosen = itertools.islice(scenes(self.seed), self.train + self.heldout)
        for number, scene in enumerate(chosen):
            file, caption = f"{number:05}.mkv", scene.caption()
            clip_folder.write_clip(path / file, scene.draw(self.frames), self.fps)
            entries.append(dict(file=file, caption=caption, motion=scene.manner))
        clip_folder.write_list(path / "train.jsonl", entries[: self.train])
        clip_folder.write_list(path / "heldout.jsonl", entries[self.train :])
        done.write_text(wanted)
        print(f"{path}: {self.train} clips to learn from, {self.heldout} held out", flush=True)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A shape and where it goes: its centre is at (x, y), in pixels, in the middle of the clip."""

    shape: str
    colour: str
    direction: str
    manner: str
    x: int
    y: int

    def draw(self, frames: int) -> np.ndarray:
        """The clip x_THWC, uint8, its edges smoothed over a pixel."""
        far_T11 = SPEEDS[self.manner] * (np.arange(frames) - frames // 2)[:, None, None]
        across, down = DIRECTIONS[self.direction]
        y_HW, x_HW = np.mgrid[:SIZE, :SIZE] + 0.5
        outside_THW = _outside(
            self.shape, x_HW - self.x - across * far_T11, y_HW - self.y - down * far_T11
        )
        cover_THW1 = np.clip(0.5 - outside_THW, 0, 1)[..., None]
        colour_C = np.array(COLOURS[self.colour], float)
        return np.round(255 + cover_THW1 * (colour_C - 255)).astype(np.uint8)

    def caption(self) -> str:
        """What is to be seen, in words."""
        article = "an" if self.colour == "orange" else "a"
        return f"{article} {self.colour} {self.shape} moves {self.direction} {self.manner}"


_PLACES = range(MARGIN, SIZE - MARGIN + 1)
_CHOICES = (SHAPES, list(COLOURS), list(DIRECTIONS), list(SPEEDS), _PLACES, _PLACES)
COUNT = math.prod(map(len, _CHOICES))  # scenes that there are


def scenes(seed: int) -> Iterator[Scene]:
    """Scenes, each another one, in an order that follows from the seed."""
    random, seen = np.random.default_rng(seed), set()
    while len(seen) < COUNT:
        scene = Scene(*(choices[random.integers(len(choices))] for choices in _CHOICES))
        if scene not in seen:
            seen.add(scene)
            yield scene


def _outside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How many pixels a place lies outside the shape around (0, 0); negative inside."""
    if shape == "ball":
        return np.hypot(x, y) - RADIUS
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.75 * RADIUS) - 0.25 * RADIUS
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.9 * RADIUS
    return np.maximum(math.sqrt(3) / 2 * np.abs(x) - y / 2, y) - 0.6 * RADIUS
