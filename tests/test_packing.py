"""The packed mixture: documents once an epoch, whole and alone; any row the same from anywhere."""

import collections
import concurrent.futures
import dataclasses
import itertools
import json

import numpy as np
import pytest

from data_pipelines import documents, mixture, packing, parts, store
from emu3_jax import vocab as vocabulary

LENGTH = 96


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A vocabulary file and two stores: 60 captioned images in 3 parts and 40 texts."""
    root = tmp_path_factory.mktemp("world")
    ranks = {bytes([i]): i for i in range(256)}
    vocabulary.save_ranks(ranks, root / "vocab.tiktoken")
    print_ = vocabulary.Vocab(ranks, codes=64).fingerprint
    rng = np.random.default_rng(0)

    def image(i):
        # The caption names the document, so that rows can be traced back.
        text = np.array([i, *rng.integers(100, 200, rng.integers(0, 12))], np.uint32)
        shape = (1, *rng.integers(2, 6, 2))
        return store.Document(str(i), text, rng.integers(0, 64, shape).astype(np.uint16))

    images = [image(i) for i in range(60)]
    texts = [
        store.Document(
            str(i), np.array([i, *rng.integers(100, 200, rng.integers(3, 60))], "uint32")
        )
        for i in range(39)
    ]
    texts.append(store.Document("long", np.array([39, *range(1, 250)], np.uint32)))
    for name, stored, count in (("images", images, 3), ("texts", texts, 1)):
        made = store.Fingerprints(print_, "t" * 64 if name == "images" else "")
        for p in range(count):
            parts.write(store.part_path(root / name, p, count), stored[p::count], made)
        store.finish(root / name, count, "", "")
    return root


def component(world, name, layout="caption_first", weight=1.0, **options):
    return mixture.Component(str(world / name), documents.Layout(layout, **options), weight)


def source(lengths_N, name="s", seed=7, **fields):
    """Documents without captions."""
    return packing.Source(name, lengths_N, np.zeros_like(lengths_N), seed=seed, **fields)


def plan_of(config):
    return mixture.PackedRows(config, 1, (0, 0), {}, None).plan


def taken(plan, row, number):
    """How many documents a source gave before the window of a row."""
    return plan.cursor(row).sources[number].taken


def config(world, *components, **options):
    settings = {"length": LENGTH, "window": 8, "codes": 64} | options
    return mixture.Mixture(components, str(world / "vocab.tiktoken"), **settings)


def all_three(world, **options):
    return config(
        world,
        component(world, "images", caption_dropout=0.3),
        component(world, "images", "caption_last"),
        component(world, "texts", "text", weight=0.5),
        **options,
    )


def segments(row):
    """(tokens plus last target, positions, weights) of each document piece of a row."""
    for segment in range(1, row["segments"].max() + 1):
        here = row["segments"] == segment
        ids = np.append(row["tokens"][here], row["targets"][here][-1])
        np.testing.assert_array_equal(ids[1:], row["targets"][here])
        yield ids, row["positions"][here], row["weights"][here]


def test_rows_keep_the_contract(world):
    rows = all_three(world).rows()
    vocab = vocabulary.Vocab.load(world / "vocab.tiktoken", codes=64)
    for i in range(60):
        row = rows[i]
        assert {k: v.dtype.name for k, v in row.items()} == {
            **dict.fromkeys(("tokens", "targets", "segments", "positions"), "int32"),
            "weights": "float32",
        }
        assert {v.shape for v in row.values()} == {(LENGTH,)}
        steps = np.diff(row["segments"])
        used = int((row["segments"] > 0).sum())
        assert (steps[: used - 1] >= 0).all() and (row["segments"][used:] == 0).all()
        for name, pad in (("tokens", vocab.pad), ("targets", vocab.pad), ("weights", 0)):
            assert (row[name][used:] == pad).all()
        for ids, positions, weights in segments(row):
            np.testing.assert_array_equal(positions, np.arange(len(ids) - 1))
            visual = (ids >= vocab.visual) | (ids == vocab.eol) | (ids == vocab.eof)
            expected = np.where(visual[1:], 0.5, 1.0)
            if ids[1] == vocab.boi and ids[-2] == vocab.eoi:  # its caption was dropped
                expected[-1] = 0.0
            np.testing.assert_array_equal(weights, expected)
            if len(ids) <= LENGTH and 250 not in ids:
                whole = ids[0] == vocab.bos and ids[-1] == vocab.eos
                assert whole or (ids < 256).sum() > 20  # only the long text is split
                vocab.parse(ids)


def test_every_document_once_an_epoch_and_whole(world):
    source = config(world, component(world, "images"), component(world, "texts", "text"))
    rows = source.rows()
    opened = {name: store.Store(str(world / name)) for name in ("images", "texts")}
    vocab = vocabulary.Vocab.load(world / "vocab.tiktoken", codes=64)
    expected = {
        name: {
            tuple(documents.build(d, documents.Layout(layout), vocab)[0].tolist())
            for d in opened[name].read(range(len(opened[name])))
        }
        for name, layout in (("images", "caption_first"), ("texts", "text"))
    }
    plan = plan_of(source)
    start, image_counts, pieces = 0, collections.Counter(), collections.Counter()
    while taken(plan, start, 0) < 180 or taken(plan, start, 1) < 120:
        for ids, _, _ in segments(rows[start]):
            ids = tuple(ids.tolist())
            (image_counts if vocab.boi in ids else pieces)[ids] += 1
        start += 1
    assert set(image_counts) == expected["images"]
    assert set(image_counts.values()) <= {3, 4, 5, 6}
    joined = {ids for ids in pieces if ids[0] == vocab.bos and ids[-1] == vocab.eos}
    assert len(joined) == 39 and joined < expected["texts"]
    (long,) = expected["texts"] - joined
    split = set(pieces) - joined
    assert split == {long[a : a + LENGTH + 1] for a in range(0, len(long) - 1, LENGTH)}


def test_epochs_are_exact_permutations():
    lengths_N = np.arange(20, 50)
    plan = packing.Plan([source(lengths_N)], [packing.Stage(0, (1.0,))], 64, 5)
    counts = collections.Counter()
    for row in range(200):
        at = plan.cursor(row)
        if row == at.row:  # a new window: all documents taken before have been seen
            epochs, rest = divmod(at.sources[0].taken, 30)
            seen = [counts[i] for i in range(30)]
            assert sum(seen) == 30 * epochs + rest and set(seen) <= {epochs, epochs + 1}
        counts.update(plan.rows([row]).index_S.tolist())
    assert epochs > 5


def test_row_is_the_same_from_a_fresh_object_in_any_order_and_by_threads(world):
    reference = [all_three(world).rows()[i] for i in range(0, 50, 5)]
    shuffled = all_three(world).rows()
    for i in reversed(range(10)):
        same(shuffled[i * 5], reference[i])
    threaded = all_three(world).rows()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for got, want in zip(
            pool.map(lambda i: threaded[i * 5], range(10)), reference, strict=True
        ):
            same(got, want)
    batches = all_three(world).rows().batch(10)
    for i in range(5):
        same({k: v[0] for k, v in batches[i].items()}, reference[i * 2])
    with pytest.raises(AssertionError):
        same(all_three(world, seed=1).rows()[0], reference[0])


def same(got, want):
    assert got.keys() == want.keys()
    for name in got:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_going_on_from_a_saved_state_gives_the_same_rows(world):
    config = all_three(world)
    opened = config.open(3)
    state = json.loads(json.dumps(opened.state(15)))
    assert state["row"] == 45 and 0 < state["cursor"]["row"] <= 45
    resumed = config.open(3, state)
    for i in range(45, 80):
        same(resumed.dataset[i], opened.dataset[i])
    assert resumed.state(20) == opened.state(20) and resumed.figures(20) == opened.figures(20)
    with pytest.raises(IndexError, match="lies before the cursor's row"):
        resumed.dataset[state["cursor"]["row"] - 1]


def test_weights_are_shares_of_tokens_and_rows_are_full(world):
    source = config(
        world,
        component(world, "images", weight=3.0),
        component(world, "texts", "text", weight=1.0),
        window=32,
    )
    report = source.report(300)
    shares = [value for name, value in report.items() if name.startswith("share/")]
    np.testing.assert_allclose(shares, [0.75, 0.25], atol=0.01)
    assert report["fill"] > 0.95
    assert min(v for name, v in report.items() if name.startswith("epochs/")) > 2
    rows = source.rows()
    counted = np.mean([(rows[i]["segments"] > 0).mean() for i in range(300)])
    np.testing.assert_allclose(counted, report["fill"], atol=0.01)


def test_every_prefix_of_the_stream_keeps_the_shares():
    sources = [source(np.full(1000, 11), name=name, seed=ord(name)) for name in "abc"]
    plan = packing.Plan(sources, [packing.Stage(0, (5.0, 3.0, 2.0))], 100, 4)
    for row in range(0, 200, 4):
        given = np.array([taken(plan, row, i) for i in range(3)])
        assert np.abs(given - given.sum() * np.array([0.5, 0.3, 0.2])).max() <= 1


@pytest.mark.parametrize(
    "lengths,length,window,least",
    [
        (lambda rng: rng.integers(20, 600, 5000), 5121, 64, 0.985),  # short text
        (lambda rng: rng.integers(4160, 4400, 5000), 33_000, 64, 0.9),  # captioned images
        (
            lambda rng: np.append(rng.integers(4160, 4400, 900), rng.integers(20, 600, 4100)),
            5120,
            64,
            0.97,
        ),
    ],
)
def test_fill_rate(lengths, length, window, least):
    lengths_N = lengths(np.random.default_rng(0))
    plan = packing.Plan([source(lengths_N)], [packing.Stage(0, (1.0,))], length, window)
    assert plan.report(600)["fill"] > least


def test_best_fit_is_as_good_as_the_rule_says():
    rng = np.random.default_rng(0)
    count_S = rng.integers(1, 65, 300)
    used = np.bincount(packing._best_fit(count_S, 64), count_S)
    assert max(used) <= 64
    brute = []  # the same rule without the index
    for count in sorted(count_S, reverse=True):
        fitting = [row for row in brute if sum(row) + count <= 64]
        if fitting:
            max(fitting, key=sum).append(count)
        else:
            brute.append([count])
    assert sorted(used) == sorted(map(sum, brute))


def test_caption_dropout_is_drawn_anew_each_epoch_and_reproducibly(world):
    source = config(world, component(world, "images", caption_dropout=0.4))
    vocab = vocabulary.Vocab.load(world / "vocab.tiktoken", codes=64)
    rows, plan = source.rows(), plan_of(source)
    dropped, row = collections.Counter(), 0
    while taken(plan, row, 0) < 60 * 20:
        slots = plan.rows([row])
        for (ids, _, _), index in zip(segments(rows[row]), slots.index_S.tolist(), strict=True):
            assert ids[0] == vocab.bos
            if ids[1] == vocab.boi:
                dropped[index] += 1
        row += 1
    np.testing.assert_allclose(sum(dropped.values()) / taken(plan, row, 0), 0.4, atol=0.06)
    assert len(dropped) > 55 and max(dropped.values()) < 19


def test_documents_that_do_not_fit(world):
    short = config(world, component(world, "images"), length=40)
    report = short.report(50)
    assert next(v for k, v in report.items() if k.startswith("dropped/")) > 0
    for row in itertools.islice(iter(short.rows()), 50):
        for ids, _, _ in segments(row):
            assert len(ids) <= 41 and ids[-1] != 0
    with pytest.raises(
        ValueError, match=r"document \d+ of .*images \(caption_first\) takes \d+ posi"
    ):
        dataclasses.replace(short, too_long="error").rows()
    with pytest.raises(ValueError, match="a row of 5 is too short for any document of .*images"):
        dataclasses.replace(short, length=5).rows()


def test_errors_name_the_setting(world):
    with pytest.raises(ValueError, match="a mixture without components; name at least one store"):
        config(world).rows()
    with pytest.raises(ValueError, match="has weight 0.0; give it a positive one or leave it out"):
        config(world, component(world, "images", weight=0.0)).rows()
    with pytest.raises(ValueError, match="too_long 'cut' is none of drop, truncate, error"):
        config(world, component(world, "images"), too_long="cut").rows()
    with pytest.raises(ValueError, match="has 40 texts without image; take layout 'text' for them"):
        config(world, component(world, "texts")).rows()
    with pytest.raises(store.StoreError, match="nowhere does not exist; run its encode job first"):
        config(world, component(world, "nowhere")).rows()
    with pytest.raises(
        store.StoreError, match="with tokenizer tttttttttttt, this run has tokenizer"
    ):
        config(world, component(world, "images"), tokenizer="u" * 64).rows()
    with pytest.raises(
        store.StoreError, match="with vocabulary [0-9a-f]{12}, this run has vocabula"
    ):
        config(world, component(world, "images"), codes=65).rows()


def test_stores_of_two_tokenizers_do_not_mix(world, tmp_path):
    vocab = vocabulary.Vocab.load(world / "vocab.tiktoken", codes=64)
    other = store.Document("0", np.zeros(1, np.uint32), np.zeros((1, 2, 2), np.uint16))
    made = store.Fingerprints(vocab.fingerprint, "u" * 64)
    parts.write(store.part_path(tmp_path, 0, 1), [other], made)
    store.finish(tmp_path, 1, "", "")
    both = config(world, component(world, "images"), mixture.Component(str(tmp_path)))
    with pytest.raises(ValueError, match="with tokenizers tttttttttttt and uuuuuuuuuuuu; mix only"):
        both.rows()
