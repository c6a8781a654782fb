"""Text files, or a seqio Task or Mixture, become stores of text.

    python -m emu3_jax.launch --config=configs/text.py --config.texts=DIR \\
        [--config.files="**/*.jsonl"] [--config.field=text] [--config.directory=runs/text]
    make ingest
    .venv-ingest/bin/python -m emu3_jax.launch --config=configs/text.py:seqio \\
        --config.module=MODULE --config.mixture_or_task=NAME [--config.split=train] \\
        [--config.feature=targets_pretokenized]

Hardware: CPUs alone, any number of hosts that share the store's directory; N processes divide the
parts among them, each with --config.workers=N and its own --config.worker. A process uses several
threads. On a machine whose accelerator is busy, set JAX_PLATFORMS=cpu.
Time: about 2 million ids a second of a core. Expected result: --config.directory holds the store,
however often it was interrupted and begun again. data_pipelines/text.py says what the fields mean,
and data_pipelines/seqio_text.py what becomes of a Mixture.
"""

from data_pipelines.seqio_text import EncodeSeqio
from data_pipelines.text import EncodeText

JOBS = {"files": EncodeText(parts=256), "seqio": EncodeSeqio()}


def get_config(source: str = "files") -> EncodeText | EncodeSeqio:
    """The job for one kind of source; ValueError names them."""
    if source not in JOBS:
        raise ValueError(f"no source {source!r}; take one of {', '.join(JOBS)}")
    return JOBS[source]
