"""Updates that are left out because their loss or gradient is not finite or far too large.

W steps that are looked back on
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

FLAT = 1e-3  # of the mean: the least standard deviation that is believed


@dataclasses.dataclass
class Guard:
    """What is left out, and how much of it is too much.

    A step whose loss or gradient norm is NaN or infinite leaves weights, variables, moments and
    averages as they were. So does, with a `sigma` (6, say; 0 is off), one whose loss or gradient
    norm lies more than sigma standard deviations above the mean of the accepted ones among the last
    `window` steps, as soon as these are a quarter of the window. The next step takes the next rows.

    More than `skips` such steps in the window are too many: the run goes back to an earlier
    checkpoint and on behind the rows at fault. After `rewinds` times it gives up.
    """

    sigma: float = 0.0
    window: int = 128
    skips: int = 10
    rewinds: int = 2

    def exceeded(self, values: dict) -> bool:
        """Whether the metrics of a step tell of too many steps left out."""
        return values["skipped_recently"] > self.skips


FINITE = Guard()  # only what is not finite is left out


def init(guard: Guard) -> dict:
    """What is remembered of the last steps, before the first one. It goes with the state.

    Raises ValueError for a window in which there are never too many steps left out.
    """
    if not 0 <= guard.skips < guard.window:
        raise ValueError(
            f"guard.skips = {guard.skips} of the last guard.window = {guard.window} steps are "
            "never exceeded; take fewer, 0 or more, or a longer window"
        )
    W = guard.window
    return dict(losses_W=jnp.zeros(W), norms_W=jnp.zeros(W), accepted_W=jnp.zeros(W, bool),
                skipped_W=jnp.zeros(W, bool), skipped=jnp.zeros((), jnp.int32))  # fmt: skip


def judge(guard: Guard, seen: dict, loss, norm, step) -> tuple[jax.Array, dict]:
    """(whether the update is made, what is then remembered) of a step's loss and gradient norm."""
    loss, norm = (jnp.asarray(x, jnp.float32) for x in (loss, norm))
    ok = jnp.isfinite(loss) & jnp.isfinite(norm)
    if guard.sigma:
        accepted_W = seen["accepted_W"]
        ok &= ~_spikes(guard, loss, seen["losses_W"], accepted_W)
        ok &= ~_spikes(guard, norm, seen["norms_W"], accepted_W)
    here_W = jnp.arange(guard.window) == step % guard.window
    new = dict(losses_W=jnp.where(ok, loss, 0), norms_W=jnp.where(ok, norm, 0), accepted_W=ok,
               skipped_W=~ok)  # fmt: skip
    after = {name: jnp.where(here_W, value, seen[name]) for name, value in new.items()}
    return ok, after | dict(skipped=seen["skipped"] + ~ok)


def _spikes(guard: Guard, x, seen_W, accepted_W) -> jax.Array:
    count = accepted_W.sum()
    mean = jnp.where(accepted_W, seen_W, 0).sum() / jnp.maximum(count, 1)
    square = jnp.where(accepted_W, jnp.square(seen_W - mean), 0).sum() / jnp.maximum(count, 1)
    spread = jnp.maximum(jnp.sqrt(square), FLAT * jnp.abs(mean))
    return (4 * count >= guard.window) & (x > mean + guard.sigma * spread)


def figures(seen: dict) -> dict:
    """Metrics: how many steps were left out, in all and among the last `window`."""
    return dict(skipped=seen["skipped"], skipped_recently=seen["skipped_W"].sum())


def fresh(state: dict, skipped: int) -> dict:
    """A training state, restored to go on behind the rows at fault: none left out recently.

    `skipped` is the number of steps left out in all, those since its checkpoint included; what was
    accepted up to there still says what is far too large.
    """
    seen = state["guard"]
    none_W = np.zeros(seen["skipped_W"].shape, bool)
    new = dict(skipped_W=none_W, skipped=np.array(skipped, np.int32))
    put = {name: jax.device_put(value, seen[name].sharding) for name, value in new.items()}
    return state | dict(guard=seen | put)
