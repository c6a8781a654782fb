"""Generation against transformers' own, the distribution of a draw, and what it depends on.

B batch (row)  T query position  V vocab  h rows of codes  w columns
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch

from emu3_jax import convert, generate, mesh, vocab
from emu3_jax.generate import Generator, Request
from emu3_jax.sampling import Sampling, sample

pytestmark = pytest.mark.usefixtures("one_device")

NAMES = reference.vocabulary()
IDS = vocab.Ids(
    pad=NAMES["<|endoftext|>"], bos=NAMES["<|extra_203|>"], eos=NAMES["<|extra_204|>"],
    eol=NAMES["<|extra_200|>"], eof=NAMES["<|extra_201|>"], img=NAMES["<|image token|>"],
    boi=NAMES["<|image start|>"], eoi=NAMES["<|image end|>"],
    visual=NAMES["<|visual token 000000|>"], codes=reference.CODES,
)  # fmt: skip
H, W = 3, 4
GREEDY = Sampling(guidance=1.0, top_k=0, temperature=0.0)
DRAWN = Sampling(guidance=2.0, top_k=16, top_p=0.9, seed=5)


@pytest.fixture(scope="module")
def hf():
    return reference.emu3()


@pytest.fixture(scope="module")
def ported(hf, tmp_path_factory):
    """The same model, by way of the files that transformers writes."""
    path = tmp_path_factory.mktemp("hf")
    hf.save_pretrained(path)
    return convert.load(str(path))


@pytest.fixture(scope="module")
def generator(ported):
    model, params = ported
    return Generator(model, jax.tree.map(jnp.asarray, params), IDS, reference.TEXT_IDS)


def head(h: int, w: int) -> list[int]:
    """An image's beginning; the sizes are letters to this vocabulary."""
    return [IDS.boi, h, 9, w, IDS.img]


def request(text: list[int], h: int = H, w: int = W, **more) -> Request:
    """An image asked for, and against another text."""
    return Request([IDS.bos, *text, *head(h, w)], [IDS.bos, 11, *head(h, w)], (1, h, w), **more)


TEXTS = [[1, 2, 7], [30]]  # the second is padded in front
REQUESTS = [request(text) for text in TEXTS]


def official_rule(tokens: torch.Tensor, h: int, w: int) -> list[int]:
    """The ids that Emu3's own prefix function allows next (section 6 of its processor's code)."""
    offset = len(tokens) - int(torch.nonzero(tokens == IDS.img)[0, 0])
    if offset % (w + 1) == 0:
        return [IDS.eol]
    after = offset - (w + 1) * h
    ends = {1: IDS.eof, 2: IDS.eoi, 3: IDS.eos}
    if after > 0:
        return [ends.get(after, IDS.pad)]
    return list(range(IDS.visual, IDS.visual + IDS.codes))


def by_transformers(hf, asked: Request, guidance: float) -> np.ndarray:
    """The likeliest codes_thw, with every token drawn in turn."""
    _, h, w = asked.size
    ids, null = torch.tensor([asked.prompt]), torch.tensor([asked.null])
    guided = dict(guidance_scale=guidance, negative_prompt_ids=null,
                  negative_prompt_attention_mask=torch.ones_like(null)) if guidance != 1 else {}
    with torch.no_grad():
        tokens = hf.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=h * (w + 1) + 3, pad_token_id=IDS.pad, eos_token_id=IDS.eos,
            prefix_allowed_tokens_fn=lambda _, tokens: official_rule(tokens, h, w), **guided,
        )  # fmt: skip
    tokens = tokens[0, ids.shape[1] :].tolist()
    assert tokens[-3:] == [IDS.eof, IDS.eoi, IDS.eos]
    return np.array(tokens[:-3]).reshape(1, h, w + 1)[..., :-1] - IDS.visual


def same(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    for got_thw, want_thw in zip(got, want, strict=True):
        np.testing.assert_array_equal(got_thw, want_thw)


def test_greedy_images_are_those_of_transformers(hf, generator):
    """Twenty grids and prompts in one batch with guidance, and some of them without."""
    rng = np.random.default_rng(0)
    asked = [request(rng.integers(0, 40, rng.integers(1, 9)).tolist(), h, w)
             for h, w in itertools.product(range(2, 7), range(3, 7))]  # fmt: skip
    guided = dataclasses.replace(GREEDY, guidance=3.0)
    same(generator.codes(asked, guided), [by_transformers(hf, r, 3.0) for r in asked])
    want = [by_transformers(hf, r, 1.0) for r in asked[:4]]
    same(generator.codes(asked[:4], GREEDY), want)
    pairs = zip(want, generator.codes(asked[:4], guided), strict=True)
    assert any((plain_thw != guided_thw).any() for plain_thw, guided_thw in pairs)


def test_greedy_text_is_that_of_transformers_up_to_eos(hf, ported, generator):
    """EOS is moved onto a token that comes, so that it does."""
    prompts = [[IDS.bos, 5, 6, 7], [IDS.bos, 8]]
    want = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = hf.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8,
                prefix_allowed_tokens_fn=lambda *_: list(range(reference.TEXT_IDS)),
                pad_token_id=IDS.pad, eos_token_id=IDS.eos,
            )  # fmt: skip
            want.append(out[0, len(prompt) :].tolist())
    assert generator.text(prompts, 8, GREEDY) == want
    eos = next(i for at, i in enumerate(want[0]) if at >= 2 and i not in want[0][:at])
    model, params = ported
    ending = Generator(model, params, dataclasses.replace(IDS, eos=eos),
                       reference.TEXT_IDS)  # fmt: skip
    cut = [row[: row.index(eos)] if eos in row else row for row in want]
    assert len(cut[0]) >= 2 and ending.text(prompts, 8, GREEDY) == cut


def plainly(model, params, asked: Request, sampling: Sampling) -> np.ndarray:
    """What a loop draws that knows nothing of caches, ends read in passing and columns.

    Every token is drawn from all logits of a pass over all tokens; codes take the numbers that
    belong to them.
    """
    t, h, w = asked.size

    @jax.jit
    def scores(tokens_BT, segments_BT):
        positions_BT = jnp.maximum(segments_BT.cumsum(axis=1) - 1, 0)
        return model.logits(params, tokens_BT, segments_BT, positions_BT)[:, -1]

    frame = h * (w + 1) + 1
    drawn, tokens = 0, []
    room = max(len(asked.prompt), len(asked.null)) + t * frame
    key = jax.random.fold_in(jax.random.key(sampling.seed), generate.seed_of(asked.prompt))
    key = jax.random.fold_in(key, asked.copy)
    for offset in range(asked.given * frame, t * frame):
        low, high = vocab.legal_range(IDS, offset + 1, h, w, t)
        branches = [[*branch, *tokens] for branch in (asked.prompt, asked.null)]
        tokens_BT = np.array([[0] * (room - len(b)) + b for b in branches], np.int32)
        segments_BT = np.array([[0] * (room - len(b)) + [1] * len(b) for b in branches], np.int32)
        logits_BV = scores(tokens_BT, segments_BT)
        if high - low == 1:
            tokens.append(low)
            continue
        draw_key_B = jax.random.fold_in(key, drawn)[None]
        token_B = sample(np.asarray(logits_BV)[:, low:high], True, draw_key_B, sampling)
        tokens.append(low + int(token_B[0]))
        drawn += 1
    frames = np.array(tokens).reshape(t - asked.given, frame)[:, :-1]
    return frames.reshape(-1, h, w + 1)[..., :-1] - IDS.visual


def test_draws_are_those_of_the_plain_loop(ported, generator):
    """Images of a column, of a row, and a video of which a frame is given, in one batch."""
    model, params = ported
    given = [IDS.visual + 5, IDS.visual + 9, IDS.eol, IDS.visual, IDS.visual + 63, IDS.eol, IDS.eof]
    video = request([4, 4], 2, 2)
    video = Request([*video.prompt, *given], [*video.null, *given], (3, 2, 2), given=1)
    asked = [request([3], 4, 1), request([3, 8, 9], 1, 5), video, request([2], 3, 2, copy=1)]
    got = generator.codes(asked, DRAWN)
    assert [codes_thw.shape for codes_thw in got] == [(1, 4, 1), (1, 1, 5), (2, 2, 2), (1, 3, 2)]
    same(got, [plainly(model, params, r, DRAWN) for r in asked])


def test_a_request_depends_on_seed_prompt_and_copy_alone(generator):
    """Not on the batch, its order or its padding."""
    first = generator.codes(REQUESTS, DRAWN)
    longer = request(list(range(10)))
    other = generator.codes([REQUESTS[1], longer, REQUESTS[0], request(TEXTS[0], copy=1)], DRAWN)
    same([other[2], other[0]], first)
    assert len({codes_thw.tobytes() for codes_thw in other}) == 4
    again = generator.codes(REQUESTS, dataclasses.replace(DRAWN, seed=6))
    assert (again[0] != first[0]).any() and (again[1] != first[1]).any()


def test_who_watches_sees_the_rows_come(generator):
    seen = []
    drawn = generator.codes(REQUESTS, DRAWN, lambda drawn_RT, n: seen.append((drawn_RT.copy(), n)))
    rows = [(2, 1), *((2, n) for n in range(W, H * W + 1, W))]
    assert [drawn_RT.shape for drawn_RT, _ in seen] == rows
    for drawn_RT, steps in seen:
        assert steps == H * W
        np.testing.assert_array_equal(
            drawn_RT, np.stack(drawn).reshape(2, -1)[:, : drawn_RT.shape[1]]
        )
    same(generator.codes(REQUESTS, DRAWN), drawn)


def test_a_cache_of_bytes_draws_almost_the_same(ported, generator):
    model, params = ported
    small = Generator(model, params, IDS, reference.TEXT_IDS, cache_dtype="int8")
    asked = [request([i], 3, 4) for i in range(8)]
    guided = dataclasses.replace(GREEDY, guidance=3.0)
    got, want = small.codes(asked, guided), generator.codes(asked, guided)
    first = [(a[0, 0, 0], b[0, 0, 0]) for a, b in zip(got, want, strict=True)]
    assert all(a == b for a, b in first)
    assert np.mean([a == b for a, b in zip(got, want, strict=True)]) > 0.5


def test_drawing_is_the_same_on_a_mesh(ported, generator):
    """Three requests over two rows of devices: one row more is drawn and left out."""
    model, params = ported
    asked = [*REQUESTS, request([5], 2, 6)]
    want = generator.codes(asked, DRAWN)
    texts = [[IDS.bos, 5, 6, 7], [IDS.bos, 8], [IDS.bos, 1]]
    said = generator.text(texts, 5, DRAWN)
    device_mesh = mesh.Mesh(data=2, fsdp=1, tensor=2).make(jax.devices()[:4])
    with jax.set_mesh(device_mesh):
        spread = jax.tree.map(
            lambda w, p: jax.device_put(w, mesh.sharding(device_mesh, p.dims)),
            params, model.params(),
        )  # fmt: skip
        there = Generator(model, spread, IDS, reference.TEXT_IDS)
        same(there.codes(asked, DRAWN), want)
        assert there.text(texts, 5, DRAWN) == said


def expected(logits_V, sampling: Sampling, legal_V, without_V=None) -> np.ndarray:
    """The distribution of a draw, a step at a time in float64."""
    scores_V = np.asarray(logits_V, np.float64)
    if without_V is not None:
        with_V = scores_V - np.log(np.exp(scores_V).sum())
        null_V = np.asarray(without_V, np.float64)
        null_V = null_V - np.log(np.exp(null_V).sum())
        scores_V = null_V + sampling.guidance * (with_V - null_V)
    scores_V = np.where(legal_V, scores_V, -np.inf)
    order = np.argsort(-scores_V)
    kept = list(order[: sampling.top_k] if sampling.top_k else order)
    p_V = np.exp(scores_V) / np.exp(scores_V[kept]).sum()
    nucleus, mass = [], 0.0
    for i in kept:  # the likeliest ones, until their mass reaches top_p
        if mass < sampling.top_p:
            nucleus.append(i)
        mass += p_V[i]
    final_V = np.zeros(len(scores_V))
    final_V[nucleus] = np.exp(scores_V[nucleus] / sampling.temperature)
    return final_V / final_V.sum()


LOGITS_V = np.array([1.0, 0.2, -0.5, 2.0, 1.5, -3.0, 0.9, 0.0], np.float32)
WITHOUT_V = np.array([0.0, 1.0, 0.5, 1.5, -1.0, 0.0, 1.0, 0.3], np.float32)
LEGAL_V = np.array([1, 1, 1, 0, 1, 1, 1, 1], bool)


@pytest.mark.parametrize(
    "sampling, guided",
    [
        (Sampling(top_k=0), False),
        (Sampling(top_k=0, temperature=0.4), False),
        (Sampling(top_k=3), False),
        (Sampling(top_k=0, top_p=0.6), False),
        (Sampling(top_k=4, top_p=0.7, temperature=2.0), False),
        (Sampling(top_k=0, guidance=3.0), True),
        (Sampling(top_k=5, top_p=0.8, guidance=0.5, temperature=1.5), True),
    ],
    ids=lambda value: value if isinstance(value, bool) else "-".join(
        f"{k}{v}" for k, v in vars(value).items()),
)  # fmt: skip
def test_draws_have_the_distribution_asked_for(sampling, guided):
    """The most likely id is illegal; top_p acts before temperature."""
    count = 20_000
    keys_B = jax.random.split(jax.random.key(1), count)
    logits_BV = jnp.tile(LOGITS_V, (count, 1))
    if guided:
        logits_BV = jnp.concatenate([logits_BV, jnp.tile(WITHOUT_V, (count, 1))])
    draw_B = jax.jit(lambda l_BV, k_B: sample(l_BV, LEGAL_V, k_B, sampling))
    want_V = expected(LOGITS_V, sampling, LEGAL_V, WITHOUT_V if guided else None)
    got_V = np.bincount(draw_B(logits_BV, keys_B), minlength=8) / count
    assert not got_V[want_V == 0].any() and got_V[want_V > 0.001].all()
    assert np.abs(got_V - want_V).max() < 5 * 0.5 / np.sqrt(count)


def test_temperature_zero_takes_the_likeliest_legal_id():
    keys_B = jax.random.split(jax.random.key(0), 1)
    token_B = sample(LOGITS_V[None], LEGAL_V, keys_B, Sampling(temperature=0.0))
    assert token_B.tolist() == [4]


@pytest.mark.parametrize(
    "fields", [dict(temperature=-0.1), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.1)]
)
def test_a_sampling_out_of_range(fields, generator):
    sampling = Sampling(**fields)
    with pytest.raises(ValueError) as error:
        generator.codes(REQUESTS, sampling)
    assert str(error.value) == f"{sampling}: want temperature >= 0, top_k >= 0, 0 < top_p <= 1"


def test_requests_that_do_not_end_as_they_must(generator):
    asked = REQUESTS[0]
    for fields, message in {
        "prompt": (dict(prompt=[IDS.bos, 5]), f"a prompt ends with id 5, not with img {IDS.img}"),
        "null": (dict(null=[IDS.bos, 5]), f"a prompt ends with id 5, not with img {IDS.img}"),
        "given": (dict(size=(2, H, W), given=1),
                  f"a prompt ends with id {IDS.img}, not with EOF {IDS.eof}"),
        "all": (dict(prompt=[IDS.eof], null=[IDS.eof], given=1),
                "all 1 latent frames of a video are given"),
    }.values():  # fmt: skip
        with pytest.raises(ValueError) as error:
            generator.codes([dataclasses.replace(asked, **fields)], DRAWN)
        assert str(error.value) == message


def test_rows_are_not_cut():
    with jax.set_mesh(mesh.Mesh(fsdp=1, context=2).make(jax.devices()[:2])):
        with pytest.raises(ValueError, match="take a mesh of context=1"):
            Generator(None, {}, IDS, reference.TEXT_IDS)
