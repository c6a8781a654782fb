"""AdamW with warm-up and cosine decay."""

import dataclasses

import optax


@dataclasses.dataclass
class AdamW:
    """Emu3's published facts are the rate (5e-5) and the cosine to 0; the rest follows its released
    fine-tuning script (betas 0.9 and 0.95, eps 1e-6, decay 0.1, clip 5).

    `rate` is the peak, reached after `warmup` steps; `final` the fraction of it left at the end;
    `clip` bounds the global gradient norm.
    """

    rate: float = 5e-5
    warmup: int = 100
    final: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-6
    weight_decay: float = 0.1
    clip: float = 5.0

    def schedule(self, steps: int) -> optax.Schedule:
        """The learning rate at each of `steps` steps."""
        warmup = min(self.warmup, steps - 1)
        return optax.warmup_cosine_decay_schedule(
            0.0, self.rate, warmup, steps, self.rate * self.final
        )

    def make(self, steps: int, decays) -> optax.GradientTransformation:
        """The optimizer; `decays` is a tree of bools, True where weight decay applies."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(self.schedule(steps), self.b1, self.b2, self.eps,
                        weight_decay=self.weight_decay, mask=decays),
        )
