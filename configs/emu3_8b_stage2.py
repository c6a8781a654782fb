"""Emu3-8B, stage 2: video added, context 131,072, from stage 1's weights.

    python -m emu3_jax.launch --config=configs/emu3_8b_stage2.py

Hardware: 128 v5p chips (context 16 x FSDP 8) or more. Data: stores/text, stores/images and
stores/videos. Time and expected result: not run yet. What is the paper's and what is ours:
configs/emu3_8b_stage1.py.
"""

from configs.emu3_8b_stage1 import decoder
from data_pipelines.documents import Layout
from data_pipelines.mixture import Component, Mixture
from emu3_jax.divergence import Guard
from emu3_jax.mesh import Mesh
from emu3_jax.optim import AdamW
from emu3_jax.train import Train


def get_config() -> Train:
    """8 rows a step, 50,000 steps: 52B tokens."""
    return Train(
        task=decoder("8b", context="ring"),
        data=Mixture(
            components=(
                Component("stores/text", Layout("text"), weight=0.2),
                Component("stores/images", Layout("caption_first", caption_dropout=0.1), 0.3),
                Component(
                    "stores/videos",
                    Layout("caption_either", caption_dropout=0.1, last_share=0.2),
                    weight=0.5,
                ),
            ),
            length=131_072,
        ),
        initial="runs/emu3_8b_stage1",
        run_dir="runs/emu3_8b_stage2",
        batch=8,
        steps=50_000,
        optimizer=AdamW(rate=5e-5, warmup=700),
        mesh=Mesh(fsdp=-1, context=16),
        log_every=10,
        save_every=500,
        keep_every=5_000,
        guard=Guard(sigma=6.0),
    )
