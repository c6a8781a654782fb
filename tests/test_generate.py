"""Generation against transformers' own, the distribution of a draw, and what it depends on.

B batch (row)  T query position  V vocab  h rows of codes  w columns
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch

from emu3_jax import convert, generate, mesh, vocab
from emu3_jax.generate import Generator, Grid, Prose, Sampling

pytestmark = pytest.mark.usefixtures("one_device")

NAMES = reference.vocabulary()
IDS = vocab.Ids(
    pad=NAMES["<|endoftext|>"], bos=NAMES["<|extra_203|>"], eos=NAMES["<|extra_204|>"],
    eol=NAMES["<|extra_200|>"], eof=NAMES["<|extra_201|>"], img=NAMES["<|image token|>"],
    boi=NAMES["<|image start|>"], eoi=NAMES["<|image end|>"],
    visual=NAMES["<|visual token 000000|>"], codes=reference.CODES,
)  # fmt: skip
H, W = 3, 4
STEPS = H * (W + 1) + 3
HEAD = [IDS.boi, 3, 9, 4, IDS.img]
PROMPTS = [[IDS.bos, 1, 2, 7, *HEAD], [IDS.bos, 30, *HEAD]]  # the second is padded in front
NULL = [IDS.bos, 11, *HEAD]
GREEDY = Sampling(guidance=3.0, top_k=0, temperature=0.0)
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
def generators(ported):
    """Makes a generator a sampling, once."""
    model, params = ported
    params = jax.tree.map(jnp.asarray, params)
    made = {}

    def get(sampling: Sampling) -> Generator:
        key = dataclasses.astuple(sampling)
        if key not in made:
            made[key] = Generator(model, params, IDS, reference.TEXT_IDS, sampling)
        return made[key]

    return get


def official_rule(tokens: torch.Tensor) -> list[int]:
    """The ids that Emu3's own prefix function allows next (section 6 of its processor's code)."""
    offset = len(tokens) - int(torch.nonzero(tokens == IDS.img)[0, 0])
    if offset % (W + 1) == 0:
        return [IDS.eol]
    after = offset - (W + 1) * H
    ends = {1: IDS.eof, 2: IDS.eoi, 3: IDS.eos}
    if after > 0:
        return [ends.get(after, IDS.pad)]
    return list(range(IDS.visual, IDS.visual + IDS.codes))


def by_transformers(hf, prompt: list[int], **guidance) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        tokens = hf.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=STEPS,
            prefix_allowed_tokens_fn=lambda _, tokens: official_rule(tokens),
            pad_token_id=IDS.pad, eos_token_id=IDS.eos, **guidance,
        )  # fmt: skip
    return tokens[0, len(prompt) :].tolist()


def test_greedy_images_with_guidance_are_those_of_transformers(hf, generators):
    null = torch.tensor([NULL])
    want = [by_transformers(hf, prompt, guidance_scale=3.0, negative_prompt_ids=null,
                            negative_prompt_attention_mask=torch.ones_like(null))
            for prompt in PROMPTS]  # fmt: skip
    got_BT = generators(GREEDY).tokens(PROMPTS, [NULL] * 2, STEPS, Grid(IDS, H, W))
    assert got_BT.tolist() == want
    assert [row[-3:] for row in want] == [[IDS.eof, IDS.eoi, IDS.eos]] * 2 and want[0] != want[1]
    codes_Bhw = generators(GREEDY).images(PROMPTS, NULL, H, W)
    assert codes_Bhw.shape == (2, H, W) and 0 <= codes_Bhw.min() and codes_Bhw.max() < IDS.codes
    rows = np.concatenate([IDS.visual + codes_Bhw, np.full((2, H, 1), IDS.eol)], axis=-1)
    assert rows.reshape(2, -1).tolist() == [row[:-3] for row in want]


def test_greedy_images_without_guidance_are_those_of_transformers(hf, generators):
    plain = dataclasses.replace(GREEDY, guidance=1.0)
    want = [by_transformers(hf, prompt) for prompt in PROMPTS]
    got_BT = generators(plain).tokens(PROMPTS, [], STEPS, Grid(IDS, H, W))
    assert got_BT.tolist() == want
    guided_Bhw = generators(GREEDY).images(PROMPTS, NULL, H, W)
    assert (guided_Bhw != generators(plain).images(PROMPTS, NULL, H, W)).any()


def test_greedy_text_is_that_of_transformers_up_to_eos(hf, generators):
    """EOS is moved onto a token that comes, so that it does."""
    prompts = [[IDS.bos, 5, 6, 7], [IDS.bos, 8]]
    text_ids = list(range(reference.TEXT_IDS))
    want = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                              max_new_tokens=8, prefix_allowed_tokens_fn=lambda *_: text_ids,
                              pad_token_id=IDS.pad, eos_token_id=IDS.eos)  # fmt: skip
            want.append(out[0, len(prompt) :].tolist())
    generator = generators(GREEDY)
    got_BT = generator.tokens(prompts, [], 8, Prose(reference.TEXT_IDS, IDS.eos))
    assert got_BT.tolist() == want
    eos = next(i for at, i in enumerate(want[0]) if at >= 2 and i not in want[0][:at])
    ending = Generator(generator._model, generator._params, dataclasses.replace(IDS, eos=eos),
                       reference.TEXT_IDS, GREEDY)  # fmt: skip
    cut = [row[: row.index(eos)] if eos in row else row for row in want]
    assert len(cut[0]) >= 2 and ending.text(prompts, 8) == cut


def test_a_row_depends_on_seed_and_prompt_alone(generators):
    """Not on the batch, its order or its padding; and on both of them it does."""
    longer = [IDS.bos, *range(10), *HEAD]
    generator = generators(DRAWN)
    first_Bhw = generator.images(PROMPTS, NULL, H, W)
    other_Bhw = generator.images([PROMPTS[1], longer, PROMPTS[0]], NULL, H, W)
    np.testing.assert_array_equal(other_Bhw[2], first_Bhw[0])
    np.testing.assert_array_equal(other_Bhw[0], first_Bhw[1])
    assert len({codes_hw.tobytes() for codes_hw in other_Bhw}) == 3
    again = generators(dataclasses.replace(DRAWN, seed=6)).images(PROMPTS, NULL, H, W)
    assert (again[0] != first_Bhw[0]).any() and (again[1] != first_Bhw[1]).any()
    greedy_Bhw = generators(GREEDY).images(PROMPTS, NULL, H, W)
    assert (greedy_Bhw != first_Bhw).any()


def test_drawing_is_the_same_on_a_mesh(ported, generators):
    model, params = ported
    want_Bhw = generators(DRAWN).images(PROMPTS, NULL, H, W)
    device_mesh = mesh.Mesh(data=2, fsdp=1, tensor=2).make(jax.devices()[:4])
    with jax.set_mesh(device_mesh):
        spread = jax.tree.map(
            lambda w, p: jax.device_put(w, mesh.sharding(device_mesh, p.dims)),
            params, model.params(),
        )  # fmt: skip
        generator = Generator(model, spread, IDS, reference.TEXT_IDS, DRAWN)
        np.testing.assert_array_equal(generator.images(PROMPTS, NULL, H, W), want_Bhw)


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
    draw_B = jax.jit(lambda l_BV, k_B: generate.sample(l_BV, LEGAL_V, k_B, sampling))
    want_V = expected(LOGITS_V, sampling, LEGAL_V, WITHOUT_V if guided else None)
    got_V = np.bincount(draw_B(logits_BV, keys_B), minlength=8) / count
    assert not got_V[want_V == 0].any() and got_V[want_V > 0.001].all()
    assert np.abs(got_V - want_V).max() < 5 * 0.5 / np.sqrt(count)


def test_temperature_zero_takes_the_likeliest_legal_id():
    keys_B = jax.random.split(jax.random.key(0), 1)
    token_B = generate.sample(LOGITS_V[None], LEGAL_V, keys_B, Sampling(temperature=0.0))
    assert token_B.tolist() == [4]


def test_the_grammar_of_text_and_of_an_image():
    id_V = np.arange(len(NAMES))
    legal = np.flatnonzero(Prose(reference.TEXT_IDS, IDS.eos)(0, id_V))
    assert legal.tolist() == [*range(reference.TEXT_IDS), IDS.eos]
    tokens = [IDS.img]
    for step in range(STEPS):
        legal = np.flatnonzero(Grid(IDS, H, W)(step, id_V)).tolist()
        assert legal == official_rule(torch.tensor(tokens)), step
        tokens.append(legal[0])


@pytest.mark.parametrize(
    "fields", [dict(temperature=-0.1), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.1)]
)
def test_a_sampling_out_of_range(fields):
    sampling = Sampling(**fields)
    with pytest.raises(ValueError) as error:
        Generator(None, {}, IDS, reference.TEXT_IDS, sampling)
    assert str(error.value) == f"{sampling}: want temperature >= 0, top_k >= 0, 0 < top_p <= 1"


def test_an_image_prompt_that_does_not_end_with_img(generators):
    for prompts, null in (([PROMPTS[0], [IDS.bos, 5]], NULL), (PROMPTS, [IDS.bos, 5])):
        with pytest.raises(ValueError) as error:
            generators(GREEDY).images(prompts, null, H, W)
        assert str(error.value) == f"an image prompt ends with id 5, not with img {IDS.img}"
