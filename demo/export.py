"""The demo's model as an ordinary Hugging Face checkpoint, with the means to check it.

B documents  T positions  V vocab
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import mixture
from emu3_jax import checkpoint, mesh
from emu3_jax import vocab as vocabulary
from tokenizer.exchange import Convert


@dataclasses.dataclass
class Export:
    """Job: converts, then writes parity.npz beside the result.

    It holds one packed row's first `documents` documents: `ids_BT` (padded with the vocabulary's
    PAD), their lengths `length_B`, and our float32 `logits_BTV`.
    """

    convert: Convert
    decoder: str
    data: mixture.Mixture
    documents: int = 4

    def run(self) -> None:
        """Converts and computes what is not there yet."""
        self.convert.run()
        path = pathlib.Path(self.convert.target, "parity.npz")
        if path.exists():
            return
        ids_BT, length_B = self._ids()
        model, params, _, _ = checkpoint.restore_model(self.decoder)
        index_T = np.arange(ids_BT.shape[1], dtype=np.int32)
        segments_BT = (index_T < length_B[:, None]).astype(np.int32)
        with jax.set_mesh(mesh.Mesh(fsdp=1).make(jax.devices()[:1])):
            logits_BTV = jax.jit(model.logits)(
                jax.tree.map(jnp.asarray, params), jnp.asarray(ids_BT), jnp.asarray(segments_BT),
                jnp.asarray(np.tile(index_T, (len(ids_BT), 1))),
            )  # fmt: skip
        np.savez_compressed(path, ids_BT=ids_BT, length_B=length_B,
                            logits_BTV=np.asarray(logits_BTV))  # fmt: skip
        print(f"{path}: logits of {len(ids_BT)} documents")

    def _ids(self) -> tuple[np.ndarray, np.ndarray]:
        """The first documents of the data's first rows, one a row (without their last id)."""
        rows, found = self.data.rows(), []
        number = 0
        while len(found) < self.documents:
            row = rows[number]
            for segment in range(1, row["segments"].max() + 1):
                found.append(row["tokens"][row["segments"] == segment])
            number += 1
        found = found[: self.documents]
        length_B = np.array([len(ids) for ids in found])
        pad = vocabulary.Vocab.load(self.data.vocab, self.data.codes).pad
        ids_BT = np.full((len(found), length_B.max()), pad, np.int32)
        for ids_T, found_T in zip(ids_BT, found, strict=True):
            ids_T[: len(found_T)] = found_T
        return ids_BT, length_B
