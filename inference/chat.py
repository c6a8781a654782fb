"""Job: questions about an image, a video or nothing, answered."""

import dataclasses
import sys

import numpy as np

from emu3_jax.sampling import PRESETS, Sampling
from inference import files
from inference.artist import Artist, Canvas, Model


@dataclasses.dataclass
class Chat:
    """Asks `questions` in turn, each knowing the ones before, about the first `image` or `video`.

    In Emu3-Chat's prompt, as the data pipeline writes it. Without questions, they are read from the
    standard input, a line each. The image is cropped to `canvas`, of the video its last `seconds`
    are seen. An answer has at most `length` ids.
    """

    model: Model = dataclasses.field(default_factory=Model)
    image: str = ""
    video: str = ""
    questions: tuple[str, ...] = ()
    length: int = 256
    canvas: Canvas = dataclasses.field(default_factory=lambda: Canvas(area=512 * 512))
    sampling: Sampling = dataclasses.field(
        default_factory=lambda: dataclasses.replace(PRESETS["greedy"])
    )

    def run(self) -> None:
        """Prints the answers."""
        if self.image and self.video:
            raise ValueError("both an image and a video are given; a conversation is about one")
        if self.video and not self.canvas.fps:
            raise ValueError("a video needs its frame rate: give --config.canvas.fps")
        with self.model.load() as artist:
            block, turns = self.block(artist), []
            for question in self.questions or self._asked():
                turns.append((question, ""))
                answer = artist.answer(block, turns, self.length, self.sampling)
                turns[-1] = question, answer
                print(f"{question}\n  {answer}" if self.questions else f"  {answer}", flush=True)

    def block(self, artist: Artist) -> np.ndarray | None:
        """The ids of the image or the video, if one is given."""
        if not (self.image or self.video):
            return None
        picture = self.canvas.picture(artist, "")
        size = [side * artist.factor for side in picture.grid]
        if self.image:
            return artist.vocab.image_block(artist.codes(files.image(self.image, *size)[None])[0])
        x_THWC = files.last_frames(
            self.video, picture.frames * artist.temporal, picture.fps, size
        )
        codes_thw = artist.video_codes(x_THWC[None])[0]
        return artist.vocab.video_block(codes_thw, picture.fps, artist.temporal)

    def _asked(self):
        """Lines that somebody types, until the end of the input."""
        if sys.stdin.isatty():
            print("Ask; Ctrl-D ends.")
        for line in sys.stdin:
            if line.strip():
                yield line.strip()
