"""Finds the near-duplicate images of a source and lists them, for encoding without them.

    python -m emu3_jax.launch --config=configs/duplicates.py --config.source.directory=DIR \\
        [--config.source.list=captions.jsonl] [--config.directory=runs/duplicates]
    ...duplicates.py:tfds --config.source.directory=DIR [--config.source.split=train]
    ...duplicates.py:webdataset --config.source.shards="DIR/*.tar"
    ...duplicates.py:parquet --config.source.files="DIR/*.parquet"

Hardware: any number of hosts that share --config.directory. Started as one run (see
emu3_jax/launch.py) they divide the parts among them; so do N that are started alone with
--config.workers=N and each its own --config.worker. No accelerator is used. Time: 560 images a
second on one core for JPEG of 512x512 pixels, 150 for 1024x1024; to join a million hashes 7 s.
Expected result: --config.directory holds duplicates.jsonl, the same however often the job was
interrupted and begun again; --config.filters.duplicates of configs/encode.py takes it.
"""

from data_pipelines import sources
from data_pipelines.duplicates import Duplicates

SOURCES = {
    "images": sources.Images,
    "tfds": sources.Tfds,
    "webdataset": sources.WebDataset,
    "parquet": sources.Parquet,
}


def get_config(source: str = "images") -> Duplicates:
    """The job for one kind of source; ValueError names them."""
    if source not in SOURCES:
        raise ValueError(f"no source {source!r}; take one of {', '.join(SOURCES)}")
    return Duplicates(SOURCES[source](), parts=64)
