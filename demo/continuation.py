"""The trained model goes on with clips that it has never seen.

B clips  T frames, H rows and W columns of pixels, C colours  t latent frames, h rows and w columns
of codes
"""

import dataclasses
import json
import pathlib

import numpy as np

from data_pipelines import video_folder
from emu3_jax.sampling import PRESETS, Sampling
from inference.artist import Artist, Model, Picture


@dataclasses.dataclass
class Continue:
    """Job: predicts the last frames of the clips of `lists` from their captions and first frames.

    Each list (of the folder `clips`) gives NAME.npz, with the real clips, what the tokenizer keeps
    of them, and the predicted last frames (`real`, `decoded`, `predicted`, uint8 [B, T, H, W, 3]),
    and NAME.json, the list's entries. Of a clip's `frames` the first `given` are shown. The first
    `count` clips of a list are taken (0: all), `batch` at a time.
    """

    model: Model
    clips: str
    directory: str
    lists: tuple[str, ...] = ("heldout.jsonl", "train.jsonl")
    count: int = 128
    batch: int = 32
    frames: int = 16
    given: int = 8
    sampling: Sampling = dataclasses.field(
        default_factory=lambda: dataclasses.replace(PRESETS["greedy"])
    )

    def run(self) -> None:
        """Predicts what is not there yet.

        Raises ValueError for frames that are no multiple of the tokenizer's, or none to predict.
        """
        directory = pathlib.Path(self.directory)
        missing = [n for n in self.lists if not (directory / n).with_suffix(".json").exists()]
        if not missing:
            print(f"{directory}: predicted ({', '.join(self.lists)})")
            return
        directory.mkdir(parents=True, exist_ok=True)
        with self.model.load() as artist:
            factor = artist.temporal
            if self.given % factor or self.frames % factor or not 0 < self.given < self.frames:
                raise ValueError(
                    f"{self.given} of {self.frames} frames given; take multiples of {factor}, "
                    "which make one latent frame, and leave some to predict"
                )
            for name in missing:
                self._list(artist, name, directory / name)

    def _list(self, artist: Artist, name: str, path: pathlib.Path) -> None:
        folder = video_folder.VideoFolder(self.clips, name)
        count = min(len(folder), self.count or len(folder))
        arrays = {"real": [], "decoded": [], "predicted": []}
        for start in range(0, count, self.batch):
            videos = [folder[i] for i in range(start, min(start + self.batch, count))]
            real_BTHWC = np.stack([video.clip(self.frames) for video in videos])
            codes_Bthw = artist.video_codes(real_BTHWC)
            next_Bthw = self._next(artist, videos, codes_Bthw)
            arrays["real"].append(real_BTHWC)
            arrays["decoded"].append(artist.video_pixels(codes_Bthw))
            arrays["predicted"].append(artist.video_pixels(next_Bthw))
            print(f"{path.stem}  {start + len(videos)}/{count} predicted", flush=True)
        joined = {name: np.concatenate(parts) for name, parts in arrays.items()}
        np.savez_compressed(path.with_suffix(".npz"), **joined)
        entries = json.dumps(folder.entries[:count], indent=1, ensure_ascii=False)
        path.with_suffix(".json").write_text(entries)

    def _next(self, artist: Artist, videos: list, codes_Bthw: np.ndarray) -> np.ndarray:
        """The codes of the frames that are not given."""
        given, (_, t, *grid) = self.given // artist.temporal, codes_Bthw.shape
        pictures = [
            Picture(video.caption, tuple(grid), t, video.fps, codes_thw[:given])
            for video, codes_thw in zip(videos, codes_Bthw, strict=True)
        ]
        return np.stack(artist.draw(pictures, self.sampling))
