"""Training the tokenizer on images and clips: the task that the one trainer runs.

Left where they start, most codes never meet a vector and never move. So the codebook is placed on
encoder outputs early on, and codes that nobody uses are moved there again. Both only set
parameters: the result is a plain Emu3 tokenizer. So it is with a discriminator, whose weights go by
names of their own beside the tokenizer's.

Legend: B batch (of rows where frames F follow, else of frames), F frames of a row, T frames of a
clip, H height, W width, C colours, h w the latent grid, t its length in time, E code dim, K codes,
N vectors of a batch (clips of it where t h w follow), R rows of the buffer of recent vectors.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from emu3_jax import checkpoint
from emu3_jax import config as config_lib
from emu3_jax.update import Task
from tokenizer import convert, losses, lpips, patches, quantize, rows, vq

JITTER = 0.02  # of the buffer's standard deviation: keeps codes apart that start on one vector
RESTART_ROWS = 4096  # recent vectors of which some become codes
RARE = 0.1  # of the uniform share of hits: a code with fewer does not count as used
RIVAL = "discriminator."  # starts the names of the discriminator's weights
LAST = "decoder.conv_out.kernel"


@dataclasses.dataclass
class TokenizerTask(Task):
    """Reconstruct images and clips through the codes.

    `variables` holds `stats` (batch norm), `buffer_RE` (recent encoder outputs, a ring), `seen`
    (how many went in), `hits_K` (how often a code is used per step, a moving average), `sums_KE`
    (of the vectors of each code, likewise), `updates` (their number) and, where they are on,
    `perceptual` (the weights of LPIPS, which are arguments so that XLA folds no constants) and
    `logits` (moving averages of what the discriminator says).

    The defaults of the weights are SBER-MoVQGAN's, from which Emu3's tokenizer starts, but for
    `perceptual` and `adversarial`, which are off (0.1 both, see configs/tokenizer_emu3.py).

    Codes that are placed anew are recent vectors, drawn alike from all of them: so each is used
    about as often as any other, and none falls behind an encoder that learns quickly. At a restart
    the share `restart_share` of the codes moves: those that would be missed least (few hits, or
    another code close by) to recent vectors, the likelier the farther from any code.
    `patches` makes each code a function of its own patch alone (see patches.py).
    """

    config: vq.VQConfig
    l2_weight: float = 1.0
    l1_weight: float = 0.0
    commitment_weight: float = 1.0
    codebook_weight: float = 0.25
    entropy_weight: float = 0.0  # see losses.entropy
    entropy_temperature: float = 0.01
    perceptual: losses.Perceptual = dataclasses.field(default_factory=losses.Perceptual)
    adversarial: losses.Adversarial = dataclasses.field(default_factory=losses.Adversarial)
    buffer_rows: int = 32768
    codebook_init_step: int = 16  # the codebook is placed after this many updates; -1: never
    place_every: int = 0  # updates after which it is placed anew, to the end of training; 0: never
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
        variables = self.variables(stats)
        if self.perceptual.weight:
            weights = lpips.load(self.perceptual.network, self.perceptual.path)
            variables["perceptual"] = jax.tree.map(jnp.asarray, weights)
        if self.adversarial.weight:
            rival, variables["logits"] = self.adversarial.init(jax.random.fold_in(key, 2))
            params |= {RIVAL + name: value for name, value in rival.items()}
        return params, variables

    def variables(self, stats: vq.Arrays) -> dict:
        """Fresh variables of a tokenizer alone around given batch statistics."""
        return {
            "stats": stats,
            "buffer_RE": jnp.zeros((self.buffer_rows, self.config.code_dim)),
            "seen": jnp.zeros((), jnp.int32),
            # Negative: no hits yet. The first batch says what a uniform share is.
            "hits_K": jnp.full(self.config.codebook_size, -1.0),
            "sums_KE": jnp.zeros((self.config.codebook_size, self.config.code_dim)),
            "updates": jnp.zeros((), jnp.int32),
        }

    def initial(self, path: str, params: vq.Arrays, variables: dict) -> tuple[vq.Arrays, dict]:
        """The given state with the tokenizer in `path` instead of the random one.

        `path` is a published tokenizer or a run, whatever it was trained by; a discriminator of
        the same sizes comes along. Raises ValueError for a tokenizer of another configuration, and
        if codes would be placed anew.
        """
        if self.codebook_init_step >= 0:
            raise ValueError(
                f"initial={path} with codebook_init_step {self.codebook_init_step}: its codes "
                "would be replaced; set --config.task.codebook_init_step=-1"
            )
        tokenizer = convert.load(path)
        found, wanted = config_lib.to_json(tokenizer.config), config_lib.to_json(self.config)
        if changes := config_lib.differences(found, wanted):
            raise ValueError(f"initial={path} has {changes[0]}; make task.config fit it")
        own, stats = jax.tree.map(np.asarray, vq.split(tokenizer))
        if (pathlib.Path(path) / "checkpoints").is_dir():
            _, found, _, _ = checkpoint.restore_model(path)
            old, new = ({name: value for name, value in tree.items() if name.startswith(RIVAL)}
                        for tree in (found, params))  # fmt: skip
            if jax.tree.map(np.shape, old) == jax.tree.map(np.shape, new):
                own |= old
        return params | own, variables | {"stats": stats}

    def groups(self) -> vq.Arrays | None:
        """The tokenizer's gradients are clipped by their norm, the discriminator's by theirs."""
        if not self.adversarial.weight:
            return None
        rival = [RIVAL + name for name in self.adversarial.names()]
        return dict.fromkeys(vq.shapes(self.config)[0], "") | dict.fromkeys(rival, RIVAL)

    def loss(self, params: vq.Arrays, variables: dict, batch: dict, key: jax.Array):
        """The tokenizer's loss and the discriminator's, if there is one, in one sum.

        Args: batch: {"image": x_BHWC, "clip": x_BTHWC} or either; uint8, or floats in [-1, 1].
        Of pixels, LPIPS and the discriminator the loss is a mean over all frames, of which an
        image is one; of the quantizer, over all vectors. `key` is not used.

        Returns:
            (loss, (variables, metrics)); metrics are scalars over the batch: every term without
            its weight, psnr in dB of the clipped frames, perplexity and usage (share of codes) of
            the batch's codes and, as `*_recent`, over a window of about 1 / (1 - hits_decay) steps.
        """
        x_BFHWC, image = rows.frames(batch)
        own = {name: value for name, value in params.items() if not name.startswith(RIVAL)}
        if self.patches:
            own = patches.hold(own)

        def forward(kernel):
            model = vq.merge(self.config, own | {LAST: kernel}, variables["stats"])
            y_BFHWC, *latents = rows.reconstruct(model, x_BFHWC, image)
            return y_BFHWC.reshape(-1, *y_BFHWC.shape[2:]), (*latents, vq.split(model)[1])

        # The gradient at the last kernel alone, for the adaptive weight: no cost where not used.
        y_BHWC, last_layer, (z_NthwE, q_NthwE, codes_Nthw, later_NthwE, stats) = jax.vjp(
            forward, own[LAST], has_aux=True
        )
        x_BHWC = x_BFHWC.reshape(y_BHWC.shape)
        likeness = functools.partial(self.likeness, variables, x_BHWC)
        loss, metrics = likeness(y_BHWC)
        quantizer, more = self.quantizer_loss(own["quantize.embedding"], z_NthwE, q_NthwE)
        loss, metrics = loss + quantizer, metrics | more
        # Codes that are placed to stay: where vectors are once batch norm takes no batch's part.
        kept_NthwE = later_NthwE if self.place_every else z_NthwE
        variables, hits_K = self.remember(variables, z_NthwE, codes_Nthw, kept_NthwE)
        variables |= {"stats": stats}
        if self.adversarial.weight:
            balance = functools.partial(
                losses.adaptive_weight, y_BHWC, last_layer, lambda y_BHWC: likeness(y_BHWC)[0]
            )
            rival = {n.removeprefix(RIVAL): v for n, v in params.items() if n.startswith(RIVAL)}
            both, logits, more = self.adversarial.loss(
                rival, variables["logits"], x_BHWC, y_BHWC, balance, variables["updates"]
            )
            loss, metrics = loss + both, metrics | more
            variables |= {"logits": logits}
        variables = jax.lax.stop_gradient(variables)
        metrics["psnr"] = psnr(x_BHWC, y_BHWC)
        metrics |= codebook_use(hits_K, variables["hits_K"])
        return loss, (variables, metrics)

    def likeness(
        self, variables: dict, x_BHWC: jax.Array, y_BHWC: jax.Array
    ) -> tuple[jax.Array, dict]:
        """(loss, terms): how far reconstructions `y` are from `x`, in pixels and for LPIPS."""
        l2 = jnp.square(y_BHWC - x_BHWC).mean()
        l1 = jnp.abs(y_BHWC - x_BHWC).mean()
        loss, terms = self.l2_weight * l2 + self.l1_weight * l1, {"l2": l2, "l1": l1}
        if self.perceptual.weight:
            network, weights = self.perceptual.network, variables["perceptual"]
            terms["perceptual"] = lpips.distance(network, weights, x_BHWC, y_BHWC).mean()
            loss += self.perceptual.weight * terms["perceptual"]
        return loss, terms

    def quantizer_loss(
        self, codebook_KE: jax.Array, z_NthwE: jax.Array, q_NthwE: jax.Array
    ) -> tuple[jax.Array, dict]:
        """(loss, terms): what ties vectors and codes together."""
        commitment, codebook = quantize.losses(z_NthwE, q_NthwE)
        loss, terms = self.commitment_weight * commitment, {"commitment": commitment}
        if not self.average_codes:
            loss += self.codebook_weight * codebook
        if self.entropy_weight:
            z_BPE = z_NthwE.reshape(len(z_NthwE), -1, z_NthwE.shape[-1])
            terms["entropy"] = losses.entropy(z_BPE, codebook_KE, self.entropy_temperature)
            loss += self.entropy_weight * terms["entropy"]
        return loss, terms

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
        places = done == self.codebook_init_step
        if self.place_every:
            places |= placed & (done % self.place_every == 0)
        restart = placed & (done < self.restart_until) & (done % self.restart_every == 0)
        branches = (
            lambda: (codebook_KE, jnp.zeros(len(hits_K), bool)),
            lambda: (self.sample(variables, key), jnp.ones(len(hits_K), bool)),
            lambda: self.restart(variables, codebook_KE, key),
        )
        codebook_KE, moved_K = jax.lax.switch(jnp.where(places, 1, 2 * restart), branches)
        hits_K = jnp.where(moved_K, hits_K.sum() / len(hits_K), hits_K)
        sums_KE = jnp.where(moved_K[:, None], codebook_KE * hits_K[:, None], sums_KE)
        variables = variables | {"hits_K": hits_K, "sums_KE": sums_KE, "updates": done}
        return params | {name: codebook_KE}, variables

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
        self, variables: dict, z_BhwE: jax.Array, codes_Bhw: jax.Array, kept_BhwE: jax.Array
    ) -> tuple[dict, jax.Array]:
        """Writes `kept` into the ring, and code counts and the sums of vectors into the averages.

        Returns the variables and the batch's counts hits_K.
        """
        z_NE, kept_NE = (
            x_BhwE.reshape(-1, x_BhwE.shape[-1]).astype(jnp.float32)
            for x_BhwE in (z_BhwE, kept_BhwE)
        )
        codes_N = codes_Bhw.reshape(-1)
        hits_K = jnp.zeros(self.config.codebook_size).at[codes_N].add(1.0)
        sums_KE = jnp.zeros_like(variables["sums_KE"]).at[codes_N].add(z_NE)
        # A code starts from its uniform share, or none would ever be found below a part of it.
        share, keep = hits_K.sum() / len(hits_K), self.hits_decay
        old_K = jnp.where(variables["hits_K"] < 0, share, variables["hits_K"])
        kept_NE = kept_NE[: self.buffer_rows]
        rows_N = (variables["seen"] + jnp.arange(len(kept_NE))) % self.buffer_rows
        return variables | {
            "buffer_RE": variables["buffer_RE"].at[rows_N].set(kept_NE),
            # Kept small: beyond two rounds only the place in the ring matters.
            "seen": jnp.where(
                variables["seen"] < self.buffer_rows,
                variables["seen"] + len(kept_NE),
                self.buffer_rows + (variables["seen"] + len(kept_NE)) % self.buffer_rows,
            ),
            "hits_K": keep * old_K + (1 - keep) * hits_K,
            "sums_KE": keep * variables["sums_KE"] + (1 - keep) * sums_KE,
        }, hits_K

    def sample(self, variables: dict, key: jax.Array) -> jax.Array:
        """codes_KE: K vectors from the filled part of the buffer, with a little noise.

        With `place_every` each is then the mean of those vectors in the buffer to which it is the
        nearest code (a round of k-means): what was drawn close together moves apart.
        """
        row_key, noise_key = jax.random.split(key)
        filled = jnp.clip(variables["seen"], 1, self.buffer_rows)
        shape = (self.config.codebook_size, self.config.code_dim)
        # Evenly spaced rows from a random start: no row twice while there are enough of them.
        spread_K = jnp.arange(shape[0]) * jnp.maximum(filled / shape[0], 1.0)
        start = jax.random.uniform(row_key, maxval=filled)
        rows_K = (spread_K + start).astype(jnp.int32) % filled
        codes_KE = variables["buffer_RE"][rows_K]
        codes_KE += JITTER * codes_KE.std(0) * jax.random.normal(noise_key, shape)
        if not self.place_every:
            return codes_KE
        used_R = (jnp.arange(self.buffer_rows) < filled).astype(jnp.float32)
        return quantize.means(variables["buffer_RE"], used_R, codes_KE)


def psnr(x_BHWC: jax.Array, y_BHWC: jax.Array) -> jax.Array:
    """Mean over images of the peak signal-to-noise ratio in dB; pixels in [-1, 1], `y` clipped."""
    error_BHWC = (jnp.clip(y_BHWC, -1, 1) - x_BHWC) / 2
    return -10 * jnp.log10(jnp.square(error_BHWC).mean((1, 2, 3)) + 1e-10).mean()


def codebook_use(hits_K: jax.Array, recent_K: jax.Array) -> dict:
    """Metrics of a batch's counts of codes and of their moving average."""
    return {
        "usage": (hits_K > 0).mean(),
        "perplexity": perplexity(hits_K),
        "usage_recent": (recent_K >= RARE * recent_K.mean()).mean(),
        "perplexity_recent": perplexity(recent_K),
    }


def perplexity(hits_K: jax.Array) -> jax.Array:
    """exp of the entropy: how many codes, equally used, would be as spread out as these."""
    share_K = hits_K / jnp.maximum(hits_K.sum(), 1e-9)
    return jnp.exp(-(share_K * jnp.log(share_K + 1e-12)).sum())
