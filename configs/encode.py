"""Encodes the images and videos of a list, with their captions, into a token store.

    python -m emu3_jax.launch --config=configs/encode.py --config.images=DIR --config.tokenizer=DIR

Hardware: any number of hosts that share the store's directory, each with all its devices. Started
as one run (see emu3_jax/launch.py) they divide the parts among them; so do N that are started alone
with --config.workers=N and each its own --config.worker. Memory grows with --config.tokens.
Time: an image of 512x512 pixels is 3.7 TFLOP with Emu3's tokenizer, a frame of video as much.
Expected result: --config.directory holds the store, however often it was interrupted and begun
again. Images come in 27 sizes, so that 27 programs are compiled; with --config.aspects=0 they keep
their own shapes, as Emu3 has them. --config.dtype=bfloat16 takes 16 bits, and changes some codes.
"""

from data_pipelines.encode import Encode


def get_config() -> Encode:
    """The job; --config.images and --config.tokenizer are asked for."""
    return Encode(tokens=16384, parts=256, aspects=9)
