"""TFDS data sets in other files than array_record, written anew: only those give any record by its
number, and are read without TensorFlow.

Reading the others needs TensorFlow, so this job runs in .venv-ingest (make ingest). Records are
copied as they are, so nothing is decoded, and file by file, so an interrupted job goes on.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from data_pipelines import parts

_FORMAT, _INFO = "array_record", "dataset_info.json"


@dataclasses.dataclass
class ConvertTfds:
    """Job: copies a data set into array_record files.

    source, target   directories of one version of it; source holds dataset_info.json
    """

    source: str = ""
    target: str = ""

    def run(self) -> None:
        """Writes what is missing; dataset_info.json, which makes it a data set, comes last."""
        from data_pipelines import tfds_images  # TFDS takes seconds to import

        info = tfds_images.open_builder(self.source).info
        kind = info.file_format.value
        if kind == _FORMAT:
            raise ValueError(f"{self.source} is in {_FORMAT} files already; use it as it is")
        target = pathlib.Path(self.target)
        target.mkdir(parents=True, exist_ok=True)
        for split in info.splits.values():
            for source in map(pathlib.Path, split.filepaths):
                path = target / _renamed(source.name, kind)
                if not path.exists():
                    self._copy(kind, source, path)
                    print(f"{path}: written", flush=True)
        for source in pathlib.Path(self.source).iterdir():
            if source.name == _renamed(source.name, kind) and source.name != _INFO:
                shutil.copyfile(source, target / source.name)
        written = json.loads((pathlib.Path(self.source) / _INFO).read_text())
        for split in written["splits"]:
            split["filepathTemplate"] = _renamed(split["filepathTemplate"], kind)
        parts.write_json(target / _INFO, written | {"fileFormat": _FORMAT})

    def _copy(self, kind: str, source: pathlib.Path, path: pathlib.Path) -> None:
        from tensorflow_datasets.core import file_adapters  # TFDS takes seconds to import

        reads, writes = (
            file_adapters.ADAPTER_FOR_FORMAT[file_adapters.FileFormat(name)]
            for name in (kind, _FORMAT)
        )
        part = path.with_name(path.name + ".tmp")
        writes.write_examples(part, enumerate(_records(reads, source)))
        os.replace(part, path)


def _renamed(name: str, kind: str) -> str:
    """A file's name, or a template of names, in the other format."""
    return name.replace(f".{kind}-", f".{_FORMAT}-")


def _records(reads: Any, path: pathlib.Path) -> Iterator[bytes]:
    try:
        yield from reads.make_tf_data(path).as_numpy_iterator()
    except Exception as error:
        if type(error).__name__ != "DataLossError":  # TensorFlow's, which is not imported here
            raise
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
