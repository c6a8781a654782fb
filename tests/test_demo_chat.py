"""The demo of questions: answers are true, nothing held out is taught, what is right is counted."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import PIL.Image
import pytest

from configs import demo, demo_chat
from data_pipelines import image_folder
from data_pipelines.openmoji import TONES
from demo import answers, questions
from emu3_jax import vocab
from tests import toy
from tokenizer import convert, exchange, vq
from tokenizer.config import VQConfig

FAMILIES = ("man dancing", "woman dancing", "person in bed", "cook", "man cook")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The questions about small pictures, and their labels by file: a cook and a man cook of one
    tone look the same, and "girl" is in no list but that of all."""
    folder = tmp_path_factory.mktemp("pictures")
    labels, random = {}, np.random.default_rng(0)
    for family in (*FAMILIES, "girl"):
        for tone in ("", *TONES):
            file = f"{family}-{tone}.png"
            image_HWC = random.integers(0, 256, (32, 32, 3), np.uint8)
            if family == "man cook":
                image_HWC = image_folder.read_image(folder / f"cook-{tone}.png")
            PIL.Image.fromarray(image_HWC).save(folder / file)
            labels[file] = dict(file=file, family=family, tone=tone, group="people")
    heldout = [p for p in labels.values() if p["family"] == "man dancing" and p["tone"] == "dark"]
    heldout += [p for p in labels.values() if p["family"] == "man cook" and p["tone"] == "light"]
    train = [p for p in labels.values() if p not in heldout and p["family"] != "girl"]
    for name, members in dict(
        captions=labels.values(), heldout_skin_tone=heldout, train=train
    ).items():
        lines = [json.dumps(p) + "\n" for p in members]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    questions.Questions(str(folder), str(folder / "made"), conversations=4).run()
    return folder, labels


def taught(folder) -> list[tuple[str, str, str, str]]:
    """(file, kind, question, answer) of each turn that is taught."""
    lines = (folder / "made" / "train.jsonl").read_text().splitlines()
    found = []
    for entry in map(json.loads, lines):
        said = [turn["content"] for turn in entry["messages"]]
        assert [turn["role"] for turn in entry["messages"]] == ["user", "assistant"] * (
            len(said) // 2
        )
        found += [(entry["file"], *turn)
                  for turn in zip(entry["kinds"], said[::2], said[1::2], strict=True)]  # fmt: skip
    return found


def asked(folder) -> list[dict]:
    return json.loads((folder / "made" / "asked.json").read_text())["asked"]


def test_answers_are_what_the_labels_say(made):
    folder, labels = made
    turns = taught(folder)
    turns += [(e["file"], e["kind"], e["question"], e["answer"]) for e in asked(folder)]
    kinds = set()
    for file, kind, question, answer in turns:
        label = labels[file]
        kinds.add((kind, answer))
        if kind == "tone":
            assert answer == label["tone"]
        elif kind == "shown":
            assert answer == label["family"]
        elif kind == "who":
            assert answer in ("man", "woman", "person") and answer == label["family"].split()[0]
        else:
            (tone,) = [t for t in TONES if f" {t} " in f" {question} ".replace("?", " ")]
            assert answer == ("yes" if tone == label["tone"] else "no")
    assert {("tone_check", "yes"), ("tone_check", "no"), ("who", "woman")} <= kinds


def test_a_question_that_the_pixels_do_not_answer_is_not_asked(made):
    folder, _ = made
    cooks = {(kind, file[:3]) for file, kind, _, _ in taught(folder) if "cook" in file}
    assert cooks == {(kind, who) for kind in ("tone", "tone_check") for who in ("coo", "man")}


def test_nothing_held_out_is_taught_not_even_as_another_file(made):
    folder, labels = made
    pixels = {file: image_folder.read_image(folder / file).tobytes() for file in labels}
    seen = {pixels[file] for file, *_ in taught(folder)}
    files = {name: {e["file"] for e in asked(folder) if e["set"] == name}
             for name in questions.SETS}  # fmt: skip
    assert files["heldout"] == files["heldout_wording"] == {"man dancing-dark.png"}
    assert files["new_people"] == {f"girl-{tone}.png" for tone in TONES}
    for name in ("heldout", "new_people"):
        assert not seen & {pixels[file] for file in files[name]}


def test_wordings_that_are_not_taught_are_asked_of_their_set_alone(made):
    folder, _ = made
    new = {kind.untaught.format(tone=tone) for kind in questions.KINDS.values() for tone in TONES}
    assert not new & {question for _, _, question, _ in taught(folder)}
    for entry in asked(folder):
        assert (entry["question"] in new) == (entry["set"] == "heldout_wording")


def test_questions_are_a_function_of_the_seed(made, tmp_path, capsys):
    folder, _ = made
    job = questions.Questions(str(folder), str(tmp_path / "again"), conversations=4)
    job.run()
    for name in ("train.jsonl", "asked.json"):
        assert (tmp_path / "again" / name).read_text() == (folder / "made" / name).read_text()
    job.run()
    assert capsys.readouterr().out.endswith("again: there\n")
    dataclasses.replace(job, directory=str(tmp_path / "other"), seed=1).run()
    assert (tmp_path / "other/train.jsonl").read_text() != (
        tmp_path / "again/train.jsonl"
    ).read_text()


def test_without_the_demo_it_says_what_to_run(tmp_path):
    with pytest.raises(ValueError) as error:
        questions.Questions(f"{tmp_path}/images", f"{tmp_path}/made").run()
    assert str(error.value) == (
        f"{tmp_path}/images holds no OpenMoji pictures; run make demo before this"
    )


def test_right_answers_and_chance_are_counted():
    def entry(answer, likeliest, sampled, kind="tone"):
        said = dict(likeliest=likeliest, sampled=sampled)
        return dict(set="heldout", kind=kind, answer=answer, said=said)

    answered = [
        entry("dark", "dark", "dark"), entry("dark", "medium-dark", "light"),
        entry("dark", "dark", "Dark"), entry("light", "light", ""),
        entry("man", "woman", "man", "who"),
    ]  # fmt: skip
    possible = dict(tone=list(TONES), who=["man", "woman", "person", "girl"])
    assert answers.figures(answered, possible) == {
        "heldout": {
            "tone": dict(questions=4, likeliest=0.75, sampled=0.25, best_constant=0.75,
                         uniform=0.2),
            "who": dict(questions=1, likeliest=0.0, sampled=1.0, best_constant=1.0, uniform=0.25),
        }
    }  # fmt: skip


def test_the_stages_begin_with_what_the_demo_leaves():
    job = demo_chat.get_config()
    assert job.names()[:3] == ["questions", "store", "decoder"]
    assert job.decoder.initial == "runs/demo/decoder"
    assert job.store.source.list == "../../demo_chat/questions/train.jsonl"
    assert job.decoder.task == demo.get_config("decoder").task


@pytest.mark.slow
def test_all_stages_with_models_that_learnt_nothing(made, tmp_path, capsys):
    start = tmp_path / "start"
    shutil.copytree(made[0], start / "images", ignore=shutil.ignore_patterns("made"))
    ranks = {bytes([byte]): byte for byte in range(256)}
    vocab.save_ranks(ranks, str(start / "vocab.tiktoken"))
    words = vocab.Vocab(ranks, demo.CODES)
    decoder = toy.model(vocab=words.size, first_visual=words.visual)
    config = VQConfig(codebook_size=demo.CODES, width=32, multipliers=(1, 1, 1), res_blocks=1,
                      attention_levels=())  # fmt: skip
    with jax.set_mesh(toy.Single().make()):
        exchange.save_run(str(start / "decoder"), decoder, *decoder.init(jax.random.key(0)))
        tokenizer = vq.merge(config, *vq.init(config, jax.random.key(1)))
        convert.save(tokenizer, start / "tokenizer")
    job = demo_chat.build(f"{tmp_path}/chat", str(start), steps=2)
    job.decoder.task, job.answer.batch, job.answer.length = decoder, 64, 4
    job.questions.conversations, job.questions.count = 1, 4
    job.run()
    values = json.loads((tmp_path / "chat/evaluation.json").read_text())
    assert values.keys() == questions.SETS.keys()
    for kinds in values.values():
        for figures in kinds.values():
            assert figures.keys() == answers.MEANING.keys()
    page = (tmp_path / "chat/report.html").read_text()
    answered = json.loads((tmp_path / "chat/answered.json").read_text())
    assert page.count("<div class=card>") == len({(e["set"], e["file"]) for e in answered})
    job.run()
    assert capsys.readouterr().out.endswith(f"complete: open {tmp_path}/chat/report.html\n")
