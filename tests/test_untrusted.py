"""Whatever lies in a file from outside: a right answer or one line of ValueError that names it.

Valid files are damaged at random: cut, bits flipped, JSON with values replaced, added, deleted or
nested without end, archives with names that lead elsewhere. `make test-all` damages twenty times as
many. test_bombs.py has what promises more than it holds.
"""

import copy
import dataclasses
import gzip
import io
import json
import math
import pathlib
import re
import resource
import shutil
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable

import hypothesis
import jax
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from data_pipelines import (
    entries,
    filters,
    image_folder,
    parts,
    plan,
    sources,
    store,
    text_files,
    verify,
)
from emu3_jax import (
    checkpoint,
    config,
    convert,
    integrity,
    optim,
    packages,
    shards,
    train,
    untrusted,
    vocab,
)
from emu3_jax.transformer import Transformer
from tests import encoding, toy
from tokenizer import convert as vision_convert
from tokenizer import exchange, vq

MODEL = Transformer(layers=1, width=8, heads=2, kv_heads=1, head_dim=4, ffn=8,
                    vocab=256 + 211 + 16, first_visual=256 + 211)  # fmt: skip
VISION = vq.VQConfig(
    codebook_size=16, width=32, multipliers=(1, 1), res_blocks=1, attention_levels=(1,)
)
RANKS = {bytes([i]): i for i in range(256)} | {b"an": 256}
DEEP = "[deep]"  # becomes that many opening brackets
WIDE = 100_000
STRANGE = (  # values that stand where others should
    None, True, -1, 0, 1, 3, 1.5, math.nan, math.inf, -1e308, 10**13, 2**31, 2**63 - 1, 2**64,
    10**400, "", "x", "\0", "\ud800", "a\nb", "../../etc/passwd", "/etc/passwd", "é" * 99, [], [[]],
    {}, [-1], [10**13], [0, 0], {"a": {}}, DEEP,
)  # fmt: skip


@dataclasses.dataclass
class Case:
    """Files as `make(directory)` writes them, and `read(directory)`, which goes through them.

    Of the files, those that match `damaged` are; `error` is what reading may raise, and `named` is
    in its message.
    """

    make: Callable[[pathlib.Path], None]
    read: Callable[[pathlib.Path], None]
    damaged: str = ""
    examples: int = 60
    error: type[ValueError] = ValueError
    named: str = "/files"
    repair: Callable[[bytes], bytes] = bytes  # of checksums, so that damage goes deep


CASES: dict[str, Case] = {}


def _case(name: str, **options) -> Callable:
    """Registers a pair of functions (make, read) as a case."""

    def register(functions: type) -> type:
        CASES[name] = Case(functions.make, functions.read, **options)
        return functions

    return register


@_case("store", error=store.StoreError, examples=80)
class _Store:
    def make(path):
        turns = np.array([2, 3, 2], np.int32)
        documents = [
            store.Document("text", np.arange(9, dtype=np.uint32)),
            store.Document("image", np.arange(3, dtype=np.uint32), np.arange(12).reshape(1, 3, 4)),
            store.Document("video", np.zeros(0, np.uint32), np.ones((2, 2, 2), int), 12.5, 8),
            store.Document("chat", np.arange(7, dtype=np.uint32), turns=turns),
        ]
        for part, some in enumerate((documents, documents[:1])):
            parts.write(store.part_path(path, part, 2), some, store.Fingerprints("a" * 64))
        assert store.finish(path, 2, "source", "CC0")

    def read(path):
        opened = store.Store(str(path))
        documents = opened.read(range(len(opened)))
        assert len(opened.keys()) == len(documents) == sum(opened.counts_S)
        opened.verify()
        verify.Verify(str(path)).damages()


@_case("store's jobs", error=store.StoreError, damaged="json$", examples=40)
class _StoreJobs:
    make = _Store.make

    def read(path):
        made = store.Fingerprints("a" * 64)
        assert all(parts.is_complete(store.part_path(path, p, 2), made) for p in range(2))
        assert store.finish(path, 2, "source", "CC0")
        verify.Verify(str(path)).damages()


@_case("decoder, official", examples=80)
class _Official:
    def make(path):
        params = jax.tree.map(lambda p: np.zeros(p.shape, np.float16), MODEL.params())
        convert.save(MODEL, params, str(path), "official")
        tensors = [dataclasses.replace(t) for t in shards.read(path).values()]
        tensors = [shards.Tensor.of(t.name, t.read()) for t in tensors]
        shards.remove(path)
        shards.write(tensors, path, shard_bytes=4096)

    def read(path):
        assert exchange.find(str(path)) == (str(path), None)
        model, params = convert.load(str(path))
        assert params["embed"].shape == (model.vocab, model.width)


def _vision() -> vq.VQ:
    return vq.merge(VISION, *vq.init(VISION, jax.random.key(0)))


@_case("decoder, hf", damaged="json$|model", examples=60)
class _Hf:
    def make(path):
        tokenizer = _vision()
        about = vision_convert.config_json(VISION, "hf")
        vision = convert.Vision(vision_convert.tensors(tokenizer, "hf"), about)
        params = jax.tree.map(lambda p: np.zeros(p.shape, np.float32), MODEL.params())
        convert.save(MODEL, params, str(path), "hf", vision=vision)

    def read(path):
        assert exchange.find(str(path)) == (str(path), str(path))
        convert.load(str(path))


@_case("vision tokenizer", examples=20)
class _Vision:
    def make(path):
        vision_convert.save(_vision(), path, "official")

    def read(path):
        vision_convert.load(path)


def _repair_tar(data: bytes) -> bytes:
    """The checksums of all blocks that may be headers, made right."""
    data = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


def _write_tar(path: pathlib.Path, form: int) -> None:
    with tarfile.open(path, "w", format=form) as tar:

        def add(name, data=b"", kind=tarfile.REGTYPE, link=""):
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(data), link
            tar.addfile(info, io.BytesIO(data))

        for i, name in enumerate(("a", "../../b", "/tmp/c", "long/" * 30 + "d")):
            add(f"{name}.jpg", encoding.picture(i))
            add(f"{name}.json", json.dumps({"caption": "said", "score": i}).encode())
        add("soft.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add("hard.jpg", kind=tarfile.LNKTYPE, link="../../b.jpg")
        add("device.jpg", kind=tarfile.CHRTYPE)
        add("e.jpg", encoding.picture(4))
        add("e.txt", "é".encode())


@_case("tar shards", repair=_repair_tar, examples=150)
class _Tar:
    def make(path):
        _write_tar(path / "gnu.tar", tarfile.GNU_FORMAT)
        _write_tar(path / "pax.tar", tarfile.PAX_FORMAT)

    def read(path):
        _go_through(sources.WebDataset(str(path)).open())


def _go_through(source: sources.Source) -> None:
    """Reads every record; bad ones raise BadFile and no more."""
    for i in range(len(source)):
        try:
            entry = source.entry(i)
            filters.Column("score", least=0).keeps(entry)
        except entries.BadFile as error:
            _is_one_line(error)
        try:
            assert source[i].image_HWC.dtype == np.uint8
        except entries.BadFile as error:
            _is_one_line(error)


@_case("images", examples=150, error=image_folder.BadImage)
class _Images:
    def make(path):
        image = PIL.Image.fromarray(np.arange(32 * 48 * 4, dtype=np.uint8).reshape(32, 48, 4))
        exif = PIL.Image.Exif()
        exif[0x0112] = 6
        for kind in image_folder.FORMATS:
            shown = image.convert("P" if kind == "GIF" else "RGBA" if kind == "PNG" else "RGB")
            options = dict(exif=exif) if kind in ("JPEG", "PNG", "WEBP") else {}
            shown.save(path / f"{kind}.png", kind, **options)

    def read(path):
        for file in sorted(path.iterdir()):
            plan.read_size(file)
            height, width, colours = image_folder.read_image(file).shape
            assert height * width <= image_folder.MOST_PIXELS and colours == 3


@_case("lists", examples=120)
class _Lists:
    def make(path):
        names = [f"{i}.jpg" for i in range(5)]
        encoding.folder(path, names)
        lines = [dict(file=name, caption="said", score=1) for name in names]
        (path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        rows = "".join(f'{name},"said, too",{i}\n' for i, name in enumerate(names))
        (path / "list.csv").write_text(f"file,caption,score\n{rows}")

    def read(path):
        for name in ("list.jsonl", "list.csv", ""):
            _go_through(sources.Images(str(path), name).open())


@_case("texts", examples=120)
class _Texts:
    def make(path):
        turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
        parts_ = [{"role": "user", "content": [{"type": "text", "text": "a?"}]}, turns[1]]
        lines = "".join(json.dumps({"text": v}) + "\n" for v in ("a text", turns, parts_))
        (path / "a.jsonl").write_text(lines)
        (path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        (path / "c.txt").write_text("one\n\ntwo\n")

    def read(path):
        for documents in text_files.DOCUMENTS:
            source = text_files.TextFiles(str(path), "*", "text", documents)
            for record in (r for part in range(3) for r in source.read(part, 3)):
                if isinstance(record, ValueError):
                    _is_one_line(record)


@_case("parquet", examples=60)
class _Parquet:
    def make(path):
        columns = dict(
            image=[{"bytes": encoding.picture(i), "path": None} for i in range(3)] + [None],
            caption=["one", None, "two", "three"], key=["a.jpg", "b.jpg", "c.mp4", "d.jpg"],
            score=[1.0, 2.0, None, 3.0],
        )  # fmt: skip
        pq.write_table(pa.table(columns), path / "a.parquet", row_group_size=2)

    def read(path):
        for key in ("key", ""):
            _go_through(sources.Parquet(str(path), key=key).open())
        for record in text_files.TextFiles(str(path), "*", "caption", "line").read(0, 1):
            if isinstance(record, ValueError):
                _is_one_line(record)


@_case("videos", examples=20)
class _Videos:
    def make(path):
        for name in ("a.mp4", "b.mp4"):
            encoding.film(path / name, [0, 100, 200])

    def read(path):
        source = sources.Videos(str(path), "").open()
        for i in range(len(source)):
            try:
                assert len(list(source[i].frames())) <= 99
            except entries.BadFile as error:
                _is_one_line(error)


@_case("settings of a checkpoint", examples=120, named="")
class _Settings:
    def make(path):
        job = train.Train(toy.model(), toy.Counting(poison=3), optimizer=optim.AdamW(rate=1e-5))
        (path / "config.json").write_text(json.dumps(config.to_json(job)))
        job = toy.Job(parts=(toy.Part(names=()), toy.Part(limit=3)))
        (path / "job.json").write_text(json.dumps(config.to_json(job)))

    def read(path):
        for name in ("config.json", "job.json"):
            _is_made_of_configurations(config.from_json(untrusted.read_object(path / name)))


def _is_made_of_configurations(value) -> None:
    if isinstance(value, dict | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            _is_made_of_configurations(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _is_made_of_configurations(getattr(value, field.name))
    else:
        assert isinstance(value, str | int | float | None)


@_case("checkpoint", damaged="about|verified", examples=60)
class _Checkpoint:
    def make(path):
        job = train.Train(toy.model(), toy.Counting())
        with checkpoint.Checkpoints(str(path)) as saved:
            saved.save(3, dict(params=dict(a=np.ones(3, np.float32))), job, {}, wait=True)

    def read(path):
        path = path / "checkpoints" / "3"
        about = integrity.read_about(path)
        if damage := integrity.damage(path):
            raise ValueError(damage)
        try:
            _is_made_of_configurations(config.from_json(about["config"]))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


@_case("ranks", examples=60)
class _Ranks:
    def make(path):
        vocab.save_ranks(RANKS, path / "ranks.tiktoken")

    def read(path):
        words = vocab.Vocab.load(path / "ranks.tiktoken", codes=16)
        assert words.decode(words.encode("banana <|extra_0|>")) == "banana <|extra_0|>"


@_case("keys of duplicates", examples=40)
class _Keys:
    def make(path):
        (path / "duplicates.jsonl").write_text('{"key": "a"}\n{"key": "b"}\n')

    def read(path):
        filters.read_keys(path / "duplicates.jsonl")


@_case("archive of arrays", examples=120)
class _Arrays:
    def make(path):
        np.savez(path / "stored.npz", a=np.arange(24).reshape(2, 3, 4), b=np.float32(1))
        np.savez_compressed(path / "packed.npz", a=np.zeros((5, 4), np.uint8, order="F"))

    def read(path):
        for name in ("stored.npz", "packed.npz"):
            for array in untrusted.read_arrays(path / name).values():
                assert isinstance(array, np.ndarray) and not array.dtype.hasobject


@_case("packages", named="of toy==1", examples=120)
class _Packages:
    def make(path):
        with zipfile.ZipFile(path / "toy.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr("toy/a", b"a" * 999)
            wheel.writestr("../../b", b"b")
        plain = path / "toy.tar"
        with tarfile.open(plain, "w") as tar:
            for name in ("toy-1/toy/a", "../../b", "/tmp/b"):
                info = tarfile.TarInfo(name)
                info.size = 9
                tar.addfile(info, io.BytesIO(b"a" * 9))
        (path / "toy.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()

    def read(path):
        for name in ("toy.whl", "toy.tar.gz"):
            packages._read_members(path / name, ["toy/a"], "toy==1")


def _damage_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """A few changes anywhere, or something else altogether."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=600))
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["cut", "flip", "flip", "set", "delete", "insert", "repeat"]))
        end = min(len(data), at + draw(st.integers(1, 64)))
        if kind == "cut":
            del data[at:]
        elif kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            data[at:end] = draw(st.sampled_from([b"\0", b"\xff", b"7", b"\n"])) * (end - at)
        elif kind == "delete":
            del data[at:end]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=64))
        elif kind == "repeat":
            data[at:at] = data[at:end] * draw(st.sampled_from([1, 2, 100]))
    return bytes(data)


def _damage_json(draw: st.DrawFn, value):
    """`value` with a few values replaced, keys deleted or added, anywhere in it."""
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(value))
        node, key = draw(st.sampled_from(places)) if places else (None, None)
        kind = draw(st.sampled_from(["replace"] * 4 + ["delete", "add"]))
        strange = draw(st.sampled_from(STRANGE) | st.integers() | st.floats() | st.text(max_size=9))
        strange = copy.deepcopy(strange)  # the next round may damage it too
        if node is None or draw(st.integers(0, 19)) == 0:
            value = strange
        elif kind == "delete":
            del node[key]
        elif isinstance(node, dict):
            node[key if kind == "replace" else draw(st.sampled_from(["", "x", "class"]))] = strange
        else:
            node[key : key + (kind == "replace")] = [strange]
    return value


def _places(value):
    """Every (container, key) in a JSON value."""
    if not isinstance(value, dict | list):
        return
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        yield from _places(value[key])


def _dump(value) -> bytes:
    return json.dumps(value).replace(json.dumps(DEEP), "[" * WIDE + "]" * WIDE).encode()


def _damage(draw: st.DrawFn, name: str, data: bytes) -> bytes:
    if name.endswith((".json", "metadata")) and draw(st.integers(0, 3)):
        return _dump(_damage_json(draw, json.loads(data)))
    if name.endswith(".jsonl") and draw(st.integers(0, 2)):
        lines = data.splitlines(keepends=True)
        at = draw(st.integers(0, len(lines) - 1))
        lines[at] = _dump(_damage_json(draw, json.loads(lines[at]))) + b"\n"
        return b"".join(lines)
    if name.endswith(".safetensors") and draw(st.integers(0, 2)):
        (length,) = struct.unpack("<Q", data[:8])
        header = _dump(_damage_json(draw, json.loads(data[8 : 8 + length])))
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    return _damage_bytes(draw, data)


def _is_one_line(error: ValueError) -> None:
    assert str(error) and "\n" not in str(error)


def _fuzz(case: Case, whole: pathlib.Path, examples: int) -> None:
    whole.mkdir()
    case.make(whole)
    case.read(whole)  # undamaged, they are read
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    files = [file for file in files if re.search(case.damaged, str(file))]

    @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                         phases=[hypothesis.Phase.generate], report_multiple_bugs=False,
                         suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    @hypothesis.given(st.data())
    def run(data):
        with tempfile.TemporaryDirectory() as scratch:
            # Far down, so that what leads up with .. is seen.
            path = pathlib.Path(scratch, "a", "b", "files")
            shutil.copytree(whole, path)
            file = path / data.draw(st.sampled_from(files))
            damaged = _damage(data.draw, file.name, file.read_bytes())
            file.write_bytes(case.repair(damaged) if data.draw(st.booleans()) else damaged)
            before = sorted(pathlib.Path(scratch).rglob("*"))
            try:
                case.read(path)
            except case.error as error:
                _is_one_line(error)
                assert case.named in str(error), error
            assert sorted(pathlib.Path(scratch).rglob("*")) == before

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 2**20, f"{grown:,} KiB more than before"


@pytest.mark.parametrize("name", CASES)
def test_damaged_files_are_refused_in_one_line(name, tmp_path):
    _fuzz(CASES[name], tmp_path / "files", CASES[name].examples)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_many_damaged_files_are_refused_in_one_line(name, tmp_path):
    _fuzz(CASES[name], tmp_path / "files", 20 * CASES[name].examples)
