"""A tokenizer of 32,768 codes from scratch on a laptop: do they stay alive, and what does a GAN do?

    python -m emu3_jax.launch --config=configs/tokenizer_small.py:photos    photographs, in tiles
    python -m emu3_jax.launch --config=configs/tokenizer_small.py           trains on them
    ...tokenizer_small.py:gan         goes on from there, with clips, LPIPS and a discriminator
    ...tokenizer_small.py:control     goes on just so, without LPIPS and discriminator
    ...tokenizer_small.py:evaluate    measures it on what it never saw; the others likewise with
                                      --config.tokenizer=RUN --config.directory=RUN/evaluation

Hardware: any CPU. Time and expected result: see README. Emu3's layers at 64 pixels, 8x8 of them a
code, 32 channels where Emu3 has 256. The codebook is placed on recent encoder outputs again and
again: left to the gradient, codes fall behind an encoder that learns quickly.
"""

from data_pipelines.clip_rows import ClipRows, MixedRows
from data_pipelines.image_folder import ImageRows
from data_pipelines.photos import Photos
from data_pipelines.sources import Images, Videos
from emu3_jax.optim import AdamW
from emu3_jax.train import Train
from tokenizer import losses
from tokenizer.evaluate import Evaluate
from tokenizer.train import TokenizerTask
from tokenizer.vq import VQConfig

PHOTOS, RUN = "runs/photos", "runs/tokenizer_small"
CONFIG = VQConfig(width=32, multipliers=(1, 2, 2, 4), res_blocks=1)
IMAGES = ImageRows(PHOTOS, "train.jsonl", augment_flip=True)


def train() -> Train:
    """1,600 steps of 8 images, 0.8M codes; the last step places the codebook once more."""
    return Train(
        task=TokenizerTask(
            CONFIG, buffer_rows=131072, codebook_init_step=20, place_every=100
        ),
        data=IMAGES,
        run_dir=RUN,
        steps=1600,
        batch=8,
        optimizer=AdamW(rate=1.5e-3, warmup=30, b1=0.5, b2=0.99, weight_decay=0.0, clip=1.0),
    )


def after(name: str, **terms) -> Train:
    """300 steps of 4 images and 4 clips from the trained tokenizer, whose codes stay."""
    return Train(
        task=TokenizerTask(CONFIG, codebook_init_step=-1, **terms),
        data=MixedRows(
            IMAGES, ClipRows(PHOTOS, "videos_train.jsonl", size=64, augment_flip=True)
        ),
        initial=RUN,
        run_dir=f"{RUN}_{name}",
        steps=300,
        batch=4,
        optimizer=AdamW(rate=2e-4, warmup=30, b1=0.5, b2=0.9, weight_decay=0.0, clip=1.0),
    )  # fmt: skip


def evaluate() -> Evaluate:
    """On the tiles and the film that training never saw; 8 tokens a code."""
    return Evaluate(
        tokenizer=RUN, directory=f"{RUN}/evaluation", sizes=(64,), batch=32,
        figures=("lpips_alex",), frames=32, fps=0.0,
        images=Images(PHOTOS, "heldout.jsonl"), videos=Videos(PHOTOS, "videos_heldout.jsonl"),
    )  # fmt: skip


def get_config(stage: str = "train"):
    """One of the stages above; ValueError names them."""
    stages = dict(
        photos=lambda: Photos(PHOTOS),
        train=train,
        gan=lambda: after(
            "gan",
            perceptual=losses.Perceptual(weight=0.1, network="alex"),
            adversarial=losses.Adversarial(weight=0.1, start=50, width=32),
        ),
        control=lambda: after("control"),
        evaluate=evaluate,
    )
    if stage not in stages:
        raise ValueError(f"no stage {stage!r}; take one of {', '.join(stages)}")
    return stages[stage]()
