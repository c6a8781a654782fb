"""A page to draw, to ask about an image and to go on with a video: `make studio`.

    make studio                                                     (after make demo)
    .venv-studio/bin/python -m emu3_jax.launch --config=configs/studio.py \
        --config.model.tokenizer=DIR --config.model.decoder=DIR --config.model.vocab=emu3
    ... --config=configs/studio.py:demo                             what `make studio` starts

DIR is a run of ours or published weights. What the page offers first are Emu3-Gen's settings, and
its words are put behind each prompt. The page is for this machine alone; --config.host=ADDRESS
opens it to others, without a password. Hardware: any; Emu3's 8B needs 20 GB on one device, or
`--config.model.mesh.tensor=N`. Expected result: a line with the page's address.
"""

from configs import generate as texts
from emu3_jax.sampling import Sampling
from inference.artist import Canvas, Model
from inference.studio import Studio


def get_config(what: str = "") -> Studio:
    """The job; of the demo's model for "demo"."""
    if what == "demo":
        run = "runs/demo"
        return Studio(
            Model(f"{run}/tokenizer", f"{run}/decoder", f"{run}/vocab.tiktoken"),
            Canvas(area=32 * 32, seconds=1.0, fps=8.0),
            Sampling(guidance=1.5, top_k=0),
            length=64,
        )
    if what:
        raise ValueError(f"nothing called {what!r} to open; take demo, or name none")
    return Studio(Model(suffix=texts.SUFFIX, negative=texts.NEGATIVE))
