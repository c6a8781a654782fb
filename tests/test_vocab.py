"""The vocabulary against independent constructions: Emu3's published ids, a BPE and blocks written
out by hand, and a grammar that lists a document token by token."""

import hashlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu3_jax import bpe, vocab

CAPTIONS = [
    "a red apple on a table",
    "a green apple, a red chair",
    "woman's face: medium-dark skin tone (2023)",
    "man\u2019s face: light skin tone",
    "IT'S 90*90 24fps 5s\n\n\u732b\u3068\u72ac na\u00efve caf\u00e9  \t end ",
    "aaaa aaaaaaa abcabcabc ababab",
] * 3
EXTRA = 205


@pytest.fixture(scope="module")
def emu3() -> vocab.Vocab:
    return vocab.Vocab.emu3()


@pytest.fixture(scope="module")
def small() -> vocab.Vocab:
    return vocab.Vocab(vocab.train_bpe(CAPTIONS, 330), codes=64)


def test_emu3_ids_are_the_published_ones(emu3):
    published = {
        151643: "<|endoftext|>",
        151644: "<|im_start|>",
        151645: "<|im_end|>",
        151646: "<|extra_0|>",
        151846: "<|extra_200|>",
        151847: "<|extra_201|>",
        151848: "<|extra_202|>",
        151849: "<|extra_203|>",
        151850: "<|extra_204|>",
        151851: "<|image token|>",
        151852: "<|image start|>",
        151853: "<|image end|>",
        151854: "<|visual token 000000|>",
        184621: "<|visual token 032767|>",
    }
    for i, name in published.items():
        assert emu3.decode([i]) == name
        assert emu3.encode(name, specials=True) == [i]
    assert (emu3.size, emu3.text_size, emu3.codes) == (184_622, 151_643, 32_768)
    assert emu3.ids == vocab.Ids(
        pad=151643,
        bos=151849,
        eos=151850,
        eol=151846,
        eof=151847,
        img=151851,
        boi=151852,
        eoi=151853,
        visual=151854,
        codes=32768,
    )
    assert emu3.encode("0123456789*") == [*range(15, 25), 9]
    assert emu3.encode("90*90") == [24, 15, 9, 24, 15]


def test_emu3_segments_text_as_lowest_rank_first_joining_does(emu3):
    for text in CAPTIONS[:6] + [
        "foo_bar (closeup) https://a.b/c?d=1 !!!\n",
        "\U0001f9d1\U0001f3fd",
    ]:
        assert emu3.encode(text) == _encode_slowly(emu3.ranks, text)


def test_text_is_normalised_to_nfc(emu3, small):
    for words in (emu3, small):
        assert words.encode("cafe\u0301") == words.encode("caf\u00e9")
        assert words.decode(words.encode("cafe\u0301")) == "caf\u00e9"


def test_special_strings_in_text_are_data_unless_asked_for(small):
    text = "a <|extra_203|> b <|visual token 000003|>"
    data = small.encode(text)
    assert max(data) < small.text_size
    assert small.decode(data) == text
    assert small.parse(data)[0] == vocab.Text(text)
    controls = small.encode(text, specials=True)
    assert [i for i in controls if i >= small.text_size] == [small.bos, small.visual + 3]
    assert small.decode(controls) == text


def test_small_vocabulary_has_the_same_layout(small):
    text = small.text_size
    assert text == 330 and small.size == text + 211 + 64
    assert (small.pad, small.eol, small.eof) == (text, text + 203, text + 204)
    assert (small.bos, small.eos) == (text + 206, text + 207)
    assert (small.img, small.boi, small.eoi) == (text + 208, text + 209, text + 210)
    assert small.visual == text + 3 + EXTRA + 3
    assert small.decode([small.size - 1]) == "<|visual token 000063|>"


def test_ids_outside_the_vocabulary_are_refused(small):
    for bad in (-1, small.size):
        with pytest.raises(ValueError, match=f"id {bad} is outside the vocabulary of 605 ids"):
            small.decode([bad])
    with pytest.raises(ValueError, match="a vocabulary of 0 visual codes; use 1 to 1,000,000"):
        vocab.Vocab(small.ranks, codes=0)


def test_long_runs_of_blanks_do_not_break_the_encoder(small):
    text = "a" + " " * 1_000_000 + "b"
    assert small.decode(small.encode(text)) == text


def test_trained_bpe_is_segmented_alike_by_tiktoken(small):
    rng = random.Random(0)
    letters = "ab crt'S9\u00e9\u732b\n-(" + "".join(CAPTIONS[:4])
    texts = CAPTIONS[:6] + ["".join(rng.choices(letters, k=60)) for _ in range(200)]
    for text in texts:
        assert small.encode(text) == _encode_slowly(small.ranks, text)


def test_training_takes_the_most_frequent_join_and_breaks_ties_by_bytes():
    ranks = vocab.train_bpe(["cd cd cd ab ab", "ab zz zz"], 260)
    assert [ranks[bytes([byte])] for byte in range(256)] == list(range(256))
    # Pieces carry their leading blank: "cd" x1, " cd" x2, " ab" x2, "ab" x1, " zz" x2.
    assert list(ranks)[256:] == [b"ab", b"cd", b" ab", b" cd"]
    assert vocab.train_bpe(["b a", "a b"] * 9, 300) == vocab.train_bpe(["a b", "b a"] * 9, 300)


def test_training_stops_when_nothing_repeats():
    assert len(vocab.train_bpe(["xyz"], 1000)) == 256
    with pytest.raises(ValueError, match="vocabulary of 255 is too small; ask for 256 or more"):
        vocab.train_bpe(["x"], 255)


def test_ranks_file_round_trip_and_fingerprint(small, tmp_path):
    path = tmp_path / "a" / "vocab.tiktoken"
    vocab.save_ranks(small.ranks, path)
    again = vocab.Vocab.load(path, codes=64)
    assert again.ranks == small.ranks
    assert again.fingerprint == small.fingerprint
    assert len(small.fingerprint) == 64
    assert vocab.Vocab.load(path, codes=65).fingerprint != small.fingerprint
    swapped = dict(small.ranks)
    swapped[b"a"], swapped[b"b"] = swapped[b"b"], swapped[b"a"]
    assert vocab.Vocab(swapped, codes=64).fingerprint != small.fingerprint


def test_wrong_hash_names_both(tmp_path):
    path = tmp_path / "ranks.tiktoken"
    path.write_bytes(b"IQ== 0\n")
    found = hashlib.sha256(b"IQ== 0\n").hexdigest()
    with pytest.raises(ValueError) as error:
        vocab.Vocab.load(path, sha256=bpe.EMU3_SHA256)
    assert str(error.value) == (
        f"ranks file {path} has sha256 {found}, expected {bpe.EMU3_SHA256}; "
        "delete it to have it fetched again, or give the right file"
    )
    kept = tmp_path / "dashscope-2.0.2" / bpe.EMU3_MEMBER
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"IQ== 0\n")
    with pytest.raises(ValueError, match=f"has sha256 {found}, expected {bpe.EMU3_SHA256}"):
        vocab.Vocab.emu3(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("IQ==\n", "is not in tiktoken's format"),
        ("I 0\n", "is not in tiktoken's format"),
        ("IQ== 0\n", "lacks 255 of the 256 single bytes"),
        ("twice", "has 257 lines but not each rank 0..256 once"),
    ],
)
def test_broken_ranks_files(tmp_path, content, message):
    path = tmp_path / "ranks.tiktoken"
    vocab.save_ranks({bytes([byte]): byte for byte in range(256)}, path)
    path.write_text(path.read_text() + "YWI= 255\n" if content == "twice" else content)
    with pytest.raises(ValueError, match=message):
        vocab.Vocab.load(path)
    with pytest.raises(ValueError, match="no ranks file .*nowhere; give the path of a .tiktoken"):
        vocab.Vocab.load(tmp_path / "nowhere")


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (3, 2), (4, 5), (12, 10)])
def test_image_block_round_trip(small, shape):
    codes_hw = np.random.default_rng(0).integers(0, 64, shape)
    block = small.image_block(codes_hw)
    assert block.dtype == np.int32 and block.ndim == 1
    expected = [small.boi, *small.encode(f"{shape[0]}*{shape[1]}"), small.img]
    for row in codes_hw.tolist():
        expected += [small.visual + code for code in row] + [small.eol]
    assert block.tolist() == expected + [small.eof, small.eoi]
    (piece,) = small.parse(block)
    assert isinstance(piece, vocab.Image)
    np.testing.assert_array_equal(piece.codes_hw, codes_hw)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 1), (1, 3, 4), (5, 2, 2)])
@pytest.mark.parametrize("fps", [24, 12.5, 29.97])
def test_video_block_round_trip(small, shape, fps):
    codes_thw = np.random.default_rng(0).integers(0, 64, shape)
    block = small.video_block(codes_thw, fps)
    frames = []
    for frame in codes_thw.tolist():
        for row in frame:
            frames += [small.visual + code for code in row] + [small.eol]
        frames.append(small.eof)
    assert block.tolist()[-len(frames) - 2 :] == [small.img, *frames, small.eoi]
    (piece,) = small.parse(block)
    assert isinstance(piece, vocab.Video) and piece.fps == fps
    np.testing.assert_array_equal(piece.codes_thw, codes_thw)


def test_block_text_is_the_text_encoders_own(emu3):
    block = emu3.image_block(np.zeros((90, 90), np.int64)).tolist()
    assert block[:7] == [151852, 24, 15, 9, 24, 15, 151851]
    assert len(block) == 7 + 90 * 91 + 2
    block = emu3.video_block(np.zeros((30, 2, 3), np.int64), 24).tolist()
    assert emu3.decode(block[1 : block.index(151851)]) == "2*3 24fps 5s"


def test_parse_gives_the_pieces_of_a_document_in_order(small):
    image = small.image_block(np.array([[1, 2], [3, 4]])).tolist()
    clip = small.video_block(np.array([[[5]], [[6]]]), 8).tolist()
    ids = [small.bos, *small.encode("two: "), *image, *clip, *small.encode(" end"), small.eos]
    text, picture, video, end = small.parse(ids + [small.pad] * 3)
    assert (text, end) == (vocab.Text("two: "), vocab.Text(" end"))
    assert picture.codes_hw.tolist() == [[1, 2], [3, 4]]
    assert video.codes_thw.tolist() == [[[5]], [[6]]]
    assert small.parse([]) == []


def test_malformed_blocks_name_their_place(small):
    def refused(ids, message):
        with pytest.raises(ValueError, match=message) as error:
            small.parse([small.bos, *ids])
        assert "\n" not in str(error.value)

    good = small.image_block(np.array([[1, 2], [3, 4]])).tolist()
    img = good.index(small.img)
    refused(good[:-1], "block at position 1: no <.image end.> follows")
    refused(good[:img] + good[img + 1 :], "no <.image token.> follows")
    refused(good[: img + 1] + good[img + 2 :], "7 ids from img to eoi; a frame of 2.2 takes 7"[2:])
    refused(good[:1] + small.encode("0*2") + good[img:], "its size reads '0.2'")
    refused(good[:1] + small.encode("big") + good[img:], "its size reads 'big', not 'h.w' or")
    refused(good[:1] + small.encode("2*2" * 30) + good[img:], "its size reads 'too long'")
    refused(good[:1] + small.encode("2*2 1.1.1fps 5s") + good[img:], "frame rate reads '1.1.1'")
    refused([small.boi, *good], "its size reads")
    for at, wrong, message in [
        (img + 1, small.eol, "an id among its codes is no visual code"),
        (img + 1, small.size, "an id among its codes is no visual code"),
        (img + 3, small.visual, "row ends or frame ends are not where 2.2 puts them"),
        (img + 7, small.eol, "row ends or frame ends are not where 2.2 puts them"),
    ]:
        refused(good[:at] + [wrong] + good[at + 1 :], message)
    twice = good[: img + 1] + good[img + 1 : -1] * 2 + good[-1:]
    refused(twice, "14 ids from img to eoi; a frame of 2.2 takes 7")
    for stray in (small.visual, small.eol, small.eof, small.eoi, small.img):
        refused([stray], "at position 1 stands outside an image or video block")


def test_wrong_grids_are_refused(small):
    for codes in (np.zeros((2,), int), np.zeros((0, 2), int), np.zeros((2, 2))):
        with pytest.raises(ValueError, match="are no grid of codes; give integers .h, w., none"):
            small.image_block(codes)
    for codes in ([[64]], [[-1]]):
        with pytest.raises(ValueError, match="do not fit this vocabulary's 64 codes"):
            small.image_block(np.array(codes))
    with pytest.raises(ValueError, match="a frame rate of 0 frames a second; use 0.01 to 1000"):
        small.video_block(np.zeros((1, 1, 1), int), 0)


def _listed_grammar(ids: vocab.Ids, height: int, width: int, frames: int) -> list[range]:
    """What may stand after img, one entry a position, by walking through the document."""
    visual = range(ids.visual, ids.visual + ids.codes)
    listed = []
    for _ in range(frames):
        for _ in range(height):
            listed += [visual] * width + [range(ids.eol, ids.eol + 1)]
        listed.append(range(ids.eof, ids.eof + 1))
    tail = [ids.eoi, ids.eos, ids.pad, ids.pad, ids.pad, ids.pad]
    return listed + [range(i, i + 1) for i in tail]


GRIDS = [(1, 1, 1), (1, 2, 1), (1, 3, 1), (2, 1, 1), (3, 2, 1), (3, 4, 1), (2, 1, 3), (1, 2, 2)]
# Any layout works, for example one with few extras and its controls elsewhere.
UNUSUAL = vocab.Ids(40, 53, 54, 51, 52, 55, 56, 57, 58, 64)


@pytest.mark.parametrize("grid", GRIDS)
def test_legal_range_lists_the_document(small, grid):
    height, width, frames = grid
    traced = jax.jit(lambda ids_n, h, w, f: vocab.legal_range(UNUSUAL, ids_n, h, w, f))
    for ids in (small.ids, UNUSUAL):
        listed = _listed_grammar(ids, height, width, frames)
        offsets = range(1, len(listed) + 1)
        for offset, legal in zip(offsets, listed, strict=True):
            assert vocab.legal_range(ids, offset, height, width, frames) == (
                legal.start,
                legal.stop,
            )
    low_n, high_n = traced(jnp.arange(1, len(listed) + 1), height, width, frames)
    assert low_n.dtype == jnp.int32
    assert low_n.tolist() == [legal.start for legal in listed]
    assert high_n.tolist() == [legal.stop for legal in listed]


def test_a_written_block_obeys_its_own_grammar(small):
    for codes_thw in (np.ones((1, 3, 2), int), np.ones((1, 1, 1), int), np.ones((1, 2, 5), int)):
        _, height, width = codes_thw.shape
        block = small.image_block(codes_thw[0]).tolist()
        after = block[block.index(small.img) + 1 :] + [small.eos, small.pad]
        for offset, i in enumerate(after, start=1):
            low, high = vocab.legal_range(small.ids, offset, height, width)
            assert low <= i < high


def _encode_slowly(ranks: dict[bytes, int], text: str) -> list[int]:
    """Byte-level BPE as its definition says, with Qwen's cutting rule written down again."""
    import unicodedata

    import regex

    rule = (
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
        r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
    )
    ids = []
    for piece in regex.findall(rule, unicodedata.normalize("NFC", text)):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            pairs = [(ranks.get(parts[i] + parts[i + 1]), i) for i in range(len(parts) - 1)]
            known = [pair for pair in pairs if pair[0] is not None]
            if not known:
                break
            _, i = min(known)
            parts = parts[:i] + [parts[i] + parts[i + 1]] + parts[i + 2 :]
        ids += [ranks[part] for part in parts]
    return ids
