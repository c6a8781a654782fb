"""Conversations as Emu3-Chat's prompt writes them, in pieces that keep the ids of the whole prompt.

    You are a helpful assistant. USER: [image]QUESTION. ASSISTANT: ANSWER<EOS>USER: QUESTION. ...

The period behind each question is Emu3's (its released processor always adds one); the turns after
the first are those of the chat template that is exported with a model (emu3_jax/processor.py). The
pieces are the head, then question and answer by turns. A piece ends where the image, an EOS or the
vocabulary's cutting rule ends one, so no token reaches over: before text alone, the head gives its
last blank to the question, as a cut never falls between a blank and the word after it. Special
strings in a conversation are plain text, though inference would read them as controls.

Two forms are read: "messages" [{"role": "user", "content": ...}, {"role": "assistant", ...}], whose
content is a text or a list of parts, and LLaVA's [{"from": "human", "value": ...}, {"from": "gpt",
...}], where "<image>" stands for the image. Blanks around a question or an answer are left out.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from emu3_jax import vocab as vocabulary
from emu3_jax.untrusted import short

_HEAD = "You are a helpful assistant. USER:"
_PLACEHOLDER = "<image>"
_FORMS = (("role", "content", ("user", "assistant")), ("from", "value", ("human", "gpt")))


class BadConversation(ValueError):
    """A value that is no conversation of one of the two forms."""


def conversation(value: Any, vocab: vocabulary.Vocab, image: bool) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a conversation's text (uint32), and the lengths of their pieces (int32).

    The pieces are (head, question, answer, question, answer, ...). With `image` one stands behind
    the head. EOS, which ends each answer, is not among the ids. Raises BadConversation.
    """
    return encode(read(value, image), vocab, image)


def is_conversation(value: Any) -> bool:
    """Whether a value is to be read as a conversation: a list, of whatever."""
    return isinstance(value, list)


def read(value: Any, image: bool = False) -> list[tuple[str, str]]:
    """Its questions and answers; BadConversation says what is wrong.

    With `image`, the first question may hold the image's placeholder, at its start or its end.
    """
    if not isinstance(value, list) or not value:
        raise BadConversation(f"{short(value)} is no list of turns")
    who, what, roles = _form(value[0])
    texts, placeholders = [], 0
    for number, turn in enumerate(value):
        if not isinstance(turn, dict) or who not in turn or what not in turn:
            raise BadConversation(f"turn {number + 1}, {short(turn)}, lacks {who!r} or {what!r}")
        if turn[who] != roles[number % 2]:
            raise BadConversation(
                f"turn {number + 1} has {who} {short(turn[who])}, expected {roles[number % 2]!r}: "
                f"{roles[0]} and {roles[1]} take turns, and Emu3's prompt has no other"
            )
        text, images = _text(turn[what], number)
        texts.append(text)
        placeholders += images
    if len(texts) % 2:
        raise BadConversation(f"{len(texts)} turns: the last question has no answer")
    if placeholders > int(image):
        room = "one image" if image else "none here"
        raise BadConversation(f"it has {placeholders} images; Emu3's prompt has {room}")
    return list(zip(texts[::2], texts[1::2], strict=True))


def encode(
    turns: list[tuple[str, str]], vocab: vocabulary.Vocab, image: bool
) -> tuple[np.ndarray, np.ndarray]:
    """What `conversation` gives, of the questions and answers that `read` gave."""
    head, before = (_HEAD + " ", "") if image else (_HEAD, " ")
    pieces = [head]
    for question, answer in turns:
        pieces += [f"{before}{question}. ASSISTANT:", f" {answer}"]
        before = "USER: "
    ids = [vocab.encode(piece) for piece in pieces]
    return np.concatenate(ids).astype(np.uint32), np.array([len(p) for p in ids], np.int32)


def prompt(
    turns: Sequence[tuple[str, str]], vocab: vocabulary.Vocab, block: np.ndarray | None = None
) -> list[int]:
    """The ids that an answer follows: BOS, questions and answers, of which the last is empty.

    `block` is the image or video in front of the first question. Raises BadConversation if a
    question is empty.
    """
    for number, (question, _) in enumerate(turns):
        if not question.strip():
            raise BadConversation(f"question {number + 1} is empty")
    turns = [(question.strip(), answer.strip()) for question, answer in turns]
    ids, lengths = encode(turns, vocab, block is not None)
    pieces = np.split(ids.astype(np.int64), np.cumsum(lengths)[:-1])
    found = [vocab.bos, *pieces[0], *(() if block is None else block)]
    for question, answer in zip(pieces[1::2], pieces[2::2], strict=True):
        found += [*question, *answer, vocab.eos]
    return [int(i) for i in found[: -1 - len(pieces[-1])]]


def _form(turn: Any) -> tuple[str, str, tuple[str, str]]:
    for form in _FORMS:
        if isinstance(turn, dict) and form[0] in turn:
            return form
    raise BadConversation(
        f"{short(turn)} is no turn; write {{'role', 'content'}} or LLaVA's {{'from', 'value'}}"
    )


def _text(content: Any, number: int) -> tuple[str, int]:
    """A turn's text without placeholders, and how many it had."""
    text, images = (content, 0) if isinstance(content, str) else _joined(content, number)
    text = text.strip()
    for cut in (text.removeprefix(_PLACEHOLDER), text.removesuffix(_PLACEHOLDER)):
        if number == 0 and cut != text:
            text, images = cut.strip(), images + 1
            break
    if not text:
        raise BadConversation(f"turn {number + 1} is empty")
    if _PLACEHOLDER in text:
        raise BadConversation(
            f"turn {number + 1} has {_PLACEHOLDER} elsewhere than around the first question"
        )
    return text, images


def _joined(parts: Any, number: int) -> tuple[str, int]:
    """The text of a content in parts, and how many images are among them."""
    if not isinstance(parts, list) or not all(isinstance(p, dict) and "type" in p for p in parts):
        raise BadConversation(f"turn {number + 1} says {short(parts)}, which is no text")
    kinds = [part["type"] for part in parts]
    images = kinds.count("image")
    texts = [p["text"] for p in parts if p["type"] == "text" and isinstance(p.get("text"), str)]
    if images + len(texts) < len(parts) or (images and number):
        raise BadConversation(
            f"turn {number + 1} has parts of type {', '.join(map(str, kinds))}; "
            "take text, and an image in the first question"
        )
    return "".join(texts), images
