"""Converts checkpoints between PyTorch's layouts and ours, either way.

    python -m emu3_jax.launch --config=configs/convert.py --config.source=DIR --config.target=DIR

Hardware: one machine, disk for the result. Memory does not grow with the model between official and
hf; our own format is read and written whole. Time: that of reading and writing the files.
Expected result: TARGET holds the model in --config.format (hf, official or emu3_jax), every bit
kept. The source is recognised from its files.
"""

from tokenizer.exchange import Convert


def get_config() -> Convert:
    """The job; --config.source and --config.target are asked for."""
    return Convert()
