"""What the processes of a run tell each other, apart from the arrays that they share."""

import jax
import numpy as np
from jax.experimental import multihost_utils

LINE = 500  # bytes


def gathered(text: str) -> list[str]:
    """What each process says, cut to LINE bytes, in their order; all are to call this at once."""
    if jax.process_count() == 1:
        return [text]
    mine = np.frombuffer(text.encode()[:LINE].ljust(LINE, b"\0"), np.uint8)
    told = multihost_utils.process_allgather(mine)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in told]
