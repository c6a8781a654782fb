"""What reconstructions are judged by besides their pixels: a perceptual distance and an opponent.

Tokenizer and discriminator learn in one step, from one gradient of one sum. What the tokenizer
minimises sees the discriminator's weights as constants; what the discriminator minimises sees the
reconstruction as one. So each gets its own gradient only, and there is nothing to take turns at.

Legend: B batch of frames, H height, W width, C colours; h w a grid of patches or codes; P places of
a clip, E code dim, K codes.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from tokenizer import discriminator, vq

AVERAGE = 0.999  # of the mean logits that LeCam goes by
MOST = 1e4  # an adaptive weight is at most this

Judge = Callable[[jax.Array], jax.Array]  # y_BHWC -> what a reconstruction loses


@dataclasses.dataclass
class Perceptual:
    """LPIPS (arXiv 1801.03924) between pictures and reconstructions; off with weight 0.

    SBER-MoVQGAN, from which Emu3's tokenizer starts, weighs it 0.1. `network` is "vgg", as in all
    published recipes, or "alex", many times cheaper; `path` is a file of its weights, if not the
    packaged ones.
    """

    weight: float = 0.0
    network: str = "vgg"
    path: str = ""


@dataclasses.dataclass
class Adversarial:
    """A discriminator and what it is for; off with weight 0.

    SBER-MoVQGAN's is `weight` 0.1, constant and from the first update on, with 2 layers;
    taming-transformers' is 0.8, adaptive, with 3 layers. For the first `start` updates the
    discriminator neither learns nor judges. Of what peers add:

        adaptive  `weight` is times the ratio of two gradients at the decoder's last kernel, see
                  `adaptive_weight`; costs each judge once more
        lecam     weight of LeCam regularisation (arXiv 2104.03310); Open-MAGVIT2 takes 0.05
        r1        weight of the gradient penalty (arXiv 1801.04406); MAGVIT takes 10; norm "none"
    """

    weight: float = 0.0
    start: int = 0
    layers: int = 2
    width: int = 64
    norm: str = "batch"
    adaptive: bool = False
    lecam: float = 0.0
    r1: float = 0.0

    def init(self, key: jax.Array) -> tuple[vq.Arrays, dict]:
        """The discriminator's weights, and the moving averages of its mean logits.

        Raises ValueError for a discriminator that cannot be.
        """
        if self.r1 and self.norm != "none":
            raise ValueError(
                f"r1 {self.r1} with norm {self.norm!r}: a picture's own gradient is wanted, and "
                "the norm mixes pictures; take norm 'none'"
            )
        params = discriminator.init(self.layers, self.width, self.norm, key)
        return params, {"real": jnp.zeros(()), "fake": jnp.zeros(())}

    def names(self) -> list[str]:
        """Of the discriminator's weights."""
        return discriminator.names(self.layers, self.width, self.norm)

    def loss(
        self, params: vq.Arrays, averages: dict, x_BHWC: jax.Array, y_BHWC: jax.Array,
        balance: Callable[[Judge], jax.Array], updates: jax.Array,
    ) -> tuple[jax.Array, dict, dict]:  # fmt: skip
        """Returns what both minimise, the new averages, and metrics.

        `x` are pictures, `y` their reconstructions; `balance(judge)` weighs what the discriminator
        says against what else is said of `y`; `updates` is how many there have been.
        """
        # Not a branch: XLA's CPU runs convolutions within one 24 times slower.
        on = (updates >= self.start).astype(jnp.float32)
        critic = discriminator.merge(self.layers, self.width, self.norm, params)
        fixed = discriminator.merge(
            self.layers, self.width, self.norm, jax.lax.stop_gradient(params)
        )
        judge = lambda y_BHWC: -fixed(y_BHWC).mean()  # noqa: E731
        weight = self.weight * (balance(judge) if self.adaptive else 1.0)
        weight *= on
        generator = judge(y_BHWC)
        real_Bhw, fake_Bhw = critic(x_BHWC), critic(jax.lax.stop_gradient(y_BHWC))
        against = hinge(real_Bhw, fake_Bhw)
        means = {"real": real_Bhw.mean(), "fake": fake_Bhw.mean()}
        values = {
            "generator": generator,
            "discriminator": against,
            "generator_weight": weight,
            "logits_real": means["real"],
            "logits_fake": means["fake"],
        }
        loss = weight * generator + on * against
        if self.lecam:
            values["lecam"] = lecam(real_Bhw, fake_Bhw, averages)
            loss += on * self.lecam * values["lecam"]
        if self.r1:
            values["r1"] = r1(critic, x_BHWC)
            loss += on * self.r1 * values["r1"]
        averages = optax.incremental_update(means, averages, on * (1 - AVERAGE))
        return loss, averages, values


def hinge(real_Bhw: jax.Array, fake_Bhw: jax.Array) -> jax.Array:
    """What a discriminator minimises: 0 once all real logits are over 1 and all others below -1."""
    return (jax.nn.relu(1 - real_Bhw).mean() + jax.nn.relu(1 + fake_Bhw).mean()) / 2


def lecam(real_Bhw: jax.Array, fake_Bhw: jax.Array, averages: dict) -> jax.Array:
    """Squares of how far the logits of either kind pass the other kind's moving average.

    As Open-MAGVIT2 writes it; the averages start at 0.
    """
    above = jnp.square(jax.nn.relu(real_Bhw - averages["fake"])).mean()
    below = jnp.square(jax.nn.relu(averages["real"] - fake_Bhw)).mean()
    return above + below


def r1(critic: Callable, x_BHWC: jax.Array) -> jax.Array:
    """Mean over real pictures of the squared norm of the gradient of the sum of their logits."""
    gradient_BHWC = jax.grad(lambda x_BHWC: critic(x_BHWC).sum())(x_BHWC)
    return jnp.square(gradient_BHWC).sum((1, 2, 3)).mean()


def adaptive_weight(
    y_BHWC: jax.Array, last_layer: Callable, likeness: Judge, judge: Judge
) -> jax.Array:
    """VQGAN's (arXiv 2012.09841, as its code clips it): |gradient of likeness| / |that of judge|.

    Both are taken at the decoder's last kernel; `last_layer` pulls a gradient at `y` back to it.
    """
    y_BHWC = jax.lax.stop_gradient(y_BHWC)
    likeness_norm, judge_norm = (
        optax.tree.norm(last_layer(jax.grad(loss)(y_BHWC))) for loss in (likeness, judge)
    )
    return jax.lax.stop_gradient(jnp.clip(likeness_norm / (judge_norm + 1e-4), 0, MOST))


def entropy(z_BPE: jax.Array, codebook_KE: jax.Array, temperature: float) -> jax.Array:
    """Mean entropy of the choice of a code, less the entropy of the mean choice (in nats).

    Small when each vector has one code near and all codes are in use. A choice is the softmax of
    -(squared distance) / temperature; MaskGIT weighs this 0.1 at temperature 0.01. Takes one place
    of every clip at a time, so memory holds B x K choices.
    """
    codebook_KE = codebook_KE.astype(jnp.float32)

    def add(total_K, z_BE):
        cross_BK = jnp.einsum("BE,KE->BK", z_BE, codebook_KE, precision=jax.lax.Precision.HIGHEST)
        log_BK = jax.nn.log_softmax((2 * cross_BK - jnp.square(codebook_KE).sum(-1)) / temperature)
        choice_BK = jnp.exp(log_BK)
        return total_K + choice_BK.sum(0), -(choice_BK * log_BK).sum()

    z_PBE = z_BPE.astype(jnp.float32).swapaxes(0, 1)
    total_K, entropy_P = jax.lax.scan(jax.checkpoint(add), jnp.zeros(len(codebook_KE)), z_PBE)
    vectors = z_PBE.shape[0] * z_PBE.shape[1]
    mean_K = total_K / vectors
    return entropy_P.sum() / vectors + (mean_K * jnp.log(mean_K + 1e-12)).sum()
