"""Perplexity of the toy decoder against NumPy on its logits, row by row."""

import dataclasses
import json

import grain
import jax
import numpy as np
import pytest

from emu3_jax import checkpoint, mesh, params, train
from inference.perplexity import Perplexity
from tests import toy
from tokenizer import vq
from tokenizer.train import TokenizerTask

BATCHES, BATCH = 3, 8


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> str:
    """A run with a checkpoint of initial weights, saved with the policy that has to be settled."""
    run_dir = str(tmp_path_factory.mktemp("decoder"))
    job = train.Train(task=toy.model(remat="auto"), data=toy.Counting())
    with jax.set_mesh(mesh.Mesh().make()), checkpoint.Checkpoints(run_dir) as saved:
        state = dict(params=params.init(job.task.params(), jax.random.key(0)), variables={})
        saved.save(7, state, job, {}, wait=True)
    return run_dir


@dataclasses.dataclass
class Lines(toy.Counting):
    """Data: the same with the loss of some targets left out, of more the later the row is."""

    def rows(self) -> grain.MapDataset:
        """Rows without end, each a function of its index."""
        return super().rows().map_with_index(_thinned)


def _thinned(index: int, row: dict) -> dict:
    kept_T = np.arange(len(row["weights"])) % (1 + index // BATCH) == 0
    return row | dict(weights=np.where(kept_T, row["weights"], 0))


def expected(decoder: str, data) -> dict[str, np.ndarray]:
    """-log p of every target that counts, by kind, and the batch it is from."""
    model, weights, _, _ = checkpoint.restore_model(decoder)
    model = dataclasses.replace(model, remat="none")
    rows = data.rows()
    batch = toy.stack([rows[index] for index in range(BATCHES * BATCH)])
    with jax.set_mesh(mesh.Mesh().make(jax.devices()[:1])):
        of = (batch[name] for name in ("tokens", "segments", "positions"))
        logits_BTV = np.asarray(jax.jit(model.logits)(weights, *of), np.float64)
    log_p_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(axis=-1, keepdims=True))
    nll_BT = -np.take_along_axis(log_p_BTV, batch["targets"][..., None], axis=-1)[..., 0]
    counted_BT, visual_BT = batch["weights"] > 0, batch["targets"] >= toy.FIRST_VISUAL
    return {
        kind: [nll_BT[i : i + BATCH][(counted_BT & of_BT)[i : i + BATCH]]
               for i in range(0, len(nll_BT), BATCH)]
        for kind, of_BT in dict(text=~visual_BT, vision=visual_BT).items()
    }  # fmt: skip


def test_perplexity_by_modality(decoder, tmp_path, capsys):
    """Over a mesh that cuts everything: means over all targets, not of the batches' means."""
    device_mesh = mesh.Mesh(data=2, context=2, tensor=2)
    path = tmp_path / "new" / "perplexity.json"
    Perplexity(decoder, Lines(), str(path), BATCHES, BATCH, device_mesh).run()
    found = json.loads(path.read_text())
    assert found.pop("data") == {}
    assert {name: found.pop(name) for name in ("decoder", "step", "batches", "batch")} == dict(
        decoder=decoder, step=7, batches=BATCHES, batch=BATCH
    )
    want = expected(decoder, Lines())
    assert found.keys() == want.keys()
    said = capsys.readouterr().out
    for kind, nll in want.items():
        nll_N = np.concatenate(nll)
        mean = nll_N.mean()
        assert abs(mean / np.mean([part.mean() for part in nll]) - 1) > 1e-3
        values = found[kind]
        assert values.pop("tokens") == len(nll_N)
        np.testing.assert_allclose(values.pop("nats_per_token"), mean, rtol=1e-5)
        np.testing.assert_allclose(values.pop("perplexity"), np.exp(mean), rtol=1e-4)
        if kind == "vision":
            np.testing.assert_allclose(values.pop("bits_per_code"), np.log2(np.e) * mean, rtol=1e-5)
        assert not values
        assert f"step 7: {kind}  tokens {len(nll_N)}  nats_per_token {mean:.3g}"[:-1] in said


@dataclasses.dataclass
class Foreign(toy.Counting):
    """Data: ids of a larger vocabulary."""

    def rows(self) -> grain.MapDataset:
        """Rows without end, each a function of its index."""
        return super().rows().map(lambda row: row | dict(targets=row["targets"] * 0 + 56))


def test_what_does_not_fit_is_told(decoder, tmp_path, monkeypatch):
    path = str(tmp_path / "perplexity.json")
    with pytest.raises(ValueError, match="the data has id 56, the decoder 48 ids; use the vocab"):
        Perplexity(decoder, Foreign(), path, BATCHES, BATCH).run()
    with pytest.raises(ValueError, match="batch 6 does not split over data"):
        Perplexity(decoder, toy.Counting(), path, BATCHES, 6).run()
    with pytest.raises(ValueError, match="batches = 0; want 1 or more"):
        Perplexity(decoder, toy.Counting(), path, 0).run()
    task = TokenizerTask(vq.VQConfig())
    monkeypatch.setattr(checkpoint, "restore_model", lambda _: (task, {}, {}, 1))
    with pytest.raises(ValueError, match="holds a TokenizerTask, no decoder"):
        Perplexity(decoder, toy.Counting(), path).run()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no checkpoints/ there"):
        Perplexity(str(tmp_path), toy.Counting(), path).run()
    assert not (tmp_path / "perplexity.json").exists()


@dataclasses.dataclass
class Words(toy.Counting):
    """Data: the loss of text alone."""

    def rows(self) -> grain.MapDataset:
        """Rows without end, each a function of its index."""
        return super().rows().map(lambda row: row | dict(
            weights=np.where(row["targets"] < toy.FIRST_VISUAL, row["weights"], 0)))  # fmt: skip


def test_a_kind_without_targets_is_left_out(decoder, tmp_path):
    path = tmp_path / "perplexity.json"
    Perplexity(decoder, Words(), str(path), 1, BATCH).run()
    found = json.loads(path.read_text())
    assert "vision" not in found
    (nll_N, *_) = expected(decoder, Words())["text"]
    assert found["text"]["tokens"] == len(nll_N)
    np.testing.assert_allclose(found["text"]["nats_per_token"], nll_N.mean(), rtol=1e-5)
