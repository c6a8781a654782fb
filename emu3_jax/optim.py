"""AdamW with warm-up and cosine decay."""

import dataclasses

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass
class AdamW:
    """Emu3's published facts are the rate (5e-5) and the cosine to 0; the rest follows its released
    fine-tuning script (betas 0.9 and 0.95, eps 1e-6, decay 0.1, clip 5).

    `rate` is the peak, reached after `warmup` steps; `final` the fraction of it left at the end;
    `clip` bounds the global gradient norm (of each group of weights, where a task has such).
    `moments` is the type both moments are kept in between steps (they are computed in float32);
    `offload` keeps them in the host's memory.
    """

    rate: float = 5e-5
    warmup: int = 100
    final: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-6
    weight_decay: float = 0.1
    clip: float = 5.0
    moments: str = "float32"
    offload: bool = False

    def schedule(self, steps: int) -> optax.Schedule:
        """The learning rate at each of `steps` steps."""
        warmup = min(self.warmup, steps - 1)
        return optax.warmup_cosine_decay_schedule(
            0.0, self.rate, warmup, steps, self.rate * self.final
        )

    def make(self, steps: int, decays, groups=None) -> optax.GradientTransformationExtraArgs:
        """The optimizer; `decays` is a tree of bools, True where weight decay applies.

        Its arrays stay as they were in an update with the argument `ok`, where that is False.
        `groups` is a tree of names: weights of one name are clipped by the norm of their gradients.
        """
        adamw = optax.adamw(self.schedule(steps), self.b1, self.b2, self.eps,
                            weight_decay=self.weight_decay, mask=decays)  # fmt: skip
        clip = optax.clip_by_global_norm(self.clip)
        if groups is not None:
            clip = optax.partition(dict.fromkeys(jax.tree.leaves(groups), clip), groups)
        return optax.chain(clip, kept(adamw, self.moments, self.offload))


def kept(
    inner: optax.GradientTransformation, dtype: str, offload: bool
) -> optax.GradientTransformationExtraArgs:
    """`inner`, its arrays kept as `dtype`, and on the host if asked, from one update to the next.

    Scalars (counts) stay as they are. Where `ok` is False, so does everything.
    """

    def put(tree, dtype, space):
        def one(x):
            if not x.ndim:
                return x
            x = x.astype(dtype)
            return jax.device_put(x, space) if offload else x

        return jax.tree.map(one, tree)

    def init(params):
        return put(inner.init(params), dtype, jax.memory.Space.Host)

    def update(grads, state, params, *, ok=True):
        old = put(state, jnp.float32, jax.memory.Space.Device)
        updates, new = inner.update(grads, old, params)
        new = optax.tree.where(ok, new, old)  # before they leave the devices' memory
        return updates, put(new, dtype, jax.memory.Space.Host)

    return optax.GradientTransformationExtraArgs(init, update)
