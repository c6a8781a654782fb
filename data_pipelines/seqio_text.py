"""A seqio Task or Mixture that a user already has becomes stores of text.

seqio needs TensorFlow, so this job runs in .venv-ingest (make ingest), and only there is seqio
imported. A task's own preprocessing runs as seqio runs it; the text is then tokenised with our
vocabulary. The feature must therefore be text, as the FEATURE_pretokenized that seqio's tokenize
keeps, or ids that the task's vocabulary decodes back into text.

A Mixture becomes a store for each of its tasks, each example once, as our own mixtures weigh stores
and not examples: mixture.json holds for each store the weight that gives its tasks the Mixture's
rates (seqio's rates count examples, our weights tokens).
"""

import dataclasses
import difflib
import functools
import importlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from data_pipelines import parts, text, text_files


@dataclasses.dataclass
class EncodeSeqio(text.TextStore):
    """Job: a seqio Task or Mixture becomes a store of text, or one for each task of a Mixture.

    module            Python module that registers it, imported from where the job is started
    mixture_or_task   its name
    split, feature    what of it is taken
    parts             of each store. Beyond the number of files that a task has, each part reads all
                      of them

    A task is known by its name: nothing notices that its data or its preprocessing changed.
    Preprocessors that draw at random are seeded, unless a task's source is a function that takes no
    seed.
    """

    module: str = ""
    mixture_or_task: str = ""
    split: str = "train"
    feature: str = "targets_pretokenized"

    def run(self) -> None:
        """Writes the stores, and the weights of a Mixture's."""
        seqio = _import(self.module)
        found = _find(seqio, self.mixture_or_task)
        if isinstance(found, seqio.Task):
            self.encode(SeqioTask(found, self.split, self.feature), self.directory)
            return
        tasks = [task for task in found.tasks if self.split in task.splits]
        paths = {task.name: str(pathlib.Path(self.directory, task.name)) for task in tasks}
        for task in tasks:
            self.encode(SeqioTask(task, self.split, self.feature), paths[task.name])
        if infos := _infos(paths):
            rates = {task.name: float(found.get_rate(task)) for task in tasks}
            _write_weights(pathlib.Path(self.directory), paths, rates, infos)


class SeqioTask:
    """A task's examples as a source of text."""

    unit = "examples"

    def __init__(self, task: Any, split: str, feature: str):
        """Raises ValueError for a split or feature that cannot be used."""
        if split not in task.splits:
            has = _list(task.splits)
            raise ValueError(f"task {task.name} has no split {split!r}; it has {has}")
        self.name, self._task, self._split, self._feature = task.name, task, split, feature
        self._vocabulary = self._checked(self._dataset(0, 1).element_spec)

    def size(self, part: int, parts: int) -> int:
        """A part's share of the examples, where the task knows how many it has."""
        return (self._task.num_input_examples(self._split) or 0) // parts

    def made_of(self, part: int, parts: int) -> Any:
        """What tells the records of a part apart from others'."""
        return [self.name, self._split, self._feature, part, parts]

    def read(self, part: int, parts: int) -> Iterator[text.Record | text.BadText]:
        """The texts of a part's examples, in seqio's order without shuffling."""
        examples = self._dataset(part, parts).as_numpy_iterator()
        for number, example in enumerate(examples):
            key = f"{self.name}/{self._split}/{part}/{number}"
            try:
                value = text_files.usable(self._text(example[self._feature]))
            except ValueError as error:
                yield text.BadText(f"{key}: {error}")
            else:
                yield text.Record(key, value, 1)

    def _dataset(self, part: int, parts: int) -> Any:
        import seqio

        get = functools.partial(
            self._task.get_dataset,
            sequence_length=None,
            split=self._split,
            shuffle=False,
            shard_info=seqio.ShardInfo(part, parts),
            try_in_mem_cache=False,
        )
        try:
            return get(seed=0)
        except ValueError:  # a function that takes no seed; any other error is raised again
            return get(seed=None)

    def _checked(self, spec: dict) -> Any:
        """The vocabulary that decodes the feature, None for text; ValueError if it is neither."""
        name = f"task {self.name}: feature {self._feature!r}"
        if self._feature not in spec:
            raise ValueError(f"{name} is not there; it has {_list(spec)}")
        kind, rank = spec[self._feature].dtype, spec[self._feature].shape.rank
        if kind.name == "string" and rank == 0:
            return None
        features = self._task.output_features
        if kind.is_integer and rank == 1 and self._feature in features:
            vocabulary = features[self._feature].vocabulary
            try:
                if isinstance(vocabulary.decode([vocabulary.vocab_size - 1]), str):
                    return vocabulary
            except NotImplementedError:
                pass
            raise ValueError(
                f"{name} is ids that {type(vocabulary).__name__} does not decode into text; "
                f"take a text, one of {_list(k for k in spec if spec[k].dtype.name == 'string')}"
            )
        raise ValueError(f"{name} is {kind.name} of rank {rank}; take a text, or ids of a text")

    def _text(self, value: Any) -> str:
        if self._vocabulary is None:
            return value.decode()
        return self._vocabulary.decode(value.tolist())


def _import(module: str) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import seqio
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error}; run `make ingest`, then start this with .venv-ingest/bin/python"
        ) from error
    try:
        importlib.import_module(module)
    except (ModuleNotFoundError, ValueError) as error:
        raise ValueError(f"module {module!r} cannot be imported: {error}; set module") from error
    return seqio


def _find(seqio: Any, name: str) -> Any:
    """A Task or Mixture; ValueError names the nearest."""
    names = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {_list(names)}"
        raise ValueError(f"no Task or Mixture {name!r}; {hint}")
    return seqio.get_mixture_or_task(name)


def _infos(paths: dict[str, str]) -> dict[str, dict]:
    """The stores' descriptions by task, none before all are complete."""
    infos = {task: parts.read_json(pathlib.Path(paths[task], "store.json")) for task in paths}
    return {} if None in infos.values() else infos


def _write_weights(
    directory: pathlib.Path, paths: dict[str, str], rates: dict[str, float], infos: dict[str, dict]
) -> None:
    ids = {task: info["text_tokens"] / max(1, info["documents"]) for task, info in infos.items()}
    total = sum(rates[task] * ids[task] for task in paths)
    weights = {paths[task]: rates[task] * ids[task] / total for task in paths}
    parts.write_json(directory / "mixture.json", weights)
    for path, weight in weights.items():
        print(f"{path}: weight {weight:.4f}")


def _list(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
