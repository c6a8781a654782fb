"""Microsoft's animated Fluent emoji as captioned clips, out of an npm package (MIT).

`npm pack` only downloads; nothing of the package is run. Each of its 223 animations without a skin
tone is put on white, reduced, and cut into clips. Emoji often stand still, and then the next frame
is the last one; so of its clips only those are taken in which something moves. They go to
{KEY}-{FRAME}.mkv, KEY being the code points and FRAME the first frame, with one object a line
({"file", "caption", "emoji"}) in the lists

    train.jsonl      what is learnt from
    heldout.jsonl    all clips of one emoji in `heldout`, those with the lowest sha256(KEY)

Legend: T frames, H rows, W columns, C colours of pixels.
"""

import base64
import dataclasses
import gzip
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

import emoji
import numpy as np
import PIL.Image

from data_pipelines import clip_folder
from emu3_jax import tar

PACKAGE = "@lobehub/fluent-emoji-anim-3@1.0.0"
SHA512 = "UzRSUDMjdfdt9vER5bhjHkPqgc3EEgfGtYs6ndvizOTvQOxYQ57ow2RTkWSDZxwW30X4EYBi2eWTS7CXDDoFsg=="
LARGEST = 2**22  # bytes of one animation
PATIENCE = 600  # seconds for the download
_FILE = re.compile(r"package/assets/([0-9a-f-]+)\.webp")
_TONE = re.compile(r"1f3f[b-f]")


@dataclasses.dataclass
class AnimatedEmoji:
    """Job: clips of `frames` frames at `fps`, `size` pixels a side, one from every `stride`-th
    frame, of which repeating the middle frame gives the second half at most at `stillest` dB.

    ValueError in one line if the package cannot be had.
    """

    directory: str = "runs/animated_emoji"
    size: int = 32
    frames: int = 16
    fps: int = 12
    stride: int = 2
    stillest: float = 20.0
    heldout: int = 10
    cache_dir: str = ""

    def run(self) -> None:
        """Cuts, or says that this has been done with the same settings."""
        path = pathlib.Path(self.directory)
        settings = dataclasses.asdict(self) | {"package": PACKAGE}
        del settings["directory"], settings["cache_dir"]
        done, wanted = path / "animated_emoji.json", json.dumps(settings)
        if done.exists() and done.read_text() == wanted:
            print(f"{path}: cut")
            return
        path.mkdir(parents=True, exist_ok=True)
        entries = self._cut(path)
        keys = sorted({entry["emoji"] for entry in entries}, key=_stable)
        unseen = set(keys[: len(keys) // self.heldout])
        for name in ("train", "heldout"):
            members = [e for e in entries if (e["emoji"] in unseen) == (name == "heldout")]
            clip_folder.write_list(path / f"{name}.jsonl", members)
            print(f"{path / name}.jsonl: {len(members)} clips", flush=True)
        done.write_text(wanted)

    def _cut(self, path: pathlib.Path) -> list[dict]:
        """Writes the clips and returns their entries."""
        entries = []
        for key, data in animations(fetch(self.cache_dir)):
            caption = _caption(key)
            x_THWC = read(data, self.size, self.fps)
            for start in self._starts(x_THWC) if caption else []:
                file = f"{key}-{start:02}.mkv"
                clip_folder.write_clip(path / file, x_THWC[start : start + self.frames], self.fps)
                entries.append(dict(file=file, caption=caption, emoji=key))
        return entries

    def _starts(self, x_THWC: np.ndarray) -> list[int]:
        """The first frames of the clips in which something moves."""
        found, middle = [], self.frames // 2
        for start in range(0, len(x_THWC) - self.frames + 1, self.stride):
            later_THWC = x_THWC[start + middle : start + self.frames].astype(np.float32)
            last_HWC = x_THWC[start + middle - 1]
            error = np.square((later_THWC - last_HWC) / 255).mean()
            if error >= 10 ** (-self.stillest / 10):
                found.append(start)
        return found


def fetch(cache_dir: str | os.PathLike = "") -> pathlib.Path:
    """The package's archive, kept in `cache_dir` (~/.cache/emu3_jax); its sha512 is checked."""
    cache = pathlib.Path(cache_dir or pathlib.Path.home() / ".cache" / "emu3_jax")
    path = cache / "fluent-emoji-anim-3-1.0.0.tgz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _download(pathlib.Path(scratch), path)
    with path.open("rb") as file:
        found = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if found != SHA512:
        raise ValueError(f"{path} has sha512 {found}, expected {SHA512}; delete it to fetch again")
    return path


def _download(scratch: pathlib.Path, path: pathlib.Path) -> None:
    npm = shutil.which("npm")
    reason = "" if npm else "npm is not here; install Node.js"
    if npm:
        command = [npm, "pack", PACKAGE, "--ignore-scripts", "--pack-destination", str(scratch)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
            lines = done.stderr.strip().splitlines()
            reason = (lines or [f"exit code {done.returncode}"])[-1] if done.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = type(error).__name__
    if reason:
        raise ValueError(
            f"could not fetch {PACKAGE} with npm: {reason}; or take drawn clips, which need nothing"
        )
    (archive,) = scratch.glob("*.tgz")
    os.replace(archive, path)


def animations(archive: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Yields key and WebP of what the archive has without a skin tone, in its order."""
    with gzip.open(archive) as file:
        for name, start, size in tar.files(file):
            match = _FILE.fullmatch(name)
            if match and not _TONE.search(match[1]) and size <= LARGEST:
                file.seek(start)
                yield match[1], file.read(size)


def read(data: bytes, size: int, fps: int) -> np.ndarray:
    """An animated picture as x_THWC, uint8 on white: what is seen at 0, 1 / fps, 2 / fps, ... s."""
    frames, ends, time = [], [], 0.0
    with PIL.Image.open(io.BytesIO(data)) as image:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            frame = image.convert("RGBA")
            time += image.info.get("duration", 0) / 1000
            ends.append(time)
            white = PIL.Image.new("RGBA", frame.size, "white")
            white.alpha_composite(frame)
            small = white.convert("RGB").resize((size, size), PIL.Image.Resampling.BOX)
            frames.append(np.asarray(small))
    time_T = np.arange(max(1, int(time * fps))) / fps
    shown_T = np.searchsorted(ends, time_T + 1e-6)
    return np.stack(frames)[np.minimum(shown_T, len(frames) - 1)]


def _stable(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _caption(key: str) -> str:
    """The emoji's English name, "" if it has none."""
    character = "".join(chr(int(point, 16)) for point in key.split("-") if point)
    known = emoji.EMOJI_DATA.get(character) or emoji.EMOJI_DATA.get(character + "\ufe0f")
    return known["en"].strip(":").replace("_", " ") if known else ""
