"""Emu3's vision tokenizer, 270M weights, from scratch or on from the published ones.

    python -m emu3_jax.launch --config=configs/tokenizer_emu3.py \
        --config.data.images.directory=IMAGES --config.data.clips.directory=VIDEOS
    python -m emu3_jax.launch --config=configs/tokenizer_emu3.py:TOKENIZER ...

The second goes on from TOKENIZER, a directory of published weights (official or hf layout) or a run
of any tokenizer of this size; its codes are not placed anew.

Hardware: not run yet. A row is an image and 4 frames of a video; by count of its activations a
frame takes about 4 GB, so a device of 80 GB holds 2 or 3 rows, and 64 rows take 32 devices. Time:
not known.
Expected result: runs/tokenizer_emu3, which configs/encode.py and configs/convert.py take.

Emu3 names its losses (L2, LPIPS, GAN, commitment) but not their weights, rate or steps. These are
those of SBER-MoVQGAN, from which its weights start: Adam (0.5, 0.9) at a constant 1e-4, LPIPS (VGG)
0.1, hinge GAN 0.1 with a PatchGAN of 2 layers from the start, average 0.9999 of the weights, 256
pixels. Ours: a warm-up, gradients clipped by norm (SBER: by value), codes placed on data and
restarted for the first 100,000 updates, as the published start leaves most of them unused.
"""

from data_pipelines.clip_rows import ClipRows, MixedRows
from data_pipelines.image_folder import ImageRows
from emu3_jax.optim import AdamW
from emu3_jax.train import Train
from tokenizer.losses import Adversarial, Perceptual
from tokenizer.train import TokenizerTask
from tokenizer.vq import VQConfig


def get_config(initial: str = "") -> Train:
    """The job; --config.data.images.directory and --config.data.clips.directory are asked for."""
    return Train(
        task=TokenizerTask(
            VQConfig(),
            perceptual=Perceptual(weight=0.1),
            adversarial=Adversarial(weight=0.1),
            buffer_rows=131072,
            codebook_init_step=-1 if initial else 16,
            restart_every=100,
            restart_until=0 if initial else 100_000,
            hits_decay=0.99,
        ),
        data=MixedRows(
            images=ImageRows(size=256, augment_flip=True),
            clips=ClipRows(size=256, augment_flip=True),
        ),
        run_dir="runs/tokenizer_emu3",
        initial=initial,
        steps=1_000_000,
        batch=64,
        ema=0.9999,
        optimizer=AdamW(
            rate=1e-4, warmup=1000, final=1.0, b1=0.5, b2=0.9, eps=1e-8, weight_decay=0.0, clip=1.0
        ),
        log_every=100,
        save_every=5000,
    )
