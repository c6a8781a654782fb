"""How well a decoder predicts a store: nats a token and perplexity, of text and of vision apart.

B rows  T position
"""

import dataclasses
import json
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from emu3_jax import checkpoint, metrics, packages
from emu3_jax import data as data_lib
from emu3_jax.mesh import Mesh, sharding
from emu3_jax.transformer import Transformer

TELL = 10  # seconds between two lines of progress


@dataclasses.dataclass
class Perplexity:
    """Job: evaluates the newest checkpoint of the run `decoder` on `batches` batches of `data`.

    Counted is every target with a weight above 0, each as one, so the weights of the data's layouts
    choose: without those of meta and breaks, "text" is text alone, not also the controls that a
    model soon knows by heart. "vision" is the visual codes. Figures are means over all targets, not
    over batches. Goes to `path` as JSON, with what the data says of itself (epochs, say: rows have
    no end, so more batches than the data holds count some of it twice).
    """

    decoder: str
    data: data_lib.Data
    path: str = "runs/perplexity.json"
    batches: int = 100
    batch: int = 8
    mesh: Mesh = dataclasses.field(default_factory=Mesh)

    def run(self) -> None:
        """Writes `path` and prints the figures.

        Raises ValueError for a run without a checkpoint, data that cannot be read or is of another
        vocabulary, and a batch that does not split over the mesh.
        """
        if self.batches < 1:
            raise ValueError(f"batches = {self.batches}; want 1 or more")
        model, params, _, step = checkpoint.restore_model(self.decoder)
        if not isinstance(model, Transformer):
            raise ValueError(f"{self.decoder} holds a {type(model).__name__}, no decoder")
        model = dataclasses.replace(model, remat="none")  # nothing is saved for a backward pass
        device_mesh = self.mesh.make()
        with jax.set_mesh(device_mesh):
            positions = data_lib.positions_here(device_mesh, self.data.length)
            rows = self.data.open(self.batch, None, positions)
            sums = self._sums(model, _placed(model, params, device_mesh), rows, device_mesh)
        found = figures(sums)
        for kind, values in found.items():
            told = "  ".join(f"{name} {value:,.6g}" for name, value in values.items())
            metrics.say(f"{self.decoder}, step {step}: {kind}  {told}")
        about = dict(decoder=self.decoder, step=step, batches=self.batches, batch=self.batch)
        about |= found | dict(data=rows.figures(self.batches))
        if jax.process_index() == 0:
            text = json.dumps(_finite(about), indent=1) + "\n"
            packages.write_whole(pathlib.Path(self.path), text.encode())

    def _sums(self, model, params, rows, device_mesh) -> dict[str, tuple[int, float]]:
        """(targets, nats) of each kind."""

        @jax.jit
        def evaluate(params, batch):
            _, (_, means) = model.loss(params, {}, batch, None)
            counted_BT = batch["weights"] > 0
            visual_BT = batch["targets"] >= model.first_visual
            count = dict(text=jnp.sum(counted_BT & ~visual_BT),
                         vision=jnp.sum(counted_BT & visual_BT))  # fmt: skip
            return count, means, jnp.max(jnp.where(counted_BT, batch["targets"], 0))

        sums = dict(text=(0, 0.0), vision=(0, 0.0))
        start = told = time.monotonic()
        batches = data_lib.batches(rows, 0, self.batches, device_mesh)
        for done, batch in enumerate(batches, start=1):
            count, means, largest = jax.device_get(evaluate(params, batch))
            if largest >= model.vocab:
                raise ValueError(
                    f"the data has id {largest}, the decoder {model.vocab} ids; "
                    "use the vocabulary it was trained with"
                )
            for kind, (targets, nats) in sums.items():
                new = int(count[kind])
                sums[kind] = targets + new, nats + new * float(means[f"loss_{kind}"])
            if (now := time.monotonic()) - told > TELL:
                told = now
                left = metrics.time_left((now - start) / done * (self.batches - done))
                metrics.say(f"{self.decoder}: {done}/{self.batches} batches  {left} left")
        return sums


def figures(sums: dict[str, tuple[int, float]]) -> dict[str, dict[str, float]]:
    """What is told of (targets, nats) by kind; a kind without targets is left out."""
    found = {}
    for kind, (targets, nats) in sums.items():
        if not targets:
            continue
        mean = nats / targets
        found[kind] = dict(tokens=targets, nats_per_token=mean, perplexity=float(np.exp(mean)))
        if kind == "vision":
            found[kind]["bits_per_code"] = mean / math.log(2)
    return found


def _placed(model: Transformer, params, device_mesh):
    """The weights on the mesh, in the type that the model computes with anyway."""
    return jax.tree.map(
        lambda declared, w: jax.device_put(
            w.astype(jnp.dtype(model.dtype)), sharding(device_mesh, declared.dims)
        ),
        model.params(), params,
    )  # fmt: skip


def _finite(value):
    """The same with None for numbers that JSON has no words for."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
