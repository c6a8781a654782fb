"""Tokens from the decoder: images under the grammar, with classifier-free guidance, and text.

B batch (row)  T query position  S key position  D width  V vocab  h rows of codes  w columns
"""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from emu3_jax import vocab as vocab_lib
from emu3_jax.mesh import place


@dataclasses.dataclass
class Sampling:
    """How a token is drawn from the logits; the defaults are the released Emu3 demo's.

    Guidance s mixes the branches as u + s (c - u), c with and u without the prompt; 1 is none.
    Then the grammar, `top_k` (0: all), `top_p` and `temperature` act, in this order; temperature 0
    takes the likeliest token. A row's random numbers come from (seed, prompt) alone.
    """

    guidance: float = 3.0
    top_k: int = 2048
    top_p: float = 1.0
    temperature: float = 1.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Grid:
    """Legal ids while one image of height x width codes is drawn, from behind img to EOS."""

    ids: vocab_lib.Ids
    height: int
    width: int

    def __call__(self, step, id_V):
        low, high = vocab_lib.legal_range(self.ids, step + 1, self.height, self.width)
        return (low <= id_V) & (id_V < high)


@dataclasses.dataclass(frozen=True)
class Prose:
    """Legal ids while text is drawn: text and EOS."""

    text_size: int
    eos: int

    def __call__(self, step, id_V):
        return (id_V < self.text_size) | (id_V == self.eos)


class Generator:
    """Draws from one model; compiles once per shape of work, so equal batches are cheap.

    `params` lie on the current mesh (jax.set_mesh) and are cast once to the model's dtype. `ids`
    are the controls of the vocabulary (`Vocab.ids`), `text_size` its number of text ids.
    """

    def __init__(self, model, params, ids: vocab_lib.Ids, text_size: int, sampling: Sampling):
        if sampling.temperature < 0 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
            raise ValueError(f"{sampling}: want temperature >= 0, top_k >= 0, 0 < top_p <= 1")
        self._model, self._ids, self._text_size, self._sampling = model, ids, text_size, sampling
        self._params = jax.tree.map(lambda w: w.astype(model.dtype), params)
        self._decode = jax.jit(self._decode, static_argnums=(3, 4))

    def images(
        self, prompts: list[list[int]], null: list[int], height: int, width: int
    ) -> np.ndarray:
        """Codes of one image a prompt -> int32 codes_Bhw.

        Prompts and the null prompt (guidance's other branch) end with the img token.
        """
        ids = self._ids
        bad = [p for p in (*prompts, null) if p[-1] != ids.img]
        if bad:
            raise ValueError(f"an image prompt ends with id {bad[0][-1]}, not with img {ids.img}")
        null = [null] * len(prompts) if self._sampling.guidance != 1 else []
        rows = height * (width + 1)
        tokens_BT = self.tokens(prompts, null, rows + 3, Grid(ids, height, width))
        rows_Bhw = tokens_BT[:, :rows].reshape(-1, height, width + 1)
        return rows_Bhw[..., :-1] - ids.visual

    def text(self, prompts: list[list[int]], length: int) -> list[list[int]]:
        """At most `length` text ids after each prompt, up to EOS (which is left out)."""
        tokens_BT = self.tokens(prompts, [], length, Prose(self._text_size, self._ids.eos))
        return [[int(i) for i in row[: _index(row, self._ids.eos)]] for row in tokens_BT]

    def tokens(self, prompts, null, steps: int, legal) -> np.ndarray:
        """`steps` tokens after each prompt under `legal(step, id_V) -> bool_V` -> int32 tokens_BT.

        `null` holds the other branch's prompts, one a prompt, or nothing: no guidance. Both
        branches are one batch and are fed the same tokens.
        """
        branches = [*prompts, *null]
        longest = max(map(len, branches))
        tokens_BT = np.full((len(branches), longest), self._ids.pad, np.int32)
        segments_BT = np.zeros_like(tokens_BT)
        for row, prompt in enumerate(branches):  # padding in front: all rows go on at one index
            tokens_BT[row, longest - len(prompt) :] = prompt
            segments_BT[row, longest - len(prompt) :] = 1
        positions_BT = np.maximum(np.cumsum(segments_BT, axis=1) - 1, 0).astype(np.int32)
        seeds = [zlib.crc32(np.array(prompt, np.int64).tobytes()) for prompt in prompts]
        seeds_B = np.array(seeds, np.uint32)
        prompt = [place(jnp.asarray(x), "BT") for x in (tokens_BT, segments_BT, positions_BT)]
        return np.asarray(self._decode(self._params, prompt, seeds_B, steps, legal))

    def _decode(self, params, prompt, seeds_B, steps, legal):
        """Prefill, then one token a step for all rows -> tokens_BT; runs under jit."""
        tokens_BT, segments_BT, positions_BT = prompt
        rows, branches = seeds_B.shape[0], tokens_BT.shape[0] // seeds_B.shape[0]
        cache = self._model.empty_cache(tokens_BT.shape[0], tokens_BT.shape[1] + steps)
        x_BTD, cache = self._model.hidden(params, *prompt, cache)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(self._sampling.seed), seeds_B
        )
        ones_BT = jnp.ones_like(segments_BT[:, :1])

        def draw(x_BTD, step):
            logits_BV = place(self._model.scores(params, x_BTD[:, -1:])[:, 0], "..")
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
            legal_V = legal(step, jnp.arange(logits_BV.shape[-1]))
            return sample(logits_BV, legal_V, keys, self._sampling)

        def one(carry, step):
            token_B, cache = carry
            token_BT = place(jnp.tile(token_B, branches)[:, None], "BT")
            at_BT = positions_BT[:, -1:] + step
            x_BTD, cache = self._model.hidden(params, token_BT, ones_BT, at_BT, cache)
            token_B = draw(x_BTD, step)
            return (token_B, cache), token_B

        first_B = draw(x_BTD, 0)
        _, rest_TB = jax.lax.scan(one, (first_B, cache), jnp.arange(1, steps))
        return jnp.concatenate([first_B[None], rest_TB]).T.reshape(rows, steps)


def sample(
    logits_BV: jax.Array, legal_V: jax.Array, keys_B: jax.Array, sampling: Sampling
) -> jax.Array:
    """One token a key from logits [B, V] (or [2B, V]: with the prompt, then without) -> token_B."""
    scores_BV = logits_BV
    if logits_BV.shape[0] != keys_B.shape[0]:
        with_BV, without_BV = jnp.split(jax.nn.log_softmax(logits_BV), 2)
        scores_BV = without_BV + sampling.guidance * (with_BV - without_BV)
    scores_BV = jnp.where(legal_V, scores_BV, -jnp.inf)
    if sampling.temperature == 0:
        return jnp.argmax(scores_BV, axis=-1)
    if 0 < sampling.top_k < scores_BV.shape[-1]:
        least_B = jax.lax.top_k(scores_BV, sampling.top_k)[0][:, -1:]
        scores_BV = jnp.where(scores_BV >= least_B, scores_BV, -jnp.inf)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(scores_BV, axis=-1, descending=True)
        before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV), axis=-1) - jax.nn.softmax(sorted_BV)
        least_B = jnp.min(
            jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True
        )
        scores_BV = jnp.where(scores_BV >= least_B, scores_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, scores_BV / sampling.temperature)


def _index(row, token) -> int:
    """Where `token` first stands in `row`, or its length."""
    (found,) = np.nonzero(row == token)
    return int(found[0]) if len(found) else len(row)
