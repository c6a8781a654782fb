"""The demo on all 3,853 pictures, eight times longer: for hours.

    python -m emu3_jax.launch --config=configs/demo_long.py[:STAGE]

Hardware: any CPU. Expected result: runs/demo_long/report.html; its figures are not measured.
"""

from configs import demo


def get_config(stage: str = ""):
    """The same stages, trained longer on everything."""
    job = demo.build("runs/demo_long", (), 0, tokenizer_steps=20000, decoder_steps=8000)
    return job.stage(stage)
