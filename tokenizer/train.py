"""Training the tokenizer on images: the task that the one trainer runs.

Left where they start, most codes never meet a vector and never move. So the codebook is placed on
encoder outputs early on, and codes that nobody uses are moved there again. Both only set
parameters: the result is a plain Emu3 tokenizer.

Legend: B batch, H height, W width, C colours, h w the latent grid, E code dim, K codes, N vectors
of a batch, R rows of the buffer of recent vectors.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from emu3_jax.train import Task
from tokenizer import patches, pixels, quantize, vq

JITTER = 0.02  # of the buffer's standard deviation: keeps codes apart that start on one vector
RESTART_ROWS = 4096  # recent vectors of which some become codes
RARE = 0.1  # of the uniform share of hits: a code with fewer does not count as used


@dataclasses.dataclass
class TokenizerTask(Task):
    """Reconstruct images through the codes.

    `variables` holds `stats` (batch norm), `buffer_RE` (recent encoder outputs, a ring), `seen`
    (how many went in) and `hits_K` (how often a code is used per step, a moving average).

    At a restart the share `restart_share` of the codes moves: those that would be missed least
    (few hits, or another code close by) to recent vectors, the likelier the farther from any code.
    `patches` makes each code a function of its own patch alone (see patches.py).
    """

    config: vq.VQConfig
    l2_weight: float = 1.0
    l1_weight: float = 0.0
    commitment_weight: float = 1.0
    codebook_weight: float = 0.25
    buffer_rows: int = 32768
    codebook_init_step: int = 16  # the codebook is placed after this many updates; -1: never
    restart_every: int = 20  # updates between restarts
    restart_until: int = 0  # no restart from this update on, so that codes settle
    restart_share: float = 1 / 32
    hits_decay: float = 0.97
    average_codes: bool = False  # codes follow the mean of their vectors, not the gradient
    patches: bool = False

    axis_type = AxisType.Auto  # convolutions carry no letters: XLA lays them out over the batch

    def init(self, key: jax.Array) -> tuple[vq.Arrays, dict]:
        """New parameters, and the variables that no gradient trains.

        Raises ValueError if codes are to be averages, but nothing ever places them.
        """
        if self.average_codes and self.codebook_init_step < 1:
            raise ValueError(
                f"average_codes with codebook_init_step {self.codebook_init_step}: averages start "
                "where codes are placed; take a step of 1 or more"
            )
        params, stats = vq.init(self.config, key)
        if self.patches:
            params = patches.start(self.config, params, jax.random.fold_in(key, 1))
        return params, self.variables(stats)

    def variables(self, stats: vq.Arrays) -> dict:
        """Fresh variables around given batch statistics, to go on from a loaded tokenizer."""
        return {
            "stats": stats,
            "buffer_RE": jnp.zeros((self.buffer_rows, self.config.code_dim)),
            "seen": jnp.zeros((), jnp.int32),
            # Negative: no hits yet. The first batch says what a uniform share is.
            "hits_K": jnp.full(self.config.codebook_size, -1.0),
            "sums_KE": jnp.zeros((self.config.codebook_size, self.config.code_dim)),
        }

    def loss(self, params: vq.Arrays, variables: dict, batch: dict, key: jax.Array):
        """Args: batch: {"image": x_BHWC}, uint8 or floats in [-1, 1]. `key` is not used.

        Returns:
            (loss, (variables, metrics)); metrics are scalars over the batch, psnr in dB of the
            clipped images, perplexity and usage (share of codes) of the batch's codes.
        """
        x_BHWC = batch["image"]
        if x_BHWC.dtype == jnp.uint8:
            x_BHWC = pixels.to_float(x_BHWC)
        if self.patches:
            params = patches.hold(params)
        model = vq.merge(self.config, params, variables["stats"])
        z_BhwE = model.image_latents(x_BHWC, train=True)
        codes_Bhw = jax.lax.stop_gradient(model.quantize.nearest(z_BhwE))
        q_BhwE = model.quantize.lookup(codes_Bhw)
        y_BHWC = model.image_pixels(quantize.straight_through(z_BhwE, q_BhwE), train=True)
        commitment, codebook = quantize.losses(z_BhwE, q_BhwE)
        l2 = jnp.square(y_BHWC - x_BHWC).mean()
        l1 = jnp.abs(y_BHWC - x_BHWC).mean()
        loss = self.l2_weight * l2 + self.l1_weight * l1
        loss += self.commitment_weight * commitment
        if not self.average_codes:
            loss += self.codebook_weight * codebook

        variables, hits_K = self.remember(variables, z_BhwE, codes_Bhw)
        variables |= {"stats": vq.split(model)[1]}
        variables = jax.lax.stop_gradient(variables)
        metrics = {
            "l2": l2,
            "l1": l1,
            "commitment": commitment,
            "psnr": psnr(x_BHWC, y_BHWC),
            "usage": (hits_K > 0).mean(),
            "perplexity": perplexity(hits_K),
            "usage_recent": (variables["hits_K"] >= RARE * variables["hits_K"].mean()).mean(),
            "perplexity_recent": perplexity(variables["hits_K"]),
        }
        return loss, (variables, metrics)

    def after_update(
        self, params: vq.Arrays, variables: dict, step: jax.Array, key: jax.Array
    ) -> tuple[vq.Arrays, dict]:
        """Places or restarts codes. `step` counts updates from 0; this is after update `step`."""
        name = "quantize.embedding"
        hits_K, codebook_KE = variables["hits_K"], params[name]
        done = step + 1
        placed = done > self.codebook_init_step
        sums_KE = variables["sums_KE"]
        if self.average_codes:
            mean_KE = sums_KE / jnp.maximum(hits_K, 1e-6)[:, None]
            codebook_KE = jnp.where(placed, mean_KE, codebook_KE)
        what = jnp.where(done == self.codebook_init_step, 1, 0)
        restart = placed & (done < self.restart_until) & (done % self.restart_every == 0)
        branches = (
            lambda: (codebook_KE, jnp.zeros(len(hits_K), bool)),
            lambda: (self.sample(variables, key), jnp.ones(len(hits_K), bool)),
            lambda: self.restart(variables, codebook_KE, key),
        )
        codebook_KE, moved_K = jax.lax.switch(jnp.where(restart, 2, what), branches)
        hits_K = jnp.where(moved_K, hits_K.sum() / len(hits_K), hits_K)
        sums_KE = jnp.where(moved_K[:, None], codebook_KE * hits_K[:, None], sums_KE)
        return params | {name: codebook_KE}, variables | {"hits_K": hits_K, "sums_KE": sums_KE}

    def restart(
        self, variables: dict, codebook_KE: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(codebook, which codes moved): the least missed to where the error is.

        Without a code its vectors go to the next one, so hits times the squared distance between
        the two is about what the sum of squared errors would grow by.
        """
        row_key, error_key = jax.random.split(key)
        count = max(1, int(len(codebook_KE) * self.restart_share))
        lost_K = variables["hits_K"] * quantize.distance_to_others(codebook_KE)
        out_k = jax.lax.top_k(-lost_K, count)[1]
        filled = jnp.clip(variables["seen"], 1, self.buffer_rows)
        rows_N = jax.random.randint(row_key, (RESTART_ROWS,), 0, filled)
        z_NE = variables["buffer_RE"][rows_N]
        error_N = jnp.square(z_NE - codebook_KE[quantize.nearest_code(z_NE, codebook_KE)]).sum(-1)
        # The largest log-weights plus Gumbel noise: a sample without replacement, by weight.
        noise_N = jax.random.gumbel(error_key, error_N.shape)
        in_k = jax.lax.top_k(jnp.log(error_N + 1e-12) + noise_N, count)[1]
        moved_K = jnp.zeros(len(codebook_KE), bool).at[out_k].set(True)
        return codebook_KE.at[out_k].set(z_NE[in_k]), moved_K

    def remember(
        self, variables: dict, z_BhwE: jax.Array, codes_Bhw: jax.Array
    ) -> tuple[dict, jax.Array]:
        """Writes a batch's vectors into the ring and its code counts and sums into the averages.

        Returns the variables and the batch's counts hits_K.
        """
        z_NE = z_BhwE.reshape(-1, z_BhwE.shape[-1]).astype(jnp.float32)
        codes_N = codes_Bhw.reshape(-1)
        hits_K = jnp.zeros(self.config.codebook_size).at[codes_N].add(1.0)
        sums_KE = jnp.zeros_like(variables["sums_KE"]).at[codes_N].add(z_NE)
        # A code starts from its uniform share, or none would ever be found below a part of it.
        share, keep = hits_K.sum() / len(hits_K), self.hits_decay
        old_K = jnp.where(variables["hits_K"] < 0, share, variables["hits_K"])
        z_NE = z_NE[: self.buffer_rows]
        rows_N = (variables["seen"] + jnp.arange(len(z_NE))) % self.buffer_rows
        return variables | {
            "buffer_RE": variables["buffer_RE"].at[rows_N].set(z_NE),
            # Kept small: beyond two rounds only the place in the ring matters.
            "seen": jnp.where(
                variables["seen"] < self.buffer_rows,
                variables["seen"] + len(z_NE),
                self.buffer_rows + (variables["seen"] + len(z_NE)) % self.buffer_rows,
            ),
            "hits_K": keep * old_K + (1 - keep) * hits_K,
            "sums_KE": keep * variables["sums_KE"] + (1 - keep) * sums_KE,
        }, hits_K

    def sample(self, variables: dict, key: jax.Array) -> jax.Array:
        """codes_KE: K vectors from the filled part of the buffer, with a little noise."""
        row_key, noise_key = jax.random.split(key)
        filled = jnp.clip(variables["seen"], 1, self.buffer_rows)
        shape = (self.config.codebook_size, self.config.code_dim)
        # Evenly spaced rows from a random start: no row twice while there are enough of them.
        spread_K = jnp.arange(shape[0]) * jnp.maximum(filled / shape[0], 1.0)
        start = jax.random.uniform(row_key, maxval=filled)
        rows_K = (spread_K + start).astype(jnp.int32) % filled
        codes_KE = variables["buffer_RE"][rows_K]
        return codes_KE + JITTER * codes_KE.std(0) * jax.random.normal(noise_key, shape)


def psnr(x_BHWC: jax.Array, y_BHWC: jax.Array) -> jax.Array:
    """Mean over images of the peak signal-to-noise ratio in dB; pixels in [-1, 1], `y` clipped."""
    error_BHWC = (jnp.clip(y_BHWC, -1, 1) - x_BHWC) / 2
    return -10 * jnp.log10(jnp.square(error_BHWC).mean((1, 2, 3)) + 1e-10).mean()


def perplexity(hits_K: jax.Array) -> jax.Array:
    """exp of the entropy: how many codes, equally used, would be as spread out as these."""
    share_K = hits_K / jnp.maximum(hits_K.sum(), 1e-9)
    return jnp.exp(-(share_K * jnp.log(share_K + 1e-12)).sum())
