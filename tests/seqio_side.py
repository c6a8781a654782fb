"""What test_seqio.py runs in .venv-ingest, in one process as TensorFlow takes long to import.

    python tests/seqio_side.py DIR < JOBS

Makes a TFDS data set in DIR, then runs each job, a JSON list of the launcher's arguments a line,
and prints its exit code and what it wrote to stdout and stderr.
"""

import contextlib
import io
import json
import pathlib
import shutil
import sys

import numpy as np
import tensorflow_datasets as tfds

from emu3_jax import launch


def write_tfds(directory: pathlib.Path) -> None:
    """Five pictures in a file as TFDS writes it, and a copy with one wrong bit."""
    features = {"image": tfds.features.Image(), "text": tfds.features.Text()}
    examples = [
        (i, {"image": np.full((12 + i, 16, 3), 50 * i, np.uint8), "text": f"picture {i}"})
        for i in range(5)
    ]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="pictures",
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": examples},
        data_dir=str(directory / "tfds"),
        file_format="tfrecord",
    )
    shutil.copytree(directory / "tfds", directory / "damaged")
    [file] = (directory / "damaged").rglob("*.tfrecord-*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def main(directory: str) -> None:
    """Prints one JSON line a job."""
    write_tfds(pathlib.Path(directory))
    for line in sys.stdin:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = launch.main(json.loads(line))
        print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
