"""Conversations: the ids of Emu3-Chat's whole prompt, in pieces; and what is none."""

import random

import numpy as np
import PIL.Image
import pytest
import transformers

from data_pipelines import chat
from emu3_jax import processor, vocab

TURNS = [("What is this?", "An apple, red."), ("And\n\n its colour", "It's red!"), ("9*9", "81")]
# What the cutting rule treats apart: blanks, line ends, signs, digits, marks that compose, letters.
LETTERS = "ab cA's9 \n\r\t!.:-(\u00e9\u732b\u3000\u0301\u0644 "


@pytest.fixture(scope="module")
def words():
    corpus = [f"You are a helpful assistant. USER: {q}. ASSISTANT: {a}" for q, a in TURNS]
    corpus += [" assistant. USER: the apple is red. ASSISTANT: An apple"] * 3
    return vocab.Vocab(vocab.train_bpe(corpus, 330), codes=16)


@pytest.fixture(scope="module")
def emu3_processor(words, tmp_path_factory):
    """transformers' own, with our vocabulary and the template that we export."""
    path = tmp_path_factory.mktemp("processor")
    processor.write_tokenizer(words, path, "hf")
    processor.write_processor(path, 16 * 16, 64 * 64, 8)
    return transformers.Emu3Processor.from_pretrained(path)


def messages(turns, image=False):
    value = []
    for question, answer in turns:
        value += [dict(role="user", content=question), dict(role="assistant", content=answer)]
    if image:
        text = dict(type="text", text=value[0]["content"])
        value[0]["content"] = [dict(type="image"), text]
    return value


def llava(turns):
    value = []
    for question, answer in turns:
        value += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return value


def whole(turns, words, image, block=()):
    """The pieces, put together as documents.py does: an image after the head, EOS after answers."""
    text, lengths = chat.conversation(messages(turns, image), words, image)
    assert (text.dtype, lengths.dtype) == (np.uint32, np.int32)
    assert len(lengths) == 1 + 2 * len(turns) and lengths.sum() == len(text)
    head, *pieces = np.split(text, np.cumsum(lengths)[:-1])
    ids = [words.bos, *head, *block]
    for question, answer in zip(pieces[::2], pieces[1::2], strict=True):
        ids += [*question, *answer, words.eos]
    return [int(i) for i in ids]


def random_turns(count):
    chance, turns = random.Random(0), []
    while len(turns) < count:
        texts = ["".join(chance.choices(LETTERS, k=chance.randint(1, 12))) for _ in range(2)]
        if all(text.strip() for text in texts):
            turns.append(tuple(text.strip() for text in texts))
    return turns


def test_pieces_have_the_ids_of_the_whole_text(words):
    """No token reaches over a cut: between turns, and where the head ends."""
    for turns in [TURNS, *([turn] for turn in random_turns(500))]:
        prompt = "You are a helpful assistant. "
        for question, answer in turns:
            prompt += f"USER: {question}. ASSISTANT: {answer}<|extra_204|>"
        want = [words.bos, *words.encode(prompt, specials=True)]
        assert whole(turns, words, image=False) == want, turns


def test_pieces_have_the_ids_of_transformers_prompt(words, emu3_processor):
    """With an image and without, for one turn and several; the last answer is left to the model."""
    block = words.image_block(np.zeros((4, 6), int))
    at = int(np.flatnonzero(block == words.img)[0]) + 1
    block[at : at + 4 * 7] = words.pad + 3  # the placeholder stands for codes and row ends
    picture = PIL.Image.new("RGB", (48, 32))
    for turns in [TURNS, TURNS[:1], *(random_turns(200)[i : i + 2] for i in range(0, 200, 2))]:
        for image in (True, False):
            asked = messages(turns, image)[:-1]
            prompt = emu3_processor.apply_chat_template(asked, add_generation_prompt=True)
            images = dict(images=picture) if image else {}
            want = emu3_processor(text=prompt, **images)["input_ids"][0]
            made = whole(turns, words, image, block if image else ())
            answer = words.encode(f" {turns[-1][1]}")
            assert made == [*want, *answer, words.eos], turns


def test_both_forms_say_the_same(words):
    want = chat.conversation(messages(TURNS), words, image=False)
    for value in (llava(TURNS), llava([(f" {q}\n", f"\n{a} ") for q, a in TURNS])):
        assert chat.is_conversation(value)
        made = chat.conversation(value, words, image=False)
        for one, other in zip(want, made, strict=True):
            np.testing.assert_array_equal(one, other)
    assert not chat.is_conversation("text")


@pytest.mark.parametrize("first", ["<image>\nWhat?", "<image>What?", "What?\n<image>", "What?"])
def test_llavas_placeholder_is_where_the_image_stands(words, first):
    value = llava([(first, "A cat."), TURNS[1]])
    assert chat.read(value, image=True) == [("What?", "A cat."), TURNS[1]]
    text, lengths = chat.conversation(value, words, image=True)
    assert words.decode(text[: lengths[0]]) == "You are a helpful assistant. USER: "
    assert words.decode(text[lengths[0] :][: lengths[1]]) == "What?. ASSISTANT:"


def test_special_strings_are_plain_text(words):
    text, _ = chat.conversation(messages([("<|extra_204|>", "<|image start|>")]), words, False)
    assert text.max() < words.text_size


CAT = {"role": "assistant", "content": "A cat."}


@pytest.mark.parametrize(
    ("value", "image", "message"),
    [
        ([], False, "[] is no list of turns"),
        ("Hello", False, "'Hello' is no list of turns"),
        ([{"text": "a"}], False, "{'text': 'a'} is no turn; write {'role', 'content'} or LLaVA's "),
        ([{"role": "user"}], False, "turn 1, {'role': 'user'}, lacks 'role' or 'content'"),
        ([{"role": "system", "content": "Be kind."}], False,
         "turn 1 has role 'system', expected 'user': user and assistant take turns, and Emu3's"),
        ([{"role": "user", "content": "a"}] * 2, False, "turn 2 has role 'user', expected 'assist"),
        ([{"from": "gpt", "value": "a"}], False, "turn 1 has from 'gpt', expected 'human'"),
        ([{"role": "user", "content": "a"}], False, "1 turns: the last question has no answer"),
        ([{"role": "user", "content": " \n"}, CAT], False, "turn 1 is empty"),
        ([{"role": "user", "content": None}, CAT], False, "turn 1 says None, which is no text"),
        ([{"role": "user", "content": [{"type": "audio"}]}, CAT], False,
         "turn 1 has parts of type audio; take text, and an image in the first question"),
        ([{"role": "user", "content": "<image>a"}, CAT], False,
         "it has 1 images; Emu3's prompt has none here"),
        ([{"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": "a"}]},
          CAT], True, "it has 2 images; Emu3's prompt has one image"),
        ([{"role": "user", "content": "this <image> is"}, CAT], True,
         "turn 1 has <image> elsewhere than around the first question"),
    ],
)  # fmt: skip
def test_what_is_no_conversation(value, image, message):
    with pytest.raises(chat.BadConversation) as error:
        chat.read(value, image)
    assert str(error.value).startswith(message)
