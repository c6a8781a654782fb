"""Guessing ahead gives what drawing one by one gives: the same greedy codes, the same distribution.

B batch  T position  V vocab  C code
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from emu3_jax import generate, vocab
from emu3_jax.generate import Request
from emu3_jax.jacobi import Speculative
from emu3_jax.sampling import Sampling, scores

pytestmark = pytest.mark.usefixtures("one_device")

CODES = 6
IDS = vocab.Ids(pad=0, bos=1, eos=2, eol=3, eof=4, img=5, boi=6, eoi=7, visual=10, codes=CODES)
GREEDY = Sampling(guidance=1.0, top_k=0, temperature=0.0)


@pytest.fixture(scope="module")
def model():
    """Its weights are large, so that what comes depends on what came."""
    task = toy.model(layers=2)
    params, _ = jax.jit(task.init)(jax.random.key(3))
    return task, jax.tree.map(lambda w: w * 4, params)


def request(h: int, w: int, t: int = 1, **more) -> Request:
    return Request([1, 8, 9, 6, 5], [1, 6, 5], (t, h, w), **more)


def test_greedy_codes_are_those_of_one_by_one(model):
    """Also past the ends of rows and frames, in a batch, and where frames are given."""
    plain = generate.Generator(*model, IDS, 8)
    ahead = Speculative(*model, IDS, 8, window=5)
    guided = dataclasses.replace(GREEDY, guidance=2.0)
    given = [10, 11, 3, 12, 10, 3, 4]
    video = Request([1, 8, 6, 5, *given], [1, 6, 5, *given], (3, 2, 2), given=1)
    other = dataclasses.replace(request(4, 6), prompt=[1, 9, 9, 6, 5])
    for asked, sampling in (([request(4, 6), other], guided), ([video], GREEDY)):
        got, want = ahead.codes(asked, sampling), plain.codes(asked, sampling)
        for got_thw, want_thw in zip(got, want, strict=True):
            np.testing.assert_array_equal(got_thw, want_thw)
        assert 0 < ahead.passes < ahead.tokens


def exactly(model, asked: Request, sampling: Sampling) -> np.ndarray:
    """The probability of each row of three codes, from passes over whole sequences."""
    task, params = model
    rows = np.array(list(itertools.product(range(CODES), repeat=3)))
    p_R = np.ones(len(rows))
    branches = []
    for branch in (asked.prompt, asked.null):
        tokens_BT = np.concatenate([np.tile(branch, (len(rows), 1)), IDS.visual + rows[:, :2]], 1)
        ones_BT = np.ones_like(tokens_BT)
        at_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
        logits_BTV = jax.jit(task.logits)(params, jnp.array(tokens_BT), ones_BT, at_BT)
        branches.append(np.asarray(logits_BTV)[:, -3:, IDS.visual : IDS.visual + CODES])
    for place in range(3):
        logits_BC = np.concatenate([branch_BTC[:, place] for branch_BTC in branches])
        scores_BC = scores(jnp.array(logits_BC), True, len(rows), sampling)
        p_BC = np.asarray(jax.nn.softmax(scores_BC))
        p_R *= p_BC[np.arange(len(rows)), rows[:, place]]
    return p_R


def test_draws_have_the_exact_distribution(model, monkeypatch):
    """By the frequencies of all 216 rows of three codes; 100 are drawn at the pace of the slowest,
    and so at most two of a pass."""
    monkeypatch.setattr(generate, "BUCKET", 8)  # of padding
    sampling, count, batch = Sampling(guidance=1.5, top_k=5, temperature=1.2), 6_000, 100
    ahead = Speculative(*model, IDS, 8, window=4)
    want_R = exactly(model, request(1, 3), sampling)
    assert abs(want_R.sum() - 1) < 1e-4
    tolerance = 4 * np.sqrt(want_R * (1 - want_R) / count) + 2 / count
    found_R = np.zeros(CODES**3)
    for start in range(0, count, batch):
        asked = [request(1, 3, copy=start + i) for i in range(batch)]
        for codes_thw in ahead.codes(asked, sampling):
            a, b, c = codes_thw.ravel()
            found_R[(a * CODES + b) * CODES + c] += 1
    assert (np.abs(found_R / count - want_R) < tolerance).all()


def test_alone_a_request_is_guessed_faster_than_in_company(model):
    """And a window that is too small, or images of several sizes, are refused."""
    ahead = Speculative(*model, IDS, 8, window=8)
    ahead.codes([request(6, 6)], Sampling(guidance=1.0, top_k=2))
    alone = ahead.tokens / ahead.passes
    assert alone > 1.0
    with pytest.raises(ValueError, match="several sizes cannot be guessed together"):
        ahead.codes([request(2, 2), request(2, 3)], GREEDY)
    with pytest.raises(ValueError, match="window = 1: want 2 or more"):
        Speculative(*model, IDS, 8, window=1)
