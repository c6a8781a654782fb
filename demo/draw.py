"""The trained model at work: images for captions and captions for images.

B images  H rows and W columns of pixels, C colours  h rows and w columns of codes
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np

from data_pipelines import image_folder
from emu3_jax import mesh
from emu3_jax.sampling import Sampling
from inference import artist


@dataclasses.dataclass
class Draw:
    """Job: draws the captions of `lists` and captions their images, into `directory`.

    Each list (of the folder `images`) gives NAME.npz, with the real pixels, those the tokenizer
    makes of the real codes, and the drawn ones (`real`, `decoded`, `drawn`, uint8 [B, H, W, 3]),
    and NAME.json with an entry a picture: file, caption, and the caption the model gives the real
    image. `count` pictures of a list are taken (0: all), at random by `seed`, `batch` at a time.
    """

    images: str
    tokenizer: str
    decoder: str
    vocab: str
    directory: str
    lists: tuple[str, ...] = ("train.jsonl", "heldout_skin_tone.jsonl")
    count: int = 128
    batch: int = 64
    caption_length: int = 24
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0

    def run(self) -> None:
        """Draws what is not there yet."""
        directory = pathlib.Path(self.directory)
        missing = [n for n in self.lists if not (directory / n).with_suffix(".json").exists()]
        if not missing:
            print(f"{directory}: drawn ({', '.join(self.lists)})")
            return
        directory.mkdir(parents=True, exist_ok=True)
        with jax.set_mesh(mesh.Mesh().make()):
            filled = _Filled(self)
            for name in missing:
                self._draw(filled, image_folder.ImageFolder(self.images, name), directory / name)

    def _draw(self, filled: "_Filled", folder, path: pathlib.Path) -> None:
        order = np.random.default_rng(self.seed).permutation(len(folder))
        chosen = sorted(order[: self.count or len(folder)])
        entries, arrays = [], {"real": [], "decoded": [], "drawn": []}
        for start in range(0, len(chosen), self.batch):
            records = [folder[i] for i in chosen[start : start + self.batch]]
            real_BHWC = np.stack([record.image_HWC for record in records])
            codes_Bhw = filled.codes(real_BHWC)
            arrays["real"].append(real_BHWC)
            arrays["decoded"].append(filled.pixels(codes_Bhw))
            captions = [record.caption for record in records]
            arrays["drawn"].append(filled.pixels(filled.draw(captions, codes_Bhw.shape[1:])))
            for record, said in zip(records, filled.describe(codes_Bhw), strict=True):
                entries.append(dict(file=record.key, caption=record.caption, said=said))
            print(f"{path.stem}  {start + len(records)}/{len(chosen)} drawn", flush=True)
        joined = {name: np.concatenate(parts) for name, parts in arrays.items()}
        np.savez_compressed(path.with_suffix(".npz"), **joined)
        path.with_suffix(".json").write_text(json.dumps(entries, indent=1, ensure_ascii=False))


class _Filled:
    """An artist that works in batches of one size (short ones are filled up)."""

    def __init__(self, job: Draw):
        self._artist = artist.Artist(artist.Model(job.tokenizer, job.decoder, job.vocab))
        self._job = job

    def codes(self, image_BHWC: np.ndarray) -> np.ndarray:
        return self._filled(self._artist.codes, image_BHWC)

    def pixels(self, codes_Bhw: np.ndarray) -> np.ndarray:
        return self._filled(self._artist.pixels, codes_Bhw)

    def draw(self, captions: list[str], grid: tuple[int, int]) -> np.ndarray:
        """Codes [B, h, w] of one image a caption, with guidance against the empty caption."""
        drawn = self._filled(
            lambda rows: self._artist.draw([artist.Picture(c, grid) for c in rows],
                                           self._job.sampling), captions,
        )  # fmt: skip
        return np.concatenate(drawn)

    def describe(self, codes_Bhw: np.ndarray) -> list[str]:
        """The likeliest caption of each image."""
        blocks = [self._artist.vocab.image_block(codes_hw) for codes_hw in codes_Bhw]
        length = self._job.caption_length
        return self._filled(lambda rows: self._artist.describe(rows, length), blocks)

    def _filled(self, function, rows):
        short = self._job.batch - len(rows)
        if isinstance(rows, list):
            return function(rows + rows[-1:] * short)[: len(rows)]
        filled = np.concatenate([rows, np.repeat(rows[-1:], short, axis=0)])
        return function(filled)[: len(rows)]
