"""The trained model at work: images for captions and captions for images.

B images  H rows and W columns of pixels, C colours  h rows and w columns of codes
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import image_folder
from emu3_jax import checkpoint, generate, mesh, vocab
from tokenizer import convert, pixels


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
    sampling: generate.Sampling = dataclasses.field(default_factory=generate.Sampling)
    seed: int = 0

    def run(self) -> None:
        """Draws what is not there yet."""
        directory = pathlib.Path(self.directory)
        missing = [n for n in self.lists if not (directory / n).with_suffix(".json").exists()]
        if not missing:
            print(f"{directory}: drawn ({', '.join(self.lists)})")
            return
        directory.mkdir(parents=True, exist_ok=True)
        artist = Artist(self)
        with jax.set_mesh(mesh.Mesh().make()):
            for name in missing:
                self._draw(artist, image_folder.ImageFolder(self.images, name), directory / name)

    def _draw(self, artist: "Artist", folder, path: pathlib.Path) -> None:
        order = np.random.default_rng(self.seed).permutation(len(folder))
        chosen = sorted(order[: self.count or len(folder)])
        entries, arrays = [], {"real": [], "decoded": [], "drawn": []}
        for start in range(0, len(chosen), self.batch):
            records = [folder[i] for i in chosen[start : start + self.batch]]
            real_BHWC = np.stack([record.image_HWC for record in records])
            codes_Bhw = artist.codes(real_BHWC)
            arrays["real"].append(real_BHWC)
            arrays["decoded"].append(artist.pixels(codes_Bhw))
            captions = [record.caption for record in records]
            arrays["drawn"].append(artist.pixels(artist.draw(captions, codes_Bhw.shape[1:])))
            for record, said in zip(records, artist.describe(codes_Bhw), strict=True):
                entries.append(dict(file=record.key, caption=record.caption, said=said))
            print(f"{path.stem}  {start + len(records)}/{len(chosen)} drawn", flush=True)
        joined = {name: np.concatenate(parts) for name, parts in arrays.items()}
        np.savez_compressed(path.with_suffix(".npz"), **joined)
        path.with_suffix(".json").write_text(json.dumps(entries, indent=1, ensure_ascii=False))


class Artist:
    """Tokenizer, decoder and vocabulary of a run, in `batch`es (short ones are filled up)."""

    def __init__(self, config: Draw):
        self._vq = convert.load(config.tokenizer)
        self._model, params, _, _ = checkpoint.restore_model(config.decoder)
        self._vocab = vocab.Vocab.load(config.vocab, self._vq.config.codebook_size)
        if self._vocab.size != self._model.vocab:
            raise ValueError(
                f"{config.vocab} with {self._vocab.codes} codes gives {self._vocab.size} ids, "
                f"the decoder has {self._model.vocab}; use the vocabulary it was trained with"
            )
        self._config = config
        self._generators = {
            task: generate.Generator(self._model, jax.tree.map(jnp.asarray, params),
                                     self._vocab.ids, self._vocab.text_size, sampling)
            for task, sampling in dict(
                image=config.sampling, text=generate.Sampling(guidance=1.0, temperature=0.0)
            ).items()
        }  # fmt: skip

    def codes(self, image_BHWC: np.ndarray) -> np.ndarray:
        """uint8 pixels to codes_Bhw."""
        return self._filled(lambda x: self._vq.encode(pixels.to_float(jnp.asarray(x))), image_BHWC)

    def pixels(self, codes_Bhw: np.ndarray) -> np.ndarray:
        """Codes to uint8 pixels [B, H, W, 3]."""
        return self._filled(lambda c: pixels.to_uint8(self._vq.decode(jnp.asarray(c))), codes_Bhw)

    def draw(self, captions: list[str], grid: tuple[int, int]) -> np.ndarray:
        """Codes [B, h, w] of one image a caption, with guidance against the empty caption."""
        words = self._vocab
        block = words.image_block(np.zeros(grid, np.int32)).tolist()
        head = block[: block.index(words.img) + 1]
        prompts = [[words.bos, *words.encode(caption), *head] for caption in captions]
        null = [words.bos, *head]
        return self._filled(
            lambda rows: self._generators["image"].images(list(rows), null, *grid), prompts
        )

    def describe(self, codes_Bhw: np.ndarray) -> list[str]:
        """The likeliest caption of each image."""
        words = self._vocab
        prompts = [[words.bos, *words.image_block(c_hw).tolist()] for c_hw in codes_Bhw]
        length = self._config.caption_length
        said = self._filled(
            lambda rows: self._generators["text"].text(list(rows), length), prompts
        )
        return [words.decode(ids) for ids in said]

    def _filled(self, function, rows):
        """function(rows), the rows filled up to the batch with the last: one program a task."""
        short = self._config.batch - len(rows)
        if isinstance(rows, list):
            return function(rows + rows[-1:] * short)[: len(rows)]
        filled = np.concatenate([rows, np.repeat(rows[-1:], short, axis=0)])
        return np.asarray(function(filled))[: len(rows)]
