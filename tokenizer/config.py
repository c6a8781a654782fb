"""What a tokenizer is made of."""

import dataclasses


@dataclasses.dataclass(unsafe_hash=True)
class VQConfig:
    """The defaults are Emu3's released tokenizer (270,740,287 parameters, 8x8 pixels a code).

    Height and width shrink by 2 at every level but the last. `attention_levels` are indices of
    `multipliers`. The PyTorch implementations fix 32 norm groups, so only such a tokenizer exports.
    """

    codebook_size: int = 32768
    code_dim: int = 4
    latent_channels: int = 4
    width: int = 256
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    res_blocks: int = 2
    attention_levels: tuple[int, ...] = (3,)
    temporal_factor: int = 4
    norm_groups: int = 32

    def __post_init__(self):
        self.multipliers = tuple(self.multipliers)
        self.attention_levels = tuple(self.attention_levels)

    @property
    def spatial_factor(self) -> int:
        """Pixels per code, along height and along width."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of every level, finest first."""
        return [self.width * multiplier for multiplier in self.multipliers]

    def check(self):
        """Raises ValueError on a combination that no tokenizer can have."""
        if self.code_dim != self.latent_channels:
            raise ValueError(
                f"code_dim {self.code_dim} differs from latent_channels {self.latent_channels}; "
                "set them equal, the decoder runs both through the same layers"
            )
        for channels in [self.width, *self.widths]:
            if channels % self.norm_groups:
                raise ValueError(
                    f"{channels} channels do not split into norm_groups {self.norm_groups}; "
                    f"change width {self.width} or multipliers {self.multipliers}"
                )
        for level in self.attention_levels:
            if not 0 <= level < len(self.multipliers):
                raise ValueError(
                    f"attention_levels {self.attention_levels} names level {level}, but "
                    f"multipliers {self.multipliers} has levels 0 to {len(self.multipliers) - 1}"
                )
        if self.temporal_factor < 1 or self.temporal_factor & (self.temporal_factor - 1):
            raise ValueError(
                f"temporal_factor {self.temporal_factor} is not a power of two; use 1, 2, 4, ..."
            )
