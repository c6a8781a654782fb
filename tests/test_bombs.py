"""Files that promise more than they hold, or unpack to far more, take little memory to refuse.

They are read in a process of its own, which may take MARGIN bytes more than it begins with.
"""

import dataclasses
import gzip
import io
import json
import os
import pathlib
import resource
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable

import jax
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import image_folder, parquet, parts, sources, store, text_files
from emu3_jax import convert, packages, release, shards, untrusted, vocab
from tests import encoding, toy
from tokenizer import convert as vision_convert

ROOT = pathlib.Path(__file__).parents[1]
MARGIN = 2**29
TERABYTE = 2**40


@dataclasses.dataclass
class Bomb:
    """`make(directory)` writes it, `read(directory)` is to raise a ValueError with `message`."""

    make: Callable[[pathlib.Path], None]
    read: Callable[[pathlib.Path], None]
    message: str


BOMBS: dict[str, Bomb] = {}


def _bomb(name: str, message: str) -> Callable:
    def register(functions: type) -> type:
        BOMBS[name] = Bomb(functions.make, functions.read, message)
        return functions

    return register


def _sparse(path: pathlib.Path, size: int = TERABYTE, begin: bytes = b"") -> None:
    """A file of zeros that takes no disk."""
    path.write_bytes(begin)
    os.truncate(path, size)


@_bomb("a safetensors header of a terabyte", "is no readable safetensors file")
class _LongHeader:
    def make(path):
        (path / "model.safetensors").write_bytes(struct.pack("<Q", TERABYTE) + b"{}")

    def read(path):
        shards.read(path)


@_bomb("a tensor of a terabyte", "is no readable safetensors file")
class _LargeTensor:
    def make(path):
        about = dict(dtype="U8", shape=[TERABYTE], data_offsets=[0, TERABYTE])
        header = json.dumps({"a": about}).encode()
        data = struct.pack("<Q", len(header)) + header + bytes(64)
        (path / "model.safetensors").write_bytes(data)

    def read(path):
        shards.read(path)


@_bomb("a decoder of 2**31 layers", "lacks tensor model.layers.2.")
class _LargeDecoder:
    def make(path):
        model = toy.model(head_dim=4, vocab=256 + 211 + 16, first_visual=256 + 211)
        params = jax.tree.map(lambda p: np.zeros(p.shape, np.float16), model.params())
        convert.save(model, params, str(path), "official")
        about = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(about | dict(num_hidden_layers=2**31 - 1)))

    def read(path):
        convert.load(str(path))


@_bomb("a vision tokenizer of 2**31 blocks", "wants 8589934588 blocks")
class _LargeTokenizer:
    def make(path):
        about = vision_convert.config_json(vision_convert.vq.VQConfig(), "official")
        (path / "config.json").write_text(json.dumps(about | dict(num_res_blocks=2**31 - 1)))
        shards.write([shards.Tensor.of("a", np.zeros(3, np.float32))], path)

    def read(path):
        vision_convert.load(path)


def _header(kind: bytes, size: int, name: str = "a.jpg") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@_bomb("a tar's header about a header, of a terabyte", "a name or header of 1099511627776 bytes")
class _PaxTar:
    def make(path):
        (path / "a.tar").write_bytes(_header(tarfile.XHDTYPE, TERABYTE))

    def read(path):
        sources.WebDataset(str(path)).open()


@_bomb("a tar of names about names", "no record in 1 tar files")
class _NestedTar:
    """tarfile calls itself for each of them."""

    def make(path):
        name = _header(tarfile.GNUTYPE_LONGNAME, 2) + b"a\0".ljust(512, b"\0")
        (path / "a.tar").write_bytes(name * 10_000 + _header(tarfile.REGTYPE, 0) + bytes(1024))

    def read(path):
        sources.WebDataset(str(path)).open()


@_bomb("a tar whose sizes lead back", "is no tar, or cut short (a size of b'-1536')")
class _EndlessTar:
    """Some versions of tarfile never come to its end."""

    def make(path):
        pax = b"14 size=-1536\n".ljust(512, b"\0")
        data = _header(tarfile.XHDTYPE, 14) + pax + _header(tarfile.REGTYPE, 0) + bytes(1024)
        (path / "a.tar").write_bytes(data)

    def read(path):
        sources.WebDataset(str(path)).open()


@_bomb("a tar's image beyond its end", "damaged or cut short at byte")
class _CutTar:
    def make(path):
        (path / "a.tar").write_bytes(_header(tarfile.REGTYPE, TERABYTE) + bytes(1024))

    def read(path):
        sources.WebDataset(str(path)).open()


@_bomb("a caption in a tar, of a terabyte", "a.tar/a: its .txt has 1099511627776 bytes")
class _LongTarCaption:
    def make(path):
        header = _header(tarfile.REGTYPE, TERABYTE, "a.txt")
        _sparse(path / "a.tar", TERABYTE + 2048, header)

    def read(path):
        sources.WebDataset(str(path)).open().entry(0)


@_bomb("a caption in a file, of a terabyte", "its caption is longer than")
class _LongCaption:
    def make(path):
        (path / "a.jpg").write_bytes(encoding.picture(0))
        _sparse(path / "a.txt")

    def read(path):
        sources.Images(str(path), "").open().entry(0)


def _read_image(path: pathlib.Path) -> None:
    (file,) = path.iterdir()
    image_folder.read_image(file)


@_bomb("a PNG of 169 million pixels", "13000x13000 px, more than 67108864 pixels")
class _Png:
    def make(path):
        def chunk(name, data):
            return struct.pack(">I", len(data)) + name + data + struct.pack(
                ">I", zlib.crc32(name + data))  # fmt: skip

        packer = zlib.compressobj(1)
        data = b"".join(packer.compress(bytes(1626)) for _ in range(13_000)) + packer.flush()
        header = struct.pack(">IIBBBBB", 13_000, 13_000, 1, 0, 0, 0, 0)
        chunks = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
        (path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)

    read = _read_image


@_bomb("a JPEG of 4 billion pixels", "corrupt image (Image size (4290250000 pixels) exceeds limit")
class _Jpeg:
    def make(path):
        data = bytearray(encoding.picture(0))
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", 65_500, 65_500)
        (path / "a.jpg").write_bytes(data)

    read = _read_image


@_bomb("a GIF of 4 billion pixels", "exceeds limit")
class _Gif:
    def make(path):
        file = io.BytesIO()
        PIL.Image.new("P", (16, 16)).save(file, "GIF")
        data = bytearray(file.getvalue())
        data[6:10] = struct.pack("<HH", 65_500, 65_500)
        (path / "a.gif").write_bytes(data)

    read = _read_image


def _make_store(path: pathlib.Path) -> pathlib.Path:
    part = store.part_path(path, 0, 1)
    codes = np.arange(64).reshape(1, 8, 8)
    parts.write(part, [store.Document("a", np.zeros(3, np.uint32), codes)], store.Fingerprints())
    assert store.finish(path, 1, "", "")
    return part


def _change(part: pathlib.Path, column: str, array: dict, **info) -> None:
    """Says other things of a part and a column of it, without an error in their sizes."""
    file = part / column / "zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | array))
    about = json.loads((part / "part.json").read_text()) | info
    about["files"][f"{column}/zarr.json"] = file.stat().st_size
    (part / "part.json").write_text(json.dumps(about))


def _read_store(path: pathlib.Path) -> None:
    opened = store.Store(str(path))
    opened.read(range(len(opened)))
    opened.verify()


@_bomb("a store of a trillion documents", "1099511627776 documents have keys of")
class _ManyDocuments:
    def make(path):
        part = _make_store(path)
        some = dict(documents=TERABYTE, codes=0, shapes=[[0, 0, 0, 0.0, TERABYTE]])
        _change(part, "shape", dict(shape=[TERABYTE]), **some)

    read = _read_store


@_bomb("a store of a trillion codes", "codes is of 2199023255552 bytes, more than its files")
class _ManyCodes:
    def make(path):
        part = _make_store(path)
        some = dict(codes=TERABYTE, shapes=[[1, 2**20, 2**20, 0.0, 1]])
        grid = dict(name="regular", configuration=dict(chunk_shape=[1024, 4096]))
        _change(part, "codes", dict(shape=[TERABYTE // 4096, 4096], chunk_grid=grid), **some)

    read = _read_store


@_bomb("a store that is compressed", "codes/zarr.json is none that this code writes")
class _Compressed:
    def make(path):
        codecs = [{"name": "bytes", "configuration": {"endian": "little"}},
                  {"name": "gzip", "configuration": {"level": 6}}]  # fmt: skip
        _change(_make_store(path), "codes", dict(codecs=codecs))

    read = _read_store


@_bomb("JSON of a terabyte", "more than 67,108,864 bytes")
class _LongJson:
    def make(path):
        _sparse(path / "config.json")
        (path / "model.safetensors").touch()

    def read(path):
        release.describe(str(path))


@_bomb("ranks of a terabyte", "more than 67,108,864 bytes")
class _LongRanks:
    def make(path):
        _sparse(path / "ranks.tiktoken")

    def read(path):
        vocab.Vocab.load(path / "ranks.tiktoken")


def _zeros(mebibytes: int) -> bytes:
    """That many zeros, deflated: a stream of blocks that can be repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * (mebibytes // 16) + b"\x03\x00"


def _write_zip(path: pathlib.Path, name: str, deflated: bytes, size: int) -> None:
    """A zip of one file that says it unpacks to `size` bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, deflated)
    data = bytearray(path.read_bytes())
    for begin, method, length in ((data.index(b"PK\x03\x04"), 8, 22),
                                  (data.index(b"PK\x01\x02"), 10, 24)):  # fmt: skip
        data[begin + method : begin + method + 2] = struct.pack("<H", zipfile.ZIP_DEFLATED)
        data[begin + length : begin + length + 4] = struct.pack("<I", size)
    path.write_bytes(data)


@_bomb("an archive of arrays that unpacks to 4 GB", "more than 1,073,741,824 bytes")
class _LargeArchive:
    def make(path):
        _write_zip(path / "a.npz", "a.npy", _zeros(64), 2**32 - 2)

    def read(path):
        untrusted.read_arrays(path / "a.npz")


@_bomb("an array of a terabyte", "a.npy holds something else than uint8 (1099511627776,)")
class _LargeArray:
    def make(path):
        header = io.BytesIO()
        about = dict(descr="|u1", fortran_order=False, shape=(TERABYTE,))
        np.lib.format.write_array_header_1_0(header, about)
        with zipfile.ZipFile(path / "a.npz", "w") as archive:
            archive.writestr("a.npy", header.getvalue() + bytes(64))

    def read(path):
        untrusted.read_arrays(path / "a.npz")


@_bomb("a wheel's file that says it is of 4 GB", "toy/a")
class _LargeMember:
    def make(path):
        _write_zip(path / "toy.whl", "toy/a", _zeros(16), 2**32 - 2)

    def read(path):
        packages._read_members(path / "toy.whl", ["toy/a"], "toy==1")


@_bomb("a wheel's file that unpacks to more than it says", "Bad CRC-32")
class _LyingMember:
    def make(path):
        _write_zip(path / "toy.whl", "toy/a", _zeros(1024), 100)

    def read(path):
        packages._read_members(path / "toy.whl", ["toy/a"], "toy==1")


@_bomb("a line of text that unpacks to 576 MB", "longer than 67108864 bytes")
class _LongLine:
    def make(path):
        (path / "a.txt.gz").write_bytes(gzip.compress(bytes(2**26)) * 9)

    def read(path):
        for documents in ("file", "line"):
            for record in text_files.TextFiles(str(path), "*", "text", documents).read(0, 1):
                assert isinstance(record, text_files.BadText)
        raise record


@_bomb("rows of Parquet that unpack to a GB", "it has more than 134,217,728 bytes")
class _LargeGroup:
    def make(path):
        schema = pa.schema(dict(image=pa.binary()))
        batch = pa.record_batch([pa.array([bytes(2**20)] * 8, pa.binary())], schema)
        pq.write_table(
            pa.Table.from_batches([batch] * 128), path / "a.parquet", compression="zstd",
            use_dictionary=False, data_page_size=2**22,
        )  # fmt: skip

    def read(path):
        parquet.LARGEST, parquet._ROWS = 2**27, 8
        sources.Parquet(str(path), caption="").open().file(0)


def read_all(directory: str) -> None:
    """Prints what comes of reading each bomb below `directory`, a line of JSON each."""
    used = next(
        line for line in pathlib.Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmData")
    )  # fmt: skip
    most = int(used.split()[1]) * 1024 + MARGIN
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    for number, (name, bomb) in enumerate(BOMBS.items()):
        try:
            bomb.read(pathlib.Path(directory, str(number)))
            came = "it was read"
        except ValueError as error:
            came = str(error)
        except BaseException as error:
            came = repr(error)
        print(json.dumps([name, came]), flush=True)


@pytest.fixture(scope="module")
def came(tmp_path_factory) -> dict[str, str]:
    """What came of reading each."""
    directory = tmp_path_factory.mktemp("bombs")
    for number, bomb in enumerate(BOMBS.values()):
        (directory / str(number)).mkdir()
        bomb.make(directory / str(number))
    code = "import sys; from tests import test_bombs; test_bombs.read_all(sys.argv[1])"
    command = [sys.executable, "-c", code, str(directory)]
    environ = os.environ | dict(JAX_PLATFORMS="cpu")
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_little_memory(name, came):
    assert BOMBS[name].message in came[name]
    assert "\n" not in came[name]
