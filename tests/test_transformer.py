"""The decoder against transformers, and what must hold of it at any size.

B batch  T query position  S key position  D width  V vocab
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch

from emu3_jax import convert, loss, params
from emu3_jax.transformer import Transformer
from tests import toy

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def hf():
    return reference.emu3()


@pytest.fixture(scope="module")
def ported(hf, tmp_path_factory) -> tuple[Transformer, dict]:
    """The same model, by way of the files that transformers writes."""
    path = tmp_path_factory.mktemp("hf")
    hf.save_pretrained(path)
    return convert.load(str(path))


def documents(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, reference.TEXT_IDS, (rows, length), np.int32)


def alone(tokens_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, segments, positions of rows that hold one document each."""
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    return tokens_BT, np.ones_like(tokens_BT), positions_BT


@pytest.fixture(scope="module")
def tiny() -> tuple[Transformer, dict]:
    """A tiny model without dropout."""
    model = toy.model(dropout=0.0)
    return model, jax.jit(model.init)(jax.random.key(0))[0]


@pytest.fixture(scope="module")
def tiny_loss(tiny):
    """Loss and gradients of the tiny model for one packed row, without a key."""
    return jax.jit(lambda weights, batch: jax.value_and_grad(
        lambda w: tiny[0].loss(w, {}, batch, None)[0])(weights))  # fmt: skip


def test_logits_are_those_of_transformers(hf, ported):
    """Plain, and with padding in front of a row, as generation has it."""
    model, weights = ported
    tokens_BT = documents(2, 11)
    logits = jax.jit(model.logits)
    with torch.no_grad():
        want_BTV = hf(input_ids=torch.from_numpy(tokens_BT).long()).logits.numpy()
    np.testing.assert_allclose(logits(weights, *alone(tokens_BT)), want_BTV, rtol=0, atol=1e-5)
    mask_BT = np.ones_like(tokens_BT)
    mask_BT[1, :3] = 0
    positions_BT = np.maximum(mask_BT.cumsum(axis=1) - 1, 0)
    inputs = dict(input_ids=tokens_BT, attention_mask=mask_BT, position_ids=positions_BT)
    with torch.no_grad():
        padded_BTV = hf(**{k: torch.from_numpy(v).long() for k, v in inputs.items()}).logits.numpy()
    got_BTV = np.asarray(logits(weights, tokens_BT, mask_BT, positions_BT.astype(np.int32)))
    real_BT = mask_BT == 1
    np.testing.assert_allclose(got_BTV[real_BT], padded_BTV[real_BT], rtol=0, atol=1e-5)
    assert np.abs(padded_BTV[1, 3:] - want_BTV[1, 3:]).max() > 0.1  # the padding matters


def test_loss_is_that_of_transformers(hf, ported):
    model, weights = ported
    tokens_BT = documents(2, 11)
    labels_BT = np.where(np.arange(11) < 4, -100, tokens_BT)
    with torch.no_grad():
        want = hf(input_ids=torch.from_numpy(tokens_BT).long(),
                  labels=torch.from_numpy(labels_BT).long()).loss.item()  # fmt: skip
    tokens, segments, positions = alone(tokens_BT[:, :-1])
    batch = dict(tokens=tokens, segments=segments, positions=positions, targets=tokens_BT[:, 1:],
                 weights=(labels_BT[:, 1:] != -100).astype(np.float32))  # fmt: skip
    got, _ = jax.jit(model.loss)(weights, {}, batch, None)
    assert abs(float(got) - want) < 1e-6


def test_bfloat16_stays_near_and_gives_float32_logits(ported):
    model, weights = ported
    half = Transformer(**vars(model) | dict(dtype="bfloat16"))
    row = alone(documents(2, 11))
    exact_BTV, near_BTV = jax.jit(model.logits)(weights, *row), jax.jit(half.logits)(weights, *row)
    assert near_BTV.dtype == jnp.float32
    difference = np.abs(np.asarray(near_BTV - exact_BTV)).max()
    assert 1e-4 < difference < 0.1  # really in bfloat16, and right; logits reach 4


def test_the_real_model_has_8_492_011_520_weights():
    model = Transformer()
    assert params.count(model.params()) == 8_492_011_520
    weights, _ = jax.eval_shape(model.init, jax.random.key(0))
    assert params.count(weights) == 8_492_011_520
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype("float32")}
    decays = model.decays()
    norms = [decays["norm"], decays["layers"]["attn"]["norm"], decays["layers"]["mlp"]["norm"]]
    assert not any(norms) and sum(jax.tree.leaves(decays)) == len(jax.tree.leaves(decays)) - 3


def test_a_position_depends_on_its_document_up_to_itself():
    """By gradient: which embeddings reach the logits of each position, exactly."""
    model = toy.model(dropout=0.0)
    weights = jax.jit(model.init)(jax.random.key(0))[0]
    row = toy.pack([list(range(1, 7)), list(range(10, 16)), list(range(20, 24))], 16)
    batch = toy.stack([row])
    assert len(set(row["tokens"][:13])) == 13  # no id twice: an id's gradient is its position's
    mix_V = jax.random.normal(jax.random.key(1), (toy.VOCAB,))

    @jax.jit
    def gradient(at):
        def score(embed_VD):
            logits_BTV = model.logits(weights | dict(embed=embed_VD), batch["tokens"],
                                      batch["segments"], batch["positions"])  # fmt: skip
            return jnp.sum(logits_BTV * (jnp.arange(16) == at)[None, :, None] * mix_V)

        return jax.grad(score)(weights["embed"])

    reached_TT = np.stack([np.any(np.asarray(gradient(at)), axis=1)[row["tokens"]]
                           for at in range(13)])[:, :13]  # fmt: skip
    segments, positions = row["segments"][:13], row["positions"][:13]
    same = segments[:, None] == segments
    np.testing.assert_array_equal(reached_TT, same & (positions[:, None] >= positions))


def test_a_packed_row_equals_its_documents_alone(tiny, tiny_loss):
    """Loss and gradients are the weighted means of the documents'."""
    _, weights = tiny
    words = [[3, 9, 1, 40, 41, 5], list(range(30, 38)), [7, 7]]
    packed, grads = tiny_loss(weights, toy.stack([toy.pack(words, 16)]))
    total, want, want_grads = 0.0, 0.0, jax.tree.map(jnp.zeros_like, weights)
    for document in words:
        batch = toy.stack([toy.pack([document], 16)])
        weight = float(batch["weights"].sum())
        value, grad = tiny_loss(weights, batch)
        total, want = total + weight, want + weight * float(value)
        want_grads = jax.tree.map(lambda a, g, w=weight: a + w * g, want_grads, grad)
    assert total == toy.pack(words, 16)["weights"].sum() == 4 * 1.0 + 2 * 0.5 + 6 * 0.5 + 1 + 1 - 1
    np.testing.assert_allclose(packed, want / total, rtol=1e-6)
    for (path, got), one in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want_grads), strict=True
    ):
        bound = 1e-5 * np.abs(got).max()
        np.testing.assert_allclose(got, one / total, rtol=0, atol=bound, err_msg=str(path))


def test_loss_and_metrics_by_their_formula(tiny):
    model, weights = tiny
    words = [[3, 9, 1, 40, 41, 5], list(range(28, 38))]
    batch = toy.stack([toy.pack(words, 16), toy.pack(words[:1], 16)])
    loss_, (variables, metrics) = jax.jit(model.loss)(weights, {}, batch, None)
    logits_BTV = np.asarray(jax.jit(model.logits)(
        weights, batch["tokens"], batch["segments"], batch["positions"]), np.float64)  # fmt: skip
    log_p_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(axis=-1, keepdims=True))
    nll_BT = -np.take_along_axis(log_p_BTV, batch["targets"][..., None], axis=-1)[..., 0]
    weights_BT, visual_BT = batch["weights"], batch["targets"] >= toy.FIRST_VISUAL
    counted_BT = weights_BT > 0
    assert variables == {} and int(model.weight(batch)) == weights_BT.sum()
    want = dict(
        loss=(nll_BT * weights_BT).sum() / weights_BT.sum(),
        loss_text=nll_BT[counted_BT & ~visual_BT].mean(),
        loss_vision=nll_BT[counted_BT & visual_BT].mean(),
    )
    for key, value in want.items():
        np.testing.assert_allclose(dict(loss=loss_, **metrics)[key], value, rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("tile", [1, 12, 30, 1024])
def test_tiled_loss_equals_the_whole(tile):
    """Both results and all gradients, with 5 ids of padding; 30 does not divide 45."""
    keys = jax.random.split(jax.random.key(0), 3)
    x_BTD = jax.random.normal(keys[0], (2, 16, 8))
    head_DV = jax.random.normal(keys[1], (8, 45))
    targets_BT = jax.random.randint(keys[2], (2, 16), 0, 40)
    scale_BT = np.linspace(0, 1, 32, dtype=np.float32).reshape(2, 16)

    def whole(x_BTD, head_DV):
        lse_BT = jax.nn.logsumexp(x_BTD @ head_DV[:, :40], axis=-1)
        logits_BTV = x_BTD @ head_DV
        target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
        return lse_BT - target_BT, lse_BT

    def tiled(x_BTD, head_DV):
        return loss.cross_entropy(x_BTD, head_DV, targets_BT, 40, tile)

    def scalar(fn, *inputs):
        nll_BT, lse_BT = fn(*inputs)
        return jnp.sum(nll_BT * scale_BT + lse_BT**2 * scale_BT[::-1])

    def results(fn):
        grad = jax.grad(functools.partial(scalar, fn), argnums=(0, 1))
        return jax.jit(lambda *inputs: (fn(*inputs), grad(*inputs)))(x_BTD, head_DV)

    for got, want in zip(*map(jax.tree.leaves, (results(tiled), results(whole))), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5)


def test_saving_or_recomputing_gives_the_same_gradients():
    """remat and unroll change memory and time alone, dropout included."""
    batch = toy.stack([toy.pack([list(range(17))], 16)] * 2)
    results = []
    for fields in (dict(remat="none"), dict(remat="dots"), dict(remat="full", unroll=2)):
        model = toy.model(dropout=0.2, **fields)
        weights = jax.jit(toy.model().init)(jax.random.key(0))[0]
        results.append(jax.jit(jax.value_and_grad(
            lambda w, model=model: model.loss(w, {}, batch, jax.random.key(5))[0]))(weights))
    first = jax.tree.leaves(results[0])
    for other in map(jax.tree.leaves, results[1:]):
        for got, want in zip(other, first, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_decoding_with_a_cache_equals_the_full_pass(tiny):
    """A prompt with padding in front of a row, then a token at a time."""
    model, weights = tiny
    tokens_BT = np.random.default_rng(0).integers(1, toy.VOCAB, (2, 10), np.int32)
    segments_BT = np.ones_like(tokens_BT)
    segments_BT[1, :2] = 0
    positions_BT = np.maximum(segments_BT.cumsum(axis=1) - 1, 0).astype(np.int32)
    row = tokens_BT, segments_BT, positions_BT
    want_BTV = jax.jit(model.logits)(weights, *row)
    apart = model.apart(weights)

    @functools.partial(jax.jit, static_argnames="first")
    def step(tokens, segments, positions, cache, first=False):
        x_BTD, cache = model.read(apart, tokens, segments, positions, cache, first)
        return model.scores(weights, x_BTD), cache

    got_BTV, cache = step(*(x[:, :6] for x in row), model.empty_cache(2, 12), first=True)
    parts = [got_BTV]
    for at in range(6, 10):
        assert int(cache.length) == at
        got_BTV, cache = step(*(x[:, at : at + 1] for x in row), cache)
        parts.append(got_BTV)
    real_BT = segments_BT == 1
    got_BTV = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(got_BTV[real_BT], np.asarray(want_BTV)[real_BT], rtol=0, atol=2e-5)


def test_dropout_follows_the_key_and_is_off_without_one(tiny):
    plain, weights = tiny
    model = toy.model(dropout=0.1)
    batch = toy.stack([toy.pack([list(range(17))], 16)])
    value = jax.jit(lambda key: model.loss(weights, {}, batch, key)[0])
    first, again, other = (float(value(jax.random.key(seed))) for seed in (0, 0, 1))
    assert first == again != other
    without = float(jax.jit(plain.loss)(weights, {}, batch, jax.random.key(0))[0])
    assert float(value(None)) == float(jax.jit(plain.loss)(weights, {}, batch, None)[0])
    np.testing.assert_allclose(float(value(None)), without, rtol=1e-6)
    assert abs(first - without) > 1e-3 and abs(other - without) > 1e-3


def test_dropout_acts_on_embeddings_and_on_both_branches_of_every_layer():
    """Zeros of the last hidden state: all of the branches that add to it must have been dropped."""
    model = toy.model(width=64, layers=1, dropout=0.5)
    weights = jax.jit(model.init)(jax.random.key(0))[0]
    row = alone(np.arange(1, 33, dtype=np.int32).reshape(2, 16))
    hidden = jax.jit(lambda w, key: model.hidden(w, *row, key))

    def zeros(attention: bool, mlp: bool) -> float:
        attn, rest = weights["layers"]["attn"], weights["layers"]["mlp"]
        layers = dict(attn=attn | dict(o=attn["o"] * attention),
                      mlp=rest | dict(down=rest["down"] * mlp))  # fmt: skip
        x_BTD = np.asarray(hidden(weights | dict(layers=layers), jax.random.key(2)))
        return float((x_BTD == 0).mean())

    share = {branches: zeros(*branches) for branches in
             ((False, False), (True, False), (False, True), (True, True))}  # fmt: skip
    for branches, got in share.items():
        want = 0.5 ** (1 + sum(branches))
        assert abs(got - want) < 4 * np.sqrt(want * (1 - want) / (2 * 16 * 64)), (branches, got)


def test_layers_draw_their_own_dropout():
    """Were their masks equal, a quarter of the last hidden state would be zeros."""
    model = toy.model(width=64, dropout=0.5)
    weights = jax.jit(model.init)(jax.random.key(0))[0]
    mlp = weights["layers"]["mlp"]
    layers = weights["layers"] | dict(mlp=mlp | dict(down=mlp["down"] * 0))
    row = alone(np.arange(1, 33, dtype=np.int32).reshape(2, 16))
    x_BTD = jax.jit(lambda w: model.hidden(w, *row, jax.random.key(2)))(
        weights | dict(layers=layers)
    )
    want = 0.5**3  # embedding and two attention branches, each by itself
    share = float((np.asarray(x_BTD) == 0).mean())
    assert abs(share - want) < 4 * np.sqrt(want * (1 - want) / (2 * 16 * 64))


def test_an_unknown_remat_policy(tiny):
    _, weights = tiny
    model = toy.model(remat="ful")
    with pytest.raises(ValueError, match=r"^remat 'ful' is none of none, dots, attention, full$"):
        model.logits(weights, *alone(documents(1, 4)))


def test_strict_promotion(tiny):
    """No operation of the training step mixes types silently."""
    model, weights = toy.model(dtype="bfloat16"), tiny[1]
    batch = toy.stack([toy.pack([list(range(17))], 16)])
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(jax.grad(
            lambda w: model.loss(w, {}, batch, jax.random.key(0))[0]), weights)  # fmt: skip
