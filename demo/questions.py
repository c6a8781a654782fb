"""Questions about pictures and their answers, made from the pictures' labels alone.

    tone         which of the five skin tones it is: of pictures that have one
    tone_check   whether it is a given one, which half of the time it is
    who          man, woman or person: where the label has one of these words
    shown        the family: the caption without its tone

Many figures are drawn alike under several labels ("cook" and "man cook"). A question is asked only
where all labels of the very same pixels give the same answer: otherwise none is right.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from data_pipelines import image_folder
from data_pipelines.openmoji import TONES

SETS = {
    "train": "pictures that were taught, in wordings that were",
    "heldout": "pictures never shown: a known figure, a known skin tone, never together",
    "heldout_wording": "the same pictures, asked in wordings never taught",
    "new_people": "figures of which no picture was ever shown, neither to draw nor to describe",
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of question: how it is worded, once in a way that is never taught, and the answer to
    it by a picture's entry and the tone that may stand in it; "" is no answer."""

    wordings: tuple[str, ...]
    untaught: str
    answer: Callable[[dict, str], str]


def _who(picture: dict, tone: str) -> str:
    said = [word for word in picture["family"].split() if word in ("man", "woman", "person")]
    return said[0] if len(said) == 1 else ""


KINDS = {
    "tone": Kind(
        ("What skin tone is this?", "Which skin tone is shown?", "What is the skin tone?"),
        "Which skin tone is this?",
        lambda picture, tone: picture["tone"],
    ),
    "tone_check": Kind(
        ("Is the skin tone {tone}?", "Is this a {tone} skin tone?", "Is it {tone} skin?"),
        "Is this skin tone {tone}?",
        lambda picture, tone: picture["tone"] and ("yes" if picture["tone"] == tone else "no"),
    ),
    "who": Kind(
        ("Is this a man, a woman or a person?", "Man, woman or person?",
         "Who is this, man, woman or person?"),
        "Is it a man, a woman or a person?",
        _who,
    ),
    "shown": Kind(
        ("What does the picture show?", "What is shown?", "What is in the picture?"),
        "What does this picture show?",
        lambda picture, tone: picture["family"],
    ),
}  # fmt: skip


@dataclasses.dataclass
class Questions:
    """Job: writes what is taught and what is asked about the OpenMoji pictures of `images`.

    `directory` gets train.jsonl, the taught pictures with `conversations` each (`messages`, and the
    `kinds` of their questions), and asked.json: `asked`, an entry a question (set, kind, file,
    question, answer), and `possible`, the answers that were taught of each kind. Of each of SETS
    `count` pictures are taken (0: all), at random by `seed`. No picture that is asked about in
    another set than train has the pixels of a taught one.
    """

    images: str
    directory: str
    conversations: int = 2
    count: int = 100
    seed: int = 0

    def run(self) -> None:
        """Writes the files, or says that they are there; ValueError where OpenMoji is not."""
        directory = pathlib.Path(self.directory)
        if not pathlib.Path(self.images, "captions.jsonl").exists():
            raise ValueError(f"{self.images} holds no OpenMoji pictures; run make demo before this")
        if (directory / "asked.json").exists():
            print(f"{directory}: there")
            return
        pictures = Pictures(self.images)
        random = np.random.default_rng(self.seed)
        taught = [entry for _ in range(self.conversations)
                  for entry in teach(pictures.taught, pictures, random)]  # fmt: skip
        possible = collections.defaultdict(set)
        for entry in taught:
            for kind, turn in zip(entry["kinds"], entry["messages"][1::2], strict=True):
                possible[kind].add(turn["content"])
        asked = list(self._asked(pictures, random))
        directory.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(entry) + "\n" for entry in taught]
        (directory / "train.jsonl").write_text("".join(lines))
        answers = {kind: sorted(possible[kind]) for kind in KINDS}
        (directory / "asked.json").write_text(
            json.dumps(dict(possible=answers, asked=asked), indent=1)
        )
        print(f"{directory}: {len(taught)} conversations to learn from, {len(asked)} questions")

    def _asked(self, pictures: "Pictures", random: np.random.Generator) -> Iterator[dict]:
        known = {p["family"] for p in pictures.taught}
        members = dict(train=pictures.taught, heldout=pictures.heldout, new_people=pictures.others)
        for name, some in members.items():
            order = random.permutation(len(some))[: self.count or None]
            some = [some[i] for i in sorted(order)]
            yield from ask(name, some, pictures, known, random)
            if name == "heldout":
                yield from ask("heldout_wording", some, pictures, known, random, untaught=True)


class Pictures:
    """The entries of OpenMoji's lists, and which have the same pixels.

    taught    what the decoder has seen
    heldout   pictures of known families that it has not, nor any with their pixels
    others    those of all other families that come in skin tones, likewise
    """

    def __init__(self, images: str):
        lists = {name: image_folder.ImageFolder(images, f"{name}.jsonl")
                 for name in ("captions", "train", "heldout_skin_tone")}  # fmt: skip
        every = lists["captions"]
        self._digest, self._labels = {}, collections.defaultdict(list)
        for entry, record in zip(every.entries, every, strict=True):
            digest = hashlib.sha256(record.image_HWC.tobytes()).digest()
            self._digest[entry["file"]] = digest
            self._labels[digest].append(entry)
        self.taught = lists["train"].entries
        seen = {self._digest[p["file"]] for p in self.taught}
        known = {p["family"] for p in self.taught}
        self.heldout, self.others = (
            [p for p in entries if self._digest[p["file"]] not in seen]
            for entries in (
                lists["heldout_skin_tone"].entries,
                [p for p in every.entries if p["group"] == "people" and p["family"] not in known],
            )
        )

    def twins(self, picture: dict) -> list[dict]:
        """The entries of all pictures with the same pixels, itself among them."""
        return self._labels[self._digest[picture["file"]]]


def answer(kind: str, tone: str, twins: list[dict]) -> str:
    """The answer that holds for all entries of the same picture; "" if there is none."""
    answers = {KINDS[kind].answer(picture, tone) for picture in twins}
    return answers.pop() if len(answers) == 1 else ""


def teach(members: list[dict], pictures: Pictures, random: np.random.Generator) -> Iterator[dict]:
    """A conversation about each picture that a question can be asked about: file, messages, and
    the `kinds` of its questions. One is about the skin tone, if there is one; the order differs."""
    for picture in members:
        kinds, messages = [], []
        first = random.choice(["tone", "tone_check"])
        for kind in random.permutation([first, "who", "shown"]).tolist():
            wording = random.choice(KINDS[kind].wordings)
            if turn := _question(kind, str(wording), picture, pictures, random):
                kinds.append(kind)
                messages += [dict(role=role, content=text)
                             for role, text in zip(("user", "assistant"), turn, strict=True)]
        if messages:
            yield dict(file=picture["file"], messages=messages, kinds=kinds)


def ask(
    name: str, members: list[dict], pictures: Pictures, known: set[str],
    random: np.random.Generator, untaught: bool = False,
) -> Iterator[dict]:  # fmt: skip
    """The questions of a set, each for itself; shown is asked where the family is `known`."""
    for picture in members:
        for kind, about in KINDS.items():
            wording = about.untaught if untaught else str(random.choice(about.wordings))
            turn = _question(kind, wording, picture, pictures, random)
            if turn and (kind != "shown" or turn[1] in known):
                yield dict(set=name, kind=kind, file=picture["file"], question=turn[0],
                           answer=turn[1])  # fmt: skip


def _question(
    kind: str, wording: str, picture: dict, pictures: Pictures, random: np.random.Generator
) -> tuple[str, str] | None:
    others = [tone for tone in TONES if tone != picture["tone"]]
    tone = picture["tone"] if random.random() < 0.5 else str(random.choice(others))
    found = answer(kind, tone, pictures.twins(picture))
    return (wording.format(tone=tone), found) if found else None
