"""One token from the decoder's logits: guidance, the grammar, top-k, top-p, temperature.

R request  B row of the model's batch: with the prompts, then without  V vocab
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(unsafe_hash=True)
class Sampling:
    """How a token is drawn from the logits; the defaults are the released Emu3 demo's.

    Guidance s mixes the branches as u + s (c - u), c with and u without the prompt; 1 is none.
    Then the grammar, `top_k` (0: all), `top_p` and `temperature` act, in this order; temperature 0
    takes the likeliest token. Random numbers come from (seed, prompt, copy) alone.
    """

    guidance: float = 3.0
    top_k: int = 2048
    top_p: float = 1.0
    temperature: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError if a field is out of range."""
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"{self}: want temperature >= 0, top_k >= 0, 0 < top_p <= 1")


# What the release takes, and the paper's evaluations (arXiv 2409.18869, section 4.1).
PRESETS = dict(
    official=Sampling(),
    paper=Sampling(guidance=5.0, top_k=16_384),
    geneval=Sampling(guidance=5.5, top_k=16_384),
    greedy=Sampling(guidance=1.0, top_k=0, temperature=0.0),
)


def sample(
    logits_BV: jax.Array, legal_V: jax.Array, keys_R: jax.Array, sampling: Sampling
) -> jax.Array:
    """One token a key from logits [R, V] (or [2R, V]: with the prompt, then without) -> token_R."""
    scores_RV = scores(logits_BV, legal_V, len(keys_R), sampling)
    return jax.vmap(jax.random.categorical)(keys_R, scores_RV)


def scores(logits_BV, legal_V, requests: int, sampling: Sampling) -> jax.Array:
    """The logarithms of what `sample` draws by, but for a constant: scores_RV, -inf if never."""
    scores_RV = logits_BV
    if len(logits_BV) != requests:  # log-probabilities would differ by a constant
        with_RV, without_RV = jnp.split(logits_BV, 2)
        scores_RV = without_RV + sampling.guidance * (with_RV - without_RV)
    scores_RV = jnp.where(legal_V, scores_RV, -jnp.inf)
    if sampling.temperature == 0:
        best_R = jnp.argmax(scores_RV, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(scores_RV.shape[-1]) == best_R, 0.0, -jnp.inf)
    if 0 < sampling.top_k < scores_RV.shape[-1]:
        best_RK = jax.lax.top_k(scores_RV, sampling.top_k)[0]
        least_R = best_RK.min(axis=-1, keepdims=True)  # of best_RK[:, -1:] XLA:CPU makes a sort
        scores_RV = jnp.where(scores_RV >= least_R, scores_RV, -jnp.inf)
    if sampling.top_p < 1:
        sorted_RV = jnp.sort(scores_RV, axis=-1, descending=True)
        before_RV = jnp.cumsum(jax.nn.softmax(sorted_RV), axis=-1) - jax.nn.softmax(sorted_RV)
        least_R = jnp.min(
            jnp.where(before_RV < sampling.top_p, sorted_RV, jnp.inf), axis=-1, keepdims=True
        )
        scores_RV = jnp.where(scores_RV >= least_R, scores_RV, -jnp.inf)
    return scores_RV / sampling.temperature
