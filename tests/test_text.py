"""Text files become stores: every document once however they are cut, and what is bad is named."""

import dataclasses
import gzip
import json
import os
import random
import subprocess
import sys
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_pipelines import chat, store, text, text_files
from emu3_jax import vocab as vocabulary

CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "\u732b."}]


@pytest.fixture
def vocab():
    return vocabulary.Vocab({bytes([i]): i for i in range(256)}, codes=16)


def texts(count, seed=0):
    """Lines of 1 to 60 bytes, some of several bytes a character."""
    chance = random.Random(seed)
    return [f"{i} " + "\u732bx"[i % 2] * chance.randint(1, 19) for i in range(count)]


def write_jsonl(path, values, opens=open):
    with opens(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": value}) + "\n" for value in values)


def write_parquet(path, values, rows=7):
    table = pyarrow.table({"id": list(range(len(values))), "text": values})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)


def read(directory, parts, files="*", documents="file", field="text"):
    source = text_files.TextFiles(str(directory), files, field, documents)
    return [record for part in range(parts) for record in source.read(part, parts)]


def config(path, **options):
    settings = dict(texts=str(path), directory=str(path / "store"), files="*.*")
    return text.EncodeText(**settings | options)


def encode(job, vocab):
    source = text_files.TextFiles(job.texts, job.files, job.field, job.documents)
    return text.encode(job, source, job.directory, vocab)


def files(directory) -> dict[str, bytes]:
    """The bytes of all files below a directory."""
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


# Cutting


@pytest.mark.parametrize("parts", [1, 2, 3, 10, 97, 1000, 5000])
@pytest.mark.parametrize("documents", ["line", "blank"])
def test_plain_text_is_cut_between_documents(tmp_path, documents, parts):
    """Each document once, in order, whatever stands between two and wherever parts end."""
    chance, want = random.Random(0), []
    for name in ("a.txt", "b/c.txt", "empty.txt"):
        content = chance.choice(["", "\n", " \r\n\n"])
        for i in range(0 if name == "empty.txt" else 60):
            lines = texts(chance.randint(1, 3), seed=i)
            want += lines if documents == "line" else ["\n".join(lines)]
            content += "\n".join(lines) + chance.choice(["\n\n", "\n \n", "\n\n\n\t\n", "\n\r\n"])
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.rstrip().encode() if name == "a.txt" else content.encode())
    found = read(tmp_path, parts, "**/*.txt", documents)
    assert [record.value for record in found] == want
    keys = [record.key for record in found]
    assert len(set(keys)) == len(want) and {key.partition("@")[0] for key in keys} == {
        "a.txt", "b/c.txt"
    }  # fmt: skip
    for record in found:  # the key tells the byte where a document begins
        name, _, offset = record.key.partition("@")
        assert (tmp_path / name).read_bytes()[int(offset) :].startswith(record.value[:5].encode())


@pytest.mark.parametrize("parts", [1, 3, 40, 999])
def test_every_kind_of_file_is_cut(tmp_path, parts):
    values = texts(150)
    write_jsonl(tmp_path / "1.jsonl", values[:40])
    write_jsonl(tmp_path / "2.jsonl.gz", values[40:70], gzip.open)
    write_parquet(tmp_path / "3.parquet", values[70:110])
    for i, value in enumerate(values[110:]):
        (tmp_path / f"4-{i:02}.txt").write_text(value + "\n")
    found = read(tmp_path, parts)
    assert [record.value for record in found] == values
    assert [record.key for record in found][70:111] == [f"3.parquet@{i}" for i in range(40)] + [
        "4-00.txt"
    ]
    source = text_files.TextFiles(str(tmp_path), "*", "text", "file")
    sizes = [source.size(part, parts) for part in range(parts)]
    assert max(sizes) - min(sizes) <= 1
    if parts == 1:
        for name, members in (("1.jsonl", found[:40]), ("2.jsonl.gz", found[40:70])):
            assert sum(r.size for r in members) == (tmp_path / name).stat().st_size
        parquet = sum(record.size for record in found[70:110])  # without its footer
        assert 0.2 < parquet / (tmp_path / "3.parquet").stat().st_size < 1


def test_files_are_streamed(tmp_path):
    """A part takes a small share of its file's memory, and reads no other's bytes."""
    write_jsonl(tmp_path / "a.jsonl", ["x" * 1000] * 8000)
    source = text_files.TextFiles(str(tmp_path), "*", "text", "file")
    tracemalloc.start()
    assert sum(len(record.value) for record in source.read(0, 1)) == 8_000_000
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    [piece] = source.pieces(5, 8)
    content = bytearray(piece.path.read_bytes())
    content[: piece.begin - 1], content[piece.end + 1100 :] = b"", b""
    hollow = b"\0" * (piece.begin - 1) + content
    piece.path.write_bytes(hollow)
    assert len([record.value for record in source.read(5, 8)]) == 1000


# Stores


def test_a_store_holds_texts_and_conversations(tmp_path, vocab, capsys):
    values = [*texts(20), "ab", "x" * 70, CHAT]
    write_jsonl(tmp_path / "a.jsonl", values[:10])
    write_parquet(tmp_path / "b.parquet", values[10:22])
    write_parquet(tmp_path / "c.parquet", [CHAT])
    job = config(tmp_path, parts=3, min_ids=3, max_ids=69, licence="CC0")
    assert encode(job, vocab)
    opened = store.Store(job.directory, vocab.fingerprint)
    opened.verify()
    assert opened.info["dropped"] == {"short": 1, "long": 1} and opened.info["skipped"] == 0
    assert (opened.info["read_from"], opened.info["licence"]) == (str(tmp_path), "CC0")
    *plain, conversation = opened.read(range(len(opened)))
    assert [vocab.decode(document.text) for document in plain] == values[:20]
    assert all(document.kind == store.TEXT for document in plain)
    ids, turns = chat.conversation(CHAT, vocab, image=False)
    np.testing.assert_array_equal(conversation.text, ids)
    np.testing.assert_array_equal(conversation.turns, turns)
    assert opened.keys()[-2:] == ["b.parquet@9", "c.parquet@0"]
    assert ": 20 documents, 1 long dropped, 1 short dropped\n" in capsys.readouterr().out


def test_stores_are_equal_whatever_the_threads(tmp_path, vocab, monkeypatch, capsys):
    """And after a part was lost; a complete store is left as it is."""
    monkeypatch.setattr(text, "_BATCH", 200)
    write_jsonl(tmp_path / "a.jsonl", texts(200))
    made = []
    for threads in (1, 8):
        monkeypatch.setattr(os, "cpu_count", lambda threads=threads: threads)
        job = config(tmp_path, parts=3, directory=str(tmp_path / f"store{threads}"))
        assert encode(job, vocab)
        made.append(files(tmp_path / f"store{threads}"))
    assert made[0] == made[1] and len(made[0]) > 20
    (store.part_path(job.directory, 1, 3) / "part.json").unlink()
    assert encode(job, vocab) and files(tmp_path / "store8") == made[0]
    before = capsys.readouterr().out
    assert "(3 of 3 parts here)" not in before
    encode(job, vocab)
    assert capsys.readouterr().out == f"{tmp_path / 'store8'}: encoded (3 of 3 parts here)\n"


def test_workers_divide_the_parts(tmp_path, vocab):
    write_jsonl(tmp_path / "a.jsonl", texts(50))
    assert encode(config(tmp_path, parts=5, directory=str(tmp_path / "one")), vocab)
    job = config(tmp_path, parts=5, workers=2, directory=str(tmp_path / "two"))
    assert not encode(dataclasses.replace(job, worker=1), vocab)
    parts = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert parts == ["part-00001-of-00005", "part-00003-of-00005"]
    assert encode(job, vocab)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    with pytest.raises(ValueError, match="worker 2 of workers 2; they are counted from 0"):
        encode(dataclasses.replace(job, worker=2), vocab)


def test_the_command(tmp_path, vocab):
    write_jsonl(tmp_path / "a.jsonl", texts(5))
    vocabulary.save_ranks(vocab.ranks, tmp_path / "ranks.tiktoken")
    flags = dict(texts=tmp_path, vocab=tmp_path / "ranks.tiktoken", codes=16, parts=2)
    command = [sys.executable, "-m", "emu3_jax.launch", "--config=configs/text.py"]
    command += [f"--config.{name}={value}" for name, value in flags.items()]
    command += [f"--config.directory={tmp_path / 'store'}", "--config.files=*.jsonl"]
    subprocess.run(command, check=True)
    assert len(store.Store(tmp_path / "store", vocab.fingerprint)) == 5


def test_progress_tells_rates_and_the_time_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(text.time, "time", lambda: now[0])
    progress = text._Progress("store", "bytes", 4000)
    for now[0] in (1.0, 2.0, 8.0):
        progress.add(1000, 500)
    assert capsys.readouterr().out == (
        "store  3 documents  188 ids/s  75% of 4,000 bytes  0:03 left\n"
    )


# Bad input


def bad_jsonl(directory):
    lines = [json.dumps({"text": value}).encode() for value in texts(12)]
    lines[2] = b'{"text": "cut off'
    lines[3] = b'{"text": "\xff"}'
    lines[4] = b'{"body": "a", "id": 1}'
    lines[5] = b'{"text": " \\n"}'
    lines[6] = b'{"text": "\\ud800"}'
    lines[7] = b'{"text": 7}'
    lines[8] = b"[1]"
    lines[9] = b'{"text": [{"role": "user", "content": "a"}]}'
    lines[10] = b""
    (directory / "a.jsonl").write_bytes(b"\n".join(lines))


REASONS = [
    "line 3: no JSON (Unterminated string starting at: line 1 column 10 (char 9))",
    "line 4: no UTF-8 (invalid start byte at its byte 10)",
    "line 5: no field 'text'; it has body, id",
    "line 6: empty",
    "line 7: 'utf-8' codec can't encode character '\\ud800' in position 0: surrogates not allowed",
    "line 8: of type int, neither text nor a list of turns",
    "line 9: no field 'text'; it has list",
    "line 10: 1 turns: the last question has no answer",
]


@pytest.mark.parametrize("parts", [1, 4])
def test_bad_records_are_named_counted_and_skipped(tmp_path, vocab, capsys, parts):
    bad_jsonl(tmp_path)
    job = config(tmp_path, parts=parts)
    assert encode(job, vocab)
    want = [f"skipped: {tmp_path / 'a.jsonl'}, {reason}" for reason in REASONS]
    assert capsys.readouterr().err.splitlines() == want
    opened = store.Store(job.directory)
    assert (len(opened), opened.info["skipped"]) == (3, 8)
    found = [vocab.decode(document.text) for document in opened.read(range(3))]
    assert found == [texts(12)[i] for i in (0, 1, 11)]


def test_too_many_bad_records_end_the_job(tmp_path, vocab):
    bad_jsonl(tmp_path)
    with pytest.raises(ValueError) as error:
        encode(config(tmp_path, max_bad=3), vocab)
    assert str(error.value) == (
        f"{tmp_path} has more than max_bad = 3 bad records in a part, the last: "
        f"{tmp_path / 'a.jsonl'}, {REASONS[3]}; repair it or raise max_bad"
    )


def test_other_bad_files(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_LONGEST", 50)
    whole = gzip.compress(json.dumps({"text": "a"}).encode() * 100)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-9])
    (tmp_path / "b.jsonl").write_text("x" * 51 + "\n" + '{"text": "short"}\n' + "y" * 200)
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no more")
    column = pyarrow.array([b"a", b"\xff", None]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_bytes(b"")
    (tmp_path / "f.txt").write_bytes(b"\xef\xbb\xbfmarked\r\n")
    found = [r.value if isinstance(r, text.Record) else str(r) for r in read(tmp_path, 3)]
    at = f"{tmp_path}/"
    assert found[:1] + found[2:5] == [
        f"{at}a.jsonl.gz, line 1: longer than 50 bytes",
        f"{at}b.jsonl, line 1: longer than 50 bytes", "short",
        f"{at}b.jsonl, line 3: longer than 50 bytes",
    ]  # fmt: skip
    assert found[1].startswith(f"{at}a.jsonl.gz: cannot be read on (Compressed file ended")
    assert found[5].startswith(f"{at}c.parquet: cannot be read on (")
    assert found[6] == "a" and found[7].startswith(f"{at}d.parquet, row 1: 'utf-8' codec can't dec")
    assert found[8:] == [f"{at}d.parquet, row 2: empty", f"{at}e.txt, line 1: empty", "marked"]
    paragraphs = read(tmp_path, 1, "b.jsonl", "blank")
    assert len(paragraphs) == 3  # a name decides
    (tmp_path / "g.txt").write_text(f"{'x' * 30}\n{'y' * 30}\n\nshort\n")
    long, short = read(tmp_path, 1, "g.txt", "blank")
    assert str(long) == f"{at}g.txt, line 1: longer than 50 bytes" and short.value == "short"


def test_a_file_that_breaks_off_keeps_what_came_before(tmp_path):
    lines = [json.dumps({"text": value}) + "\n" for value in texts(5000)]
    compressed = gzip.compress("".join(lines).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(compressed[: len(compressed) // 2])
    *kept, last = read(tmp_path, 1)
    assert str(last).startswith(f"{tmp_path / 'a.jsonl.gz'}: cannot be read on (Compressed file")
    assert 1000 < len(kept) and [record.value for record in kept] == texts(5000)[: len(kept)]


def test_configurations_that_cannot_be(tmp_path, vocab):
    write_parquet(tmp_path / "a.parquet", texts(3))
    job = config(tmp_path)
    with pytest.raises(ValueError) as error:
        encode(dataclasses.replace(job, field="body"), vocab)
    assert str(error.value) == f"{tmp_path / 'a.parquet'} has no column 'body'; it has id, text"
    with pytest.raises(ValueError) as error:
        encode(dataclasses.replace(job, files="*.txt"), vocab)
    assert str(error.value) == f"no file in {tmp_path} matches '*.txt'; change texts or files"
    with pytest.raises(ValueError, match="documents 'page' is none of file, blank, line"):
        encode(dataclasses.replace(job, documents="page"), vocab)
    with pytest.raises(ValueError, match="0 parts; take at least 1"):
        encode(dataclasses.replace(job, parts=0), vocab)
    encode(job, vocab)
    with pytest.raises(store.StoreError, match="with source [0-9a-f]{12}, this run has source"):
        encode(dataclasses.replace(job, max_ids=9), vocab)
    write_parquet(tmp_path / "a.parquet", texts(4))
    with pytest.raises(store.StoreError, match="with source [0-9a-f]{12}, this run has source"):
        encode(job, vocab)
