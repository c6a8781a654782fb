"""The token store: round trips, parts that are missing, cut, flipped or made for something else."""

import json
import pathlib

import numpy as np
import pytest

from data_pipelines import checksum, parts, shuffle, store

MADE = store.Fingerprints("a" * 64, "b" * 64, "c" * 64)


def make_documents(count, seed=0):
    rng = np.random.default_rng(seed)
    documents = []
    for i in range(count):
        shape = ((1, 3, 4), (1, 1, 2), (5, 2, 2))[i % 3]
        text = rng.integers(0, 200_000, rng.integers(0, 9)).astype(np.uint32)
        codes_thw = None if i % 7 == 6 else rng.integers(0, 1 << 16, shape).astype(np.uint16)
        fps = 12.5 if codes_thw is not None and shape[0] > 1 else 0.0
        documents.append(store.Document(f"key {i} ü", text, codes_thw, fps))
    return documents


def write_store(directory, documents, count=3, made=MADE):
    for p in range(count):
        parts.write(store.part_path(directory, p, count), documents[p::count], made, skipped=p)
    assert store.finish(directory, count, "source", "CC0")
    return [d for p in range(count) for d in documents[p::count]]


def test_documents_come_back_in_any_order(tmp_path):
    written = write_store(tmp_path, make_documents(50))
    opened = store.Store(tmp_path, MADE.vocabulary, MADE.tokenizer)
    order = np.random.default_rng(1).integers(0, 50, 200)
    for i, document in zip(order, opened.read(order), strict=True):
        np.testing.assert_array_equal(document.text, written[i].text)
        assert document.kind == written[i].kind
        assert document.fps == written[i].fps
        if document.codes_thw is not None:
            np.testing.assert_array_equal(document.codes_thw, written[i].codes_thw)
            assert document.codes_thw.dtype == np.uint16
    assert opened.keys() == [d.key for d in written]
    assert opened.text_length_N.tolist() == [len(d.text) for d in written]
    assert opened.read([]) == []
    opened.verify()
    info = json.loads((tmp_path / "store.json").read_text())
    assert info["documents"] == len(opened) == 50
    assert (info["skipped"], info["licence"], info["parts"]) == (3, "CC0", 3)


def test_store_of_text_alone_and_part_without_documents(tmp_path):
    texts = [store.Document(str(i), np.arange(i, dtype=np.uint32)) for i in range(4)]
    made = store.Fingerprints("a" * 64)
    parts.write(store.part_path(tmp_path, 0, 2), [], made)
    parts.write(store.part_path(tmp_path, 1, 2), texts, made)
    store.finish(tmp_path, 2, "source", "")
    opened = store.Store(tmp_path, "a" * 64, "b" * 64)
    assert [len(d.text) for d in opened.read([3, 0, 1])] == [3, 0, 1]


def test_part_counts_only_when_its_json_is_there(tmp_path):
    write_store(tmp_path, make_documents(9))
    (tmp_path / "store.json").unlink()
    path = store.part_path(tmp_path, 1, 3)
    (path / "part.json").unlink()
    assert not parts.is_complete(path, MADE)
    assert not store.finish(tmp_path, 3, "source", "CC0")
    with pytest.raises(store.StoreError, match="is incomplete: 2 of 3 parts are written; run its"):
        store.Store(tmp_path)
    parts.write(path, make_documents(3), MADE)
    assert parts.is_complete(path, MADE) and store.finish(tmp_path, 3, "source", "CC0")
    store.Store(tmp_path).verify()


def test_other_fingerprints_are_named(tmp_path):
    write_store(tmp_path, make_documents(9))
    with pytest.raises(store.StoreError) as error:
        store.Store(tmp_path, "a" * 64, "d" * 64)
    assert str(error.value) == (
        f"store {tmp_path} was made with tokenizer bbbbbbbbbbbb, this run has tokenizer "
        "dddddddddddd; use that tokenizer, remove the store or take another directory"
    )
    with pytest.raises(
        store.StoreError, match="vocabulary aaaaaaaaaaaa, this run has vocabulary d"
    ):
        store.Store(tmp_path, "d" * 64)
    path = store.part_path(tmp_path, 0, 3)
    with pytest.raises(
        store.StoreError, match="with source cccccccccccc, this run has source dddd"
    ):
        parts.is_complete(path, store.Fingerprints("a" * 64, "b" * 64, "d" * 64))


def test_missing_and_empty_stores_are_named(tmp_path):
    with pytest.raises(store.StoreError, match="x does not exist; run its encode job first"):
        store.Store(tmp_path / "x")
    with pytest.raises(store.StoreError, match="is no token store: no store.json, no parts"):
        store.Store(tmp_path)
    parts.write(store.part_path(tmp_path, 0, 1), [], MADE)
    store.finish(tmp_path, 1, "source", "")
    with pytest.raises(store.StoreError, match="holds no documents"):
        store.Store(tmp_path)
    info = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps(info | {"schema": 99}))
    with pytest.raises(store.StoreError, match="has schema 99, this code reads 3; remove it and e"):
        store.Store(tmp_path)


def test_truncated_or_missing_part_is_found_on_opening(tmp_path):
    write_store(tmp_path, make_documents(30))
    shard = store.part_path(tmp_path, 1, 3) / "codes" / "c" / "0" / "0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(
        store.StoreError,
        match=rf"00001-of-00003 is damaged: codes/c/0/0 has {len(whole) - 5} bytes of {len(whole)}",
    ):
        store.Store(tmp_path)
    (shard.parents[3] / "part.json").unlink()
    with pytest.raises(store.StoreError, match="lacks part-00001-of-00003; run its encode job"):
        store.Store(tmp_path)


def flip(path: pathlib.Path, at: int):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_flipped_bit_is_found_on_reading_and_by_verify(tmp_path):
    write_store(tmp_path, make_documents(30))
    flip(store.part_path(tmp_path, 2, 3) / "codes" / "c" / "0" / "0", 3)
    opened = store.Store(tmp_path)
    with pytest.raises(store.StoreError, match="part-00002-of-00003 is damaged: .*; remove it and"):
        opened.read(range(30))
    with pytest.raises(store.StoreError, match="part-00002-of-00003 is damaged"):
        opened.verify()


def test_verify_compares_with_the_part_json(tmp_path):
    write_store(tmp_path, make_documents(30))
    path = store.part_path(tmp_path, 0, 3) / "part.json"
    info = json.loads(path.read_text())
    info["crc32c"]["text"] = "00000000"
    path.write_text(json.dumps(info))
    with pytest.raises(store.StoreError, match="text has crc32c [0-9a-f]{8}, part.json says 0000"):
        store.Store(tmp_path).verify()


def test_what_does_not_fit_is_refused(tmp_path):
    text = np.zeros(1, np.uint32)
    with pytest.raises(ValueError, match="a: code 70000 does not fit the store's uint16"):
        parts.write(tmp_path / "p", [store.Document("a", text, np.full((1, 1, 1), 70000))], MADE)
    with pytest.raises(ValueError, match="has a newline; give the document another key"):
        parts.write(tmp_path / "p", [store.Document("a\nb", text)], MADE)


def test_crc32c_is_the_standard_one():
    assert checksum.crc32c(b"123456789") == 0xE3069283
    assert checksum.crc32c(b"") == 0
    assert checksum.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert checksum.crc32c(b"\xff" * 32) == 0x62A8AB43
    long = np.random.default_rng(0).integers(0, 1 << 16, 9999, np.uint16)
    state = 0xFFFFFFFF
    for byte in long.tobytes():
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    assert checksum.crc32c(long) == state ^ 0xFFFFFFFF


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 1000])
def test_permutations_hold_every_index_once_and_differ_by_key(size):
    orders = [shuffle.permute(np.arange(size), size, key).tolist() for key in range(8)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    if size > 3:
        assert len({tuple(order) for order in orders}) > 4
    assert shuffle.permute(size - 1, size, 3)[0] == orders[3][size - 1]
