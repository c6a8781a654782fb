"""The stream of rows as a whole: over random stores, mixtures, hosts, batches and changes.

Every test holds what hosts read to the stream of a single reader that begins at the first row.
"""

import dataclasses
import json
import pathlib
import shutil
import tempfile
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from data_pipelines import documents, mixture, packing, parts, store
from emu3_jax import data
from emu3_jax import vocab as vocabulary

RANKS = {bytes([i]): i for i in range(256)}
VOCAB = vocabulary.Vocab(RANKS, codes=64)
HYPOTHESIS = hypothesis.settings(
    max_examples=15, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip


def make_store(path: pathlib.Path, kind: str, sizes: list[int], seed: int, count: int) -> None:
    """A store of `kind` whose i-th document begins its text with the ids of i."""
    rng = np.random.default_rng(seed)

    def document(i: int, size: int) -> store.Document:
        mark = [i // 100, i % 100]
        text = np.array([*mark, *rng.integers(100, 200, size)], np.uint32)
        if kind == "text":
            return store.Document(str(i), text)
        if kind == "chat":
            turns = np.array([2, *_shares(rng, size)])
            codes = rng.integers(0, 64, (1, 2, 3)).astype(np.uint16) if i % 2 else None
            return store.Document(str(i), text, codes, turns=turns)
        shape = (int(rng.integers(1, 3)), *rng.integers(1, 5, 2)) if kind == "video" else (
            1, *rng.integers(1, 6, 2))  # fmt: skip
        codes = rng.integers(0, 64, shape).astype(np.uint16)
        return store.Document(str(i), text, codes, fps=8.0 if kind == "video" else 0.0)

    stored = [document(i, size) for i, size in enumerate(sizes)]
    made = store.Fingerprints(VOCAB.fingerprint, "" if kind == "text" else "t" * 64)
    for p in range(count):
        parts.write(store.part_path(path, p, count), stored[p::count], made)
    store.finish(path, count, "", "")


def _shares(rng, size: int) -> list[int]:
    """`size` ids divided among one or two questions and as many answers."""
    pieces = 2 * int(rng.integers(1, 3))
    cuts = np.sort(rng.integers(0, size + 1, pieces - 1))
    return np.diff([0, *cuts, size]).tolist()


LAYOUTS = dict(
    image=("caption_first", "caption_last", "caption_either"), video=("caption_first",),
    text=("text",), chat=("chat",),
)  # fmt: skip


@st.composite
def mixtures(draw):
    """A mixture of one to three random stores, in a new directory."""
    root = pathlib.Path(tempfile.mkdtemp())
    vocabulary.save_ranks(RANKS, root / "vocab.tiktoken")
    components = []
    for number in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(list(LAYOUTS)))
        sizes = draw(st.lists(st.integers(0, 60), min_size=3, max_size=40))
        path = root / f"{kind}{number}"
        make_store(path, kind, sizes, number, draw(st.integers(1, 3)))
        name = draw(st.sampled_from(LAYOUTS[kind]))
        dropout = 0.3 if name in ("caption_first", "caption_either") else 0.0
        layout = documents.Layout(name, dropout, weights=documents.Weights(2, 3, 5, 7, 11))
        components.append(mixture.Component(str(path), layout, draw(st.sampled_from([0.5, 1, 3]))))
    schedule = ()
    if draw(st.booleans()):
        stages = [[draw(st.sampled_from([0, 1, 2])) for _ in components] for _ in range(2)]
        schedule = tuple(
            mixture.Stage(step, tuple(weights))
            for step, weights in zip((2, 5), stages, strict=True) if any(weights)
        )  # fmt: skip
    config = mixture.Mixture(
        tuple(components), str(root / "vocab.tiktoken"), codes=64,
        length=draw(st.integers(40, 120)), seed=draw(st.integers(0, 3)),
        window=draw(st.integers(1, 12)), too_long=draw(st.sampled_from(["drop", "truncate"])),
        schedule=schedule,
    )  # fmt: skip
    try:
        config.rows()
    except ValueError as error:  # no document of a store fits
        hypothesis.assume("is too short for any document" not in str(error))
        raise
    return config


def same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name in got:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@HYPOTHESIS
@hypothesis.given(mixtures(), st.sampled_from([1, 2, 3, 4, 8]), st.sets(st.integers(0, 4)))
def test_hosts_read_the_stream_of_one(config, hosts, resumed):
    """Each its own rows of a step, whether it began at the first step or goes on from there."""
    batch = 2 * hosts
    alone = config.open(batch)
    for step in range(5):
        state = saved(alone, step) if step in resumed else None
        opened = config.open(batch, state)
        firsts = [opened.row(step) + 2 * host for host in range(hosts)]
        blocks = [opened.block(first, 2) for first in reversed(firsts)][::-1]
        joined = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        same(joined, alone.block(alone.row(step), batch))


def saved(opened, step: int) -> dict:
    """The state at a step as a checkpoint gives it back."""
    return json.loads(json.dumps(opened.state(step)))


@HYPOTHESIS
@hypothesis.given(mixtures())
def test_no_document_is_split_lost_or_doubled_within_an_epoch(config):
    """Every piece of a row is a document as its layout writes it, each once an epoch."""
    config = dataclasses.replace(config, schedule=())
    opened = config.open(1)
    packed = opened._eras[0][1]
    stores = {c.store: store.Store(c.store) for c in config.components}
    given = [[] for _ in config.components]
    for row in range(24):
        slots, filled = packed.plan.rows([row]), opened.dataset[row]
        used = int((filled["segments"] > 0).sum())
        assert used == slots.count_S.sum() and used <= config.length
        for slot in range(len(slots)):
            number, index = int(slots.source_S[slot]), int(slots.index_S[slot])
            begin, count = int(slots.begin_S[slot]), int(slots.count_S[slot])
            component = config.components[number]
            here = np.flatnonzero(filled["segments"] == slot + 1)
            assert len(here) == count and (np.diff(here) == 1).all()
            ids = np.append(filled["tokens"][here], filled["targets"][here[-1]])
            np.testing.assert_array_equal(ids[1:], filled["targets"][here])
            np.testing.assert_array_equal(filled["positions"][here], np.arange(count))
            (document,) = stores[component.store].read([index])
            last = bool(slots.last_S[slot])
            whole, weights = documents.build(document, component.layout, VOCAB, last=last)
            if component.layout.name == "text":
                piece = slice(begin, begin + count + 1)
                whole, weights = whole[piece], weights[piece]
            elif count + 1 < len(whole):  # without its caption, or with a part of it
                document = dataclasses.replace(
                    document, text=document.text[: len(document.text) - len(whole) + count + 1]
                )
                whole, weights = documents.build(document, component.layout, VOCAB, last=last)
                if last:
                    weights[-1] = 0.0
            np.testing.assert_array_equal(ids, whole)
            np.testing.assert_array_equal(filled["weights"][here], weights[1:])
            if begin == 0:
                given[number].append(index)
    at = packed.plan.cursor(24)
    before = [packed.plan.rows([row]) for row in range(at.row)]
    for number, taken in enumerate(at.sources):
        size = len(stores[config.components[number].store])
        seen = np.concatenate([s.index_S[(s.source_S == number) & (s.begin_S == 0)]
                               for s in before] or [[]]).astype(int)  # fmt: skip
        assert len(seen) + taken.dropped == taken.taken
        counts = np.bincount(seen, minlength=size)
        assert counts.max(initial=0) <= -(-taken.taken // size)
        if not taken.dropped:
            assert counts.min() >= taken.taken // size


@HYPOTHESIS
@hypothesis.given(mixtures(), st.integers(1, 4), st.data())
def test_a_host_that_needs_some_positions_gets_those(config, cuts, draw):
    """With `context` over hosts: the slices side by side are the row."""
    whole = config.open(3).block(0, 3)
    inner = draw.draw(st.lists(st.integers(1, config.length - 1), max_size=cuts, unique=True))
    bounds = [0, *sorted(inner), config.length]
    pieces = [
        config.open(3, None, data.Positions(low, high, config.length)).block(0, 3)
        for low, high in zip(bounds, bounds[1:], strict=False)
    ]
    same({name: np.concatenate([p[name] for p in pieces], axis=1) for name in whole}, whole)


def two(tmp_path, **fields) -> mixture.Mixture:
    """Images and texts."""
    vocabulary.save_ranks(RANKS, tmp_path / "vocab.tiktoken")
    rng = np.random.default_rng(0)
    for kind in ("image", "text", "video"):
        if not (tmp_path / kind).exists():
            make_store(tmp_path / kind, kind, rng.integers(0, 40, 50).tolist(), 1, 2)
    components = (
        mixture.Component(str(tmp_path / "image"), weight=2.0),
        mixture.Component(str(tmp_path / "text"), documents.Layout("text")),
    )
    settings = dict(vocab=str(tmp_path / "vocab.tiktoken"), codes=64, length=80, window=8) | fields
    return mixture.Mixture(components, **settings)


def test_resuming_at_fifty_steps_on_any_number_of_hosts(tmp_path):
    """From what a checkpoint at that step holds, each host's rows are those of the whole run."""
    config = two(tmp_path)
    alone = config.open(24)
    steps = np.random.default_rng(0).choice(300, 50, replace=False)
    for number, step in enumerate(sorted(steps.tolist())):
        state = saved(alone, step)
        hosts = (1, 2, 3, 4, 8)[number % 5]
        size = 24 // hosts
        got = []
        for host in range(hosts):
            first = alone.row(step) + host * size
            got.append(config.open(24, state).block(first, size))
        joined = {name: np.concatenate([block[name] for block in got]) for name in got[0]}
        same(joined, alone.block(24 * step, 24))


def trace(config, opened, rows) -> list[tuple[str, int]]:
    """(component, document) of the slots of rows, whoever planned them."""
    found = []
    for row in rows:
        packed = mixture._at(opened._eras, row)[1]
        slots = packed.plan.rows([row])
        names = [c.title for c in packed.config.components]
        found += [(names[n], i) for n, i, b in zip(
            slots.source_S.tolist(), slots.index_S.tolist(), slots.begin_S.tolist(), strict=True)
            if b == 0]  # fmt: skip
    return found


def test_a_changed_mixture_repeats_and_skips_nothing(tmp_path):
    """Images get another weight, texts leave, videos come; a checkpoint within the window in which
    it happened goes on just so, and texts go on later where they were."""
    config = two(tmp_path, length=120)
    first = config.open(4)
    state = saved(first, 5)
    assert state["cursor"]["row"] < state["row"]  # in the middle of a window
    image, text = config.components
    video = mixture.Component(str(tmp_path / "video"), name="clips")
    changed = dataclasses.replace(
        config, components=(video, dataclasses.replace(image, weight=1.0))
    )
    second = changed.open(4, state)
    end = mixture._at(first._eras, 20)[1].plan.after(20).row
    for row in range(20, end):  # the window is given to its end
        same(second.dataset[row], first.dataset[row])
    again = changed.open(4, saved(second, 5))
    later = changed.open(4, saved(second, 40))
    for row in range(20, 240):
        same(again.dataset[row], second.dataset[row])
        if row >= 160:
            same(later.dataset[row], second.dataset[row])
    start = mixture._at(second._eras, 240)[1].plan.after(240).row
    given = trace(config, first, range(end)) + trace(changed, second, range(end, start))
    for title in (image.title, "clips"):
        counts = np.bincount([i for name, i in given if name == title], minlength=50)
        assert counts.max() - counts.min() <= 1 and counts.max() > 1
    back = dataclasses.replace(config, components=(text, image, video))
    third = back.open(4, saved(second, 60))
    stop = mixture._at(third._eras, start + 200)[1].plan.after(start + 200).row
    given = trace(config, first, range(end)) + trace(back, third, range(start, stop))
    counts = np.bincount([i for name, i in given if name == text.title], minlength=50)
    assert counts.max() - counts.min() <= 1
    with pytest.raises(ValueError, match="data.length is 96, the run has 120; begin another run w"):
        dataclasses.replace(config, length=96).open(4, state)


def test_another_batch_goes_on_with_the_next_row(tmp_path):
    config = two(tmp_path, schedule=(mixture.Stage(20, (0.0, 1.0)),))
    first = config.open(4)
    state = saved(first, 7)
    second = config.open(6, state)
    assert second.row(7) == 28 and second.row(8) == 34
    end = mixture._at(first._eras, 28)[1].plan.after(28).row
    for row in range(28, end):
        same(second.dataset[row], first.dataset[row])
    third = config.open(6, saved(second, 30))
    assert third.row(30) == 28 + 23 * 6
    for row in range(third.row(30), third.row(40)):
        same(third.dataset[row], second.dataset[row])
        assert (third.dataset[row]["tokens"] < 256 + 3).any()
    # from step 20 on (and the next window) there is nothing but text
    late = range(second.row(20) + 20, second.row(20) + 60)
    assert {name for name, _ in trace(config, second, late)} == {config.components[1].title}


def test_a_schedule_changes_the_shares_at_its_steps(tmp_path):
    stages = (mixture.Stage(0, (1.0, 0.0)), mixture.Stage(50, (1.0, 1.0)),
              mixture.Stage(100, (1.0, 4.0)))  # fmt: skip
    config = two(tmp_path, schedule=stages)
    opened = config.open(4)
    shares = []
    for begin, end in ((0, 48), (60, 98), (110, 300)):
        placed = np.array([
            [taken.placed for taken in mixture._at(opened._eras, 0)[1].plan.cursor(4 * s).sources]
            for s in (begin, end)
        ])  # fmt: skip
        counts = placed[1] - placed[0]
        shares.append(counts[0] / counts.sum())
    np.testing.assert_allclose(shares, [1.0, 0.5, 0.2], atol=0.03)
    epochs = [opened.figures(step)[f"epochs/{config.components[1].title}"] for step in (40, 300)]
    assert epochs[0] == 0 and epochs[1] > 1


def test_truncated_captions_and_their_end(tmp_path):
    vocabulary.save_ranks(RANKS, tmp_path / "vocab.tiktoken")
    make_store(tmp_path / "image", "image", [300] * 5, 0, 1)
    for name in ("caption_first", "caption_last"):
        component = mixture.Component(str(tmp_path / "image"), documents.Layout(name))
        config = mixture.Mixture((component,), str(tmp_path / "vocab.tiktoken"), codes=64,
                                 length=100, too_long="truncate")  # fmt: skip
        report = config.report(5)
        assert report[f"truncated/{component.title}"] > 0
        assert report[f"dropped/{component.title}"] == 0
        row = config.rows()[0]
        assert (row["segments"] == 1).all() and row["targets"][-1] == VOCAB.eos
        assert row["weights"][-1] == (1.0 if name == "caption_first" else 0.0)
        (image,) = [p for p in VOCAB.parse(row["tokens"]) if isinstance(p, vocabulary.Image)]
        assert image.codes_hw.size


def test_conversations_are_taught_their_answers(tmp_path):
    text = np.arange(10, 21, dtype=np.uint32)
    document = store.Document("", text, np.zeros((1, 1, 1), np.uint16),
                              turns=np.array([2, 3, 1, 4, 1]))  # fmt: skip
    layout = documents.Layout("chat", weights=documents.Weights.understanding())
    ids, weights = documents.build(document, layout, VOCAB)
    block = VOCAB.image_block(np.zeros((1, 1), int)).tolist()
    assert ids.tolist() == [VOCAB.bos, 10, 11, *block, 12, 13, 14, 15, VOCAB.eos,
                            16, 17, 18, 19, 20, VOCAB.eos]  # fmt: skip
    taught = [15, VOCAB.eos, 20, VOCAB.eos]
    assert [i for i, w in zip(ids.tolist(), weights.tolist(), strict=True) if w] == taught


def test_a_part_that_turns_unreadable(tmp_path, capsys):
    """Stop with its name, or leave its documents' places empty and count them."""
    config = two(tmp_path)
    images, text = config.components
    named = dataclasses.replace(images, name="images")
    want = dataclasses.replace(config, components=(named, text)).open(8).block(0, 8)
    shutil.copytree(tmp_path / "image", tmp_path / "bad")
    shard = store.part_path(tmp_path / "bad", 1, 2) / "codes" / "c" / "0" / "0"
    damaged = bytearray(shard.read_bytes())
    damaged[3] ^= 1
    shard.write_bytes(damaged)
    bad = dataclasses.replace(named, store=str(tmp_path / "bad"))
    config = dataclasses.replace(config, components=(bad, text))
    with pytest.raises(store.StoreError, match="part-00001-of-00002 is damaged"):
        config.open(8).block(0, 8)
    opened = dataclasses.replace(config, unreadable="skip").open(8)
    got = opened.block(0, 8)
    lost = (got["weights"] == 0) & (want["weights"] > 0)
    assert lost.any()
    kept = ~lost & (want["weights"] > 0)
    for name in ("tokens", "targets", "weights"):
        np.testing.assert_array_equal(got[name][kept], want[name][kept])
    for name in ("segments", "positions"):
        np.testing.assert_array_equal(got[name], want[name])
    assert (got["targets"][lost] == VOCAB.pad).all()
    assert opened.figures(1)["unreadable"] > 0
    assert capsys.readouterr().err.count("skipped: ") == 1


def test_a_cursor_opens_far_out_in_a_large_store_at_once():
    """Step 1,000,000 over 100 million documents: no pass over what came before."""
    lengths_N = np.full(100_000_000, 300, np.int16)
    lengths_N[::3] = 900
    source = packing.Source("s", lengths_N, np.broadcast_to(np.int16(0), lengths_N.shape), seed=1)
    taken = packing.Taken(taken=1_300_000_000, placed=1)
    cursor = packing.Cursor(7_812_500, 1_000_000_000, 0, (taken,))
    assert len(json.dumps(dataclasses.asdict(cursor))) < 300
    begin = time.process_time()
    plan = packing.Plan([source], [packing.Stage(0, (1.0,))], 5120, cursor=cursor)
    slots = plan.rows(range(cursor.row, cursor.row + 64))
    assert time.process_time() - begin < 2.0
    assert len(set(slots.row_S.tolist())) == 64 and slots.index_S.max() < 100_000_000


def test_memory_does_not_grow_with_the_rows():
    source = packing.Source("s", np.full(50, 33), np.zeros(50, int))
    plan = packing.Plan([source], [packing.Stage(0, (1.0,))], 64, window=1)
    want = plan.rows(range(5)).index_S.tolist()
    plan.cursor(2_100)
    assert len(plan._cursors) <= 1024 and len(plan._recent) <= 4
    assert plan.rows(range(5)).index_S.tolist() == want  # planned again


def test_settings_that_cannot_be(tmp_path):
    config = two(tmp_path)
    component = config.components[0]
    with pytest.raises(ValueError, match="two components are .*image .caption_first.; give each"):
        dataclasses.replace(config, components=(component, component)).rows()
    for steps in ((5, 5), (-1,)):
        stages = tuple(mixture.Stage(step, (1.0, 1.0)) for step in steps)
        with pytest.raises(ValueError, match="schedule's steps .* do not rise; give each stage a"):
            dataclasses.replace(config, schedule=stages).rows()
    with pytest.raises(ValueError, match="stage at step 3 has 1 weights for 2 components; give"):
        dataclasses.replace(config, schedule=(mixture.Stage(3, (1.0,)),)).rows()
    with pytest.raises(ValueError, match="from row 3 on all weights are 0; let one be positive"):
        dataclasses.replace(config, schedule=(mixture.Stage(3, (0.0, 0.0)),)).rows()
    with pytest.raises(ValueError, match="unreadable 'ignore' is none of stop, skip"):
        dataclasses.replace(config, unreadable="ignore").rows()
    with pytest.raises(ValueError, match="has 50 texts without image; take layout 'text' for"):
        wrong = dataclasses.replace(config.components[1], layout=documents.Layout())
        dataclasses.replace(config, components=(wrong,)).rows()
