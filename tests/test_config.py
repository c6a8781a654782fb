"""The command line: overrides, what a user gets wrong, and configurations as JSON."""

import dataclasses
import json
import textwrap

import pytest

from emu3_jax import config, launch, optim, train
from tests import toy


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    """A config file that takes an argument."""
    path = tmp_path_factory.mktemp("configs") / "job.py"
    path.write_text(textwrap.dedent("""
        from tests import toy

        def get_config(steps="3"):
            return toy.Job(steps=int(steps))
    """))
    return str(path)


def load(file: str, *overrides: str) -> toy.Job:
    return config.load([f"--config={file}", *(f"--config.{o}" for o in overrides)])


def message(*argv: str) -> str:
    with pytest.raises(ValueError) as error:
        config.load(list(argv))
    return str(error.value)


def test_defaults_and_the_argument_of_the_file(file):
    assert dataclasses.asdict(load(file)) == dataclasses.asdict(toy.Job())
    assert load(f"{file}:8").steps == 8


@pytest.mark.parametrize(
    "override, field, value",
    [
        ("steps=9", "steps", 9),
        ("part.rate=1e-3", "rate", 1e-3),
        ("part.rate=2", "rate", 2.0),
        ("part.wide=true", "wide", True),
        ("part.wide", "wide", True),
        ("part.word=a b=c", "word", "a b=c"),
        ("part.limit=4", "limit", 4),
        ("part.names=('q','r')", "names", ("q", "r")),
        ("part.names=()", "names", ()),
        ("part.sizes=(4,5,6)", "sizes", (4, 5, 6)),
        ("part.sizes=4,5", "sizes", (4, 5)),
    ],
)
def test_an_override_changes_its_field_alone(file, override, field, value):
    got = dataclasses.asdict(load(file, override))
    want = dataclasses.asdict(toy.Job())
    (want if field in want else want["part"])[field] = value
    assert got == want
    changed = got[field] if field in got else got["part"][field]
    assert type(changed) is type(value)


def test_overrides_of_a_real_config():
    job = load("configs/demo.py", "decoder.steps=7", "decoder.task.dropout=0.3",
               "decoder.mesh.tensor=2", "tokenizer.optimizer.rate=1",
               "draw.lists=('a.jsonl',)")  # fmt: skip
    assert (job.decoder.steps, job.decoder.task.dropout) == (7, 0.3)
    assert job.decoder.mesh.tensor == 2 and job.tokenizer.mesh.tensor == 1
    assert job.tokenizer.optimizer.rate == 1.0 != job.decoder.optimizer.rate
    assert job.draw.lists == ("a.jsonl",)
    assert load("configs/demo.py:decoder", "steps=7").steps == 7


@pytest.mark.parametrize(
    "override, want",
    [
        ("stepz=3", "--config.stepz: Job has no field 'stepz'; did you mean 'steps'?"),
        ("part.ratte=3", "--config.part.ratte: Part has no field 'ratte'; did you mean 'rate'?"),
        ("zzz=3", "--config.zzz: Job has no field 'zzz'; it has part, steps, parts, fails"),
        ("steps.x=3", "--config.steps.x: int 3 has no fields"),
        ("steps=1.5", "--config.steps=1.5: invalid literal for int() with base 10: '1.5'"),
        ("steps=abc", "--config.steps=abc: invalid literal for int() with base 10: 'abc'"),
        ("part.rate=fast", "--config.part.rate=fast: could not convert string to float: 'fast'"),
        ("part.wide=maybe", "--config.part.wide=maybe: ('Non-boolean argument to boolean flag', "
                            "'maybe')"),
        ("steps", "Missing value for flag --config.steps"),
    ],
)  # fmt: skip
def test_a_wrong_override(file, override, want):
    assert message(f"--config={file}", f"--config.{override}") == want


def test_a_wrong_command(file, tmp_path):
    one = "want one --config=FILE, as in --config=configs/demo.py"
    assert message() == message("--config", file) == one
    assert message(f"--config={file}", f"--config={file}") == one
    assert message("--config=configs/demoo.py") == "--config=configs/demoo.py: no such file"
    assert message(f"--config={tmp_path}") == f"--config={tmp_path}: no such file"
    only = "want --config=FILE and --config.FIELD=VALUE only"
    assert message(f"--config={file}", "--steps=3") == f"--steps=3: {only}"
    assert message(f"--config={file}", "--config.steps=3", "stray") == f"stray: {only}"
    plain, empty = tmp_path / "plain.py", tmp_path / "empty.py"
    plain.write_text("def get_config():\n    return None\n")
    empty.write_text("")
    taken = f"--config={plain}:x: its get_config() takes no argument"
    assert message(f"--config={plain}:x") == taken
    missing = f"--config={empty}: it defines no get_config(); see configs/demo.py"
    assert message(f"--config={empty}") == missing


def test_launch_runs_the_job(file, capsys):
    assert launch.main([f"--config={file}", "--config.steps=4"]) == 0
    assert capsys.readouterr() == ("steps 4\n", "")


@pytest.mark.parametrize(
    "argv, want",
    [
        (["--config.stepz=3"], "error: --config.stepz: Job has no field 'stepz'; did you mean "
                               "'steps'?\n"),
        (["--config.fails=no such store"], "error: no such store\n"),
    ],
)  # fmt: skip
def test_what_a_user_causes_is_one_line_and_exit_code_2(file, argv, want, capsys, monkeypatch):
    monkeypatch.delenv("EMU3_JAX_TRACEBACK", raising=False)
    assert launch.main([f"--config={file}", *argv]) == 2
    assert capsys.readouterr() == ("", want)
    monkeypatch.setenv("EMU3_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError):
        launch.main([f"--config={file}", *argv])


def test_an_interruption_says_how_to_go_on(file, capsys):
    assert launch.main([f"--config={file}", "--config.fails=interrupt"]) == 130
    assert capsys.readouterr().err == (
        "\ninterrupted; the same command goes on from the last checkpoint\n"
    )


def test_a_defect_keeps_its_traceback(file, capsys):
    assert launch.main([f"--config={file}", "--config.fails=defect"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith("TypeError: a defect\n")


def test_several_processes_are_joined_where_a_scheduler_started_them(file, monkeypatch):
    joined = []
    monkeypatch.setattr(launch.jax.distributed, "initialize", lambda **_: joined.append(True))
    for name in ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS",
                 "TPU_WORKER_HOSTNAMES", "SLURM_NTASKS"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    cases = [("SLURM_NTASKS", "1", 0), ("SLURM_NTASKS", "2", 1), ("TPU_WORKER_HOSTNAMES", "a", 0),
             ("TPU_WORKER_HOSTNAMES", "a,b", 1), ("JAX_COORDINATOR_ADDRESS", "a:1", 1)]  # fmt: skip
    for name, value, count in cases:
        joined.clear()
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert launch.main([f"--config={file}"]) == 0
        assert len(joined) == count, (name, value)


def test_json_round_trip():
    """Classes, nested classes in tuples, None; through text."""
    parts = (toy.Part(rate=0.1 + 0.2), toy.Part(names=(), limit=3))
    for job in (
        toy.Job(parts=parts, part=toy.Part(word='"\u00e9')),
        train.Train(toy.model(), toy.Counting(poison=3), optimizer=optim.AdamW(rate=1e-5)),
    ):
        text = json.dumps(config.to_json(job))
        assert config.from_json(json.loads(text)) == job
    assert config.to_json(toy.Counting(length=4)) == {
        "class": "tests.toy:Counting", "length": 4, "seed": 0, "poison": -1, "poisoned": 1,
    }  # fmt: skip
    assert config.from_json({"a": [1, {"b": None}]}) == {"a": (1, {"b": None})}


@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "emu3_jaxx:Train", "builtins:"])
def test_a_foreign_class_is_refused(name):
    with pytest.raises(ValueError) as error:
        config.from_json({"part": {"class": name, "args": ["true"]}})
    assert str(error.value) == f"config names class {name!r}, which is not of this project"
