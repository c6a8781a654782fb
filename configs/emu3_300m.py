"""Emu3 with 0.33e9 weights besides embedding and head: stage 1 for one GPU.

    python -m emu3_jax.launch --config=configs/emu3_300m.py

Hardware: one GPU of 24 GB or 4 TPU chips. Data: stores/text and stores/images. Time and expected
result: not run yet.
"""

from configs.emu3_8b_stage1 import stage1
from emu3_jax.train import Train


def get_config() -> Train:
    """8 rows a step, 200,000 steps: 8B tokens."""
    return stage1("300m", batch=8, steps=200_000)
