"""What a user of seqio has: tasks and mixtures in a module of their own (see test_seqio.py)."""

import functools

import seqio
import tensorflow as tf

BYTES = seqio.ByteVocabulary()


def source(count: int, split: str, shuffle_files: bool) -> tf.data.Dataset:
    """Without a seed, as many users' functions are."""
    texts = [f"{split} text {i}: \u732b {'word ' * i}" for i in range(count)]
    return tf.data.Dataset.from_tensor_slices({"text": texts + ["", b"broken \xff"]})


def task(name: str, count: int, vocabulary: seqio.Vocabulary, *preprocessors) -> None:
    """Registers a task with the one feature `targets`."""
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            functools.partial(source, count), splits=["train", "validation"]
        ),
        preprocessors=[
            functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"}),
            *preprocessors,
        ],
        output_features={"targets": seqio.Feature(vocabulary, add_eos=True, rank=1)},
    )


task("long", 10, BYTES, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos)
task("short", 4, BYTES, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos)
seqio.MixtureRegistry.add("both", [("long", 3.0), ("short", 1.0)])


@seqio.map_over_dataset(num_seeds=1)
def draw(example: dict, seed: tf.Tensor) -> dict:
    """Ids at random, of no text."""
    ids = tf.random.stateless_uniform((4,), seed, 0, 100, tf.int32)
    return {"targets": ids, "note": example["targets"]}


task("ids", 3, seqio.PassThroughVocabulary(100), draw)
