"""Copies a TFDS data set into array_record files, which are read without TensorFlow.

    make ingest
    .venv-ingest/bin/python -m emu3_jax.launch --config=configs/convert_tfds.py \\
        --config.source=DIR --config.target=DIR

Hardware: one CPU core. Both are directories of one version of a data set, as .../mnist/3.0.1.
Time: about that of copying the files. Expected result: TARGET is read by configs/encode.py and
configs/evaluate_tokenizer.py.
"""

from data_pipelines.tfds_convert import ConvertTfds


def get_config() -> ConvertTfds:
    """The job; --config.source and --config.target are asked for."""
    return ConvertTfds()
