"""The text part of a small vocabulary, learnt from the captions of an image list."""

import dataclasses
import pathlib

from data_pipelines.entries import read_list
from emu3_jax import vocab


@dataclasses.dataclass
class TrainVocab:
    """Job: a byte-level BPE of `size` ranks from the captions of `list`, written to `path`.

    Raises ValueError where nothing is left to merge before that.
    """

    images: str
    path: str
    list: str = "train.jsonl"
    size: int = 512

    def run(self) -> None:
        """Writes the ranks, or says that they are there."""
        if pathlib.Path(self.path).exists():
            print(f"{self.path}: there")
            return
        entries = read_list(pathlib.Path(self.images) / self.list)
        ranks = vocab.train_bpe([entry["caption"] for entry in entries], self.size)
        if len(ranks) < self.size:
            raise ValueError(
                f"{len(entries)} captions of {self.list} give {len(ranks)} ranks, not {self.size}; "
                "set size to that, and the decoder's vocabulary with it"
            )
        vocab.save_ranks(ranks, self.path)
        print(f"{self.path}: {len(ranks)} ranks from {len(entries)} captions")
