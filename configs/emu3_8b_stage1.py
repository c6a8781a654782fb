"""Emu3-8B, stage 1: text and images, context 5,120, from random weights.

    python -m emu3_jax.launch --config=configs/emu3_8b_stage1.py

Hardware: 64 v5p chips or more (`python -m emu3_jax.launch --config=configs/compile_8b.py` tells
what a TPU slice needs). Data: stores/text and stores/images. Time and expected result: not run yet.

From the paper (arXiv 2409.18869, sections 2.3 and 2.4): the 8B's shape, context 5,120 then
131,072, text and images then video too, rate 5e-5 with cosine to 0, vision targets weighed 0.5,
dropout 0.1, stage 2 from stage 1's weights. AdamW's other numbers are those of Emu3's released
fine-tuning script (see optim.py).

Chosen here, because nothing is published:
    rows a step    128 of 5,120 and 8 of 131,072 (0.66M and 1.05M tokens: what MaxText is compared
                   at); Emu3.5 (arXiv 2510.26583) took 448 rows of 32,768
    steps          1.5M and 50k of them: 1T tokens, 52B tokens; Emu3.5 took 10T
    warm-up        700 steps, as Emu3.5
    mixture        text .2, image after caption .6, caption after image .2 of the tokens in stage 1;
                   in stage 2 text .2, images .3, video .5. Emu3.5's second stage: text .18,
                   image-text .16, video-text .08, the rest interleaved
    null prompt    10% of captions left out, for classifier-free guidance
    z-loss         1e-4 (PaLM): the only guard on the logits besides dropout
    guard          an update whose loss or gradient norm lies 6 standard deviations above those of
                   the last 128 steps is left out (emu3_jax/divergence.py)
    1B, 300M       the 8B's rules (heads of 128, 4 to a kv head, ffn 3.5 times the width); the names
                   count weights without embedding and head: 1.09e9 and 0.33e9
"""

from data_pipelines.documents import Layout
from data_pipelines.mixture import Component, Mixture
from emu3_jax.divergence import Guard
from emu3_jax.mesh import Mesh
from emu3_jax.optim import AdamW
from emu3_jax.train import Train
from emu3_jax.transformer import Transformer

SHAPES = {
    "8b": dict(layers=32, width=4096, heads=32, kv_heads=8, ffn=14336),
    "1b": dict(layers=20, width=2048, heads=16, kv_heads=4, ffn=7168),
    "300m": dict(layers=24, width=1024, heads=8, kv_heads=2, ffn=3584),
}


def decoder(size: str, **fields) -> Transformer:
    """The model of a size, for Emu3's vocabulary: 184,832 with padding, 38 tiles of 4,864."""
    vocab = dict(vocab_multiple=512, loss_tile=4864, z_loss=1e-4)
    return Transformer(**SHAPES[size], **vocab, remat="auto", **fields)


def stage1(size: str, batch: int, steps: int) -> Train:
    """Text and images in rows of 5,120."""
    return Train(
        task=decoder(size),
        data=Mixture(
            components=(
                Component("stores/text", Layout("text"), weight=0.2),
                Component(
                    "stores/images",
                    Layout("caption_either", caption_dropout=0.1, last_share=0.25),
                    weight=0.8,
                ),
            ),
            length=5120,
        ),
        run_dir=f"runs/emu3_{size}_stage1",
        batch=batch,
        steps=steps,
        optimizer=AdamW(rate=5e-5, warmup=700),
        mesh=Mesh(fsdp=-1),
        log_every=10,
        save_every=1000,
        keep_every=50_000,
        guard=Guard(sigma=6.0),
    )


def get_config() -> Train:
    """128 rows a step, 1.5M steps: 1T tokens."""
    return stage1("8b", batch=128, steps=1_500_000)
