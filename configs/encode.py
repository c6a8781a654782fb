"""Encodes the images and videos of a source, with their captions, into a token store.

    python -m emu3_jax.launch --config=configs/encode.py --config.tokenizer=DIR \\
        --config.source.directory=DIR [--config.source.list=captions.jsonl]
    ...encode.py:images --config.source.list=              every image below, captions in NAME.txt
    ...encode.py:videos --config.source.directory=DIR [--config.clip_seconds=2,5]
    ...encode.py:webdataset --config.source.shards="DIR/train-*.tar"
    ...encode.py:parquet --config.source.files=DIR [--config.source.caption=text]
    ...encode.py:tfds --config.source.directory=DIR --config.source.split=train \\
        [--config.source.caption=label]

Filters are fields as well: --config.filters.least_side=512. For Emu3's data of fine-tuning set
--config.area=518400 --config.aspects=0 (720x720, shapes kept).

Hardware: any number of hosts that share the store's directory, each with all its devices. Started
as one run (see emu3_jax/launch.py) they divide the parts among them; so do N that are started alone
with --config.workers=N and each its own --config.worker. Memory grows with --config.tokens.
Time: an image of 512x512 pixels is 3.7 TFLOP with Emu3's tokenizer, a frame of video as much.
Expected result: --config.directory holds the store, however often it was interrupted and begun
again. Images come in 27 sizes, so that 27 programs are compiled; with --config.aspects=0 they keep
their own shapes, as Emu3 has them. --config.dtype=bfloat16 takes 16 bits, and changes some codes.
"""

from data_pipelines.encode import Encode
from data_pipelines.sources import Images, Parquet, Tfds, Videos, WebDataset

SOURCES = {
    "images": Images,
    "videos": Videos,
    "webdataset": WebDataset,
    "parquet": Parquet,
    "tfds": Tfds,
}


def get_config(source: str = "images") -> Encode:
    """The job for one kind of source; ValueError names them."""
    if source not in SOURCES:
        raise ValueError(f"no source {source!r}; take one of {', '.join(SOURCES)}")
    return Encode(source=SOURCES[source](), tokens=16384, parts=256, aspects=9)
