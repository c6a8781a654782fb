"""Draws images (or videos) for prompts, with Emu3-Gen's own settings or the paper's.

    python -m emu3_jax.launch --config=configs/generate.py --config.model.tokenizer=DIR \
        --config.model.decoder=DIR --config.model.vocab=emu3 --config.prompts="('a cat',)"
    python -m emu3_jax.launch --config=configs/generate.py:paper ...
    python -m emu3_jax.launch --config=configs/generate.py:video ... --config.canvas.fps=24
    python -m emu3_jax.launch --config=configs/generate.py:go_on ... --config.video=clip.mp4
    python -m emu3_jax.launch --config=configs/generate.py:benchmark ... \
        --config.benchmark=geneval --config.prompts=evaluation_metadata.jsonl --config.directory=DIR
    python -m emu3_jax.launch --config=configs/generate.py:demo     (after make demo)

DIR is a run of ours or published weights. Hardware: any; Emu3's 8B needs 20 GB on one device, or
`--config.model.mesh.tensor=N`. Time: see README. Expected result: PNGs with prompt and settings in
them, and a grid; mp4 of videos.
"""

import dataclasses

from emu3_jax.sampling import PRESETS, Sampling
from inference.artist import Canvas, Model
from inference.benchmarks import WriteBenchmark
from inference.draw import Generate, GoOn

# What the release puts behind each caption, and into guidance's other branch.
SUFFIX = " masterpiece, film grained, best quality."
NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, "
    "cropped, worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, "
    "username, blurry."
)


def get_config(what: str = "official"):
    """One of the presets of emu3_jax/sampling.py, or video, go_on, benchmark or demo."""
    model = Model(suffix=SUFFIX, negative=NEGATIVE)
    if what == "demo":
        run = "runs/demo"
        model = Model(f"{run}/tokenizer", f"{run}/decoder", f"{run}/vocab.tiktoken")
        return Generate(
            model, ("woman: medium skin tone", "man: dark skin tone"), samples=4,
            canvas=Canvas(area=32 * 32), sampling=Sampling(guidance=1.5, top_k=0),
            directory=f"{run}/generate",
        )  # fmt: skip
    if what == "video":
        return Generate(model, canvas=Canvas(fps=24.0), batch=1)
    if what == "go_on":
        return GoOn(Model())
    if what == "benchmark":
        return WriteBenchmark(model=model)
    if what not in PRESETS:
        names = ", ".join([*PRESETS, "video", "go_on", "benchmark", "demo"])
        raise ValueError(f"nothing called {what!r} to generate; take one of {names}")
    return Generate(model, sampling=dataclasses.replace(PRESETS[what]))
