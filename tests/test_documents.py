"""Emu3's document layouts, id by id, and the weight of each id."""

import numpy as np
import pytest

from data_pipelines import documents, parts, store
from emu3_jax import vocab as vocabulary


@pytest.fixture(scope="module")
def vocab():
    return vocabulary.Vocab({bytes([i]): i for i in range(256)}, codes=64)


def image(caption="ab", h=2, w=3):
    codes_thw = (np.arange(h * w, dtype=np.uint16) % 64).reshape(1, h, w)
    return store.Document(
        "", np.frombuffer(caption.encode(), np.uint8).astype(np.uint32), codes_thw
    )


def ascii_ids(text):
    return list(text.encode())


def expected_block(v, h=2, w=3):
    rows = [[v.visual + r * w + c for c in range(w)] + [v.eol] for r in range(h)]
    return [v.boi, *ascii_ids(f"{h}*{w}"), v.img, *sum(rows, []), v.eof, v.eoi]


def test_text_to_image(vocab):
    ids, weights = documents.build(image(), documents.Layout("caption_first"), vocab)
    assert ids.tolist() == [vocab.bos, *ascii_ids("ab"), *expected_block(vocab), vocab.eos]
    row = [0.5, 0.5, 0.5, 0.5]  # three codes and EOL
    head = [1.0] * 5  # boi 2 * 3 img
    assert weights.tolist() == [0, 1, 1, *head, *row, *row, 0.5, 1, 1]
    assert ids.dtype == np.int32 and weights.dtype == np.float32


def test_image_to_text(vocab):
    ids, weights = documents.build(image(), documents.Layout("caption_last"), vocab)
    assert ids.tolist() == [vocab.bos, *expected_block(vocab), *ascii_ids("ab"), vocab.eos]
    assert weights.tolist() == [0] + [1.0] * 5 + [0.5] * 9 + [1.0] * 4


def test_text_alone(vocab):
    document = store.Document("", np.array([5, 6], np.uint32))
    ids, weights = documents.build(document, documents.Layout("text"), vocab)
    assert ids.tolist() == [vocab.bos, 5, 6, vocab.eos]
    assert weights.tolist() == [0, 1, 1, 1]


def test_dropped_caption_keeps_bos_and_does_not_teach_to_end(vocab):
    layout = documents.Layout("caption_first")
    ids, weights = documents.build(image(), layout, vocab, drop_caption=True)
    assert ids.tolist() == [vocab.bos, *expected_block(vocab), vocab.eos]
    assert weights[-1] == 0 and weights[-2] == 1


def test_video_has_a_frame_end_after_each_frame(vocab):
    codes_thw = np.arange(8, dtype=np.uint16).reshape(2, 2, 2)
    document = store.Document("", np.array([7], np.uint32), codes_thw, fps=8.0)
    ids, weights = documents.build(document, documents.Layout(), vocab)
    pieces = vocab.parse(ids)
    np.testing.assert_array_equal(pieces[1].codes_thw, codes_thw)
    assert (ids == vocab.eof).sum() == 2 and (ids == vocab.eol).sum() == 4
    inside = (ids >= vocab.visual) | (ids == vocab.eol) | (ids == vocab.eof)
    assert set(weights[inside]) == {0.5}
    assert set(weights[~inside][1:]) == {1.0} and weights[0] == 0


def test_weights_by_role(vocab):
    weights = documents.Weights(text=2, prompt=9, meta=3, codes=4, breaks=5)
    ids, got = documents.build(
        image("a", 1, 1), documents.Layout("caption_last", weights=weights), vocab
    )
    #                  BOS boi 1  *  1 img c EOL EOF eoi a EOS
    assert got.tolist() == [0, 3, 3, 3, 3, 3, 4, 5, 5, 3, 2, 2]
    assert len(ids) == len(got)


def test_lengths_are_known_without_reading(vocab, tmp_path):
    rng = np.random.default_rng(0)
    stored = [image("x" * int(rng.integers(0, 30)), *rng.integers(1, 13, 2)) for _ in range(40)]
    clip = np.zeros((3, 10, 2), np.uint16)
    stored += [store.Document("", np.arange(3, dtype=np.uint32), clip, fps) for fps in (24.0, 7.5)]
    parts.write(store.part_path(tmp_path, 0, 1), stored, store.Fingerprints("v", "t"))
    store.finish(tmp_path, 1, "", "")
    opened = store.Store(tmp_path)
    for name in ("caption_first", "caption_last"):
        layout = documents.Layout(name)
        built = [documents.build(d, layout, vocab)[0] for d in opened.read(range(42))]
        lengths_N = documents.Writer(opened, layout, vocab).lengths_N
        assert lengths_N[:].tolist() == [len(ids) for ids in built]
    with pytest.raises(ValueError, match="has images or videos; layout 'text' is for text alone"):
        documents.Writer(opened, documents.Layout("text"), vocab)


def test_layout_errors():
    with pytest.raises(
        ValueError, match="layout 'image' is none of caption_first, caption_last, capt"
    ):
        documents.Layout("image").check()
    with pytest.raises(ValueError, match="caption_dropout 1.5 is no share; take 0 to 1"):
        documents.Layout("caption_first", 1.5).check()
    with pytest.raises(
        ValueError, match="caption_dropout 0.1 with layout 'caption_last'; only cap"
    ):
        documents.Layout("caption_last", 0.1).check()
