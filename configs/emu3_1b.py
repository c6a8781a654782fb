"""Emu3 with 1.09e9 weights besides embedding and head: stage 1 for one GPU or a small slice.

    python -m emu3_jax.launch --config=configs/emu3_1b.py

Hardware: one H100 or H200, or 8 TPU chips. Data: stores/text and stores/images. Time and expected
result: not run yet.
"""

from configs.emu3_8b_stage1 import stage1
from emu3_jax.train import Train


def get_config() -> Train:
    """8 rows a step, 500,000 steps: 20B tokens."""
    return stage1("1b", batch=8, steps=500_000)
