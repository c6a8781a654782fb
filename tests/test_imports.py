"""Imports go one way, and every config builds."""

import ast
import dataclasses
import pathlib
import runpy

import jax
import pytest

from emu3_jax import mesh, train

ROOT = pathlib.Path(__file__).parent.parent
# What each folder may import of the others.
ALLOWED = {
    "emu3_jax": set(),
    "tokenizer": {"emu3_jax"},
    "data_pipelines": {"tokenizer", "emu3_jax"},
    "inference": {"data_pipelines", "tokenizer", "emu3_jax"},
    "demo": {"inference", "data_pipelines", "tokenizer", "emu3_jax"},
    "configs": {"demo", "inference", "data_pipelines", "tokenizer", "emu3_jax"},
    "launch": {"emu3_jax"},
}
# What launch may import of the project: neither of them loads JAX.
LAUNCH = {"emu3_jax.config", "emu3_jax.exit_codes", "launch"}
OURS = {*ALLOWED, "benchmarks", "tests"}
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


def imported(source: str) -> set[str]:
    """The first names of everything that a file imports, wherever in it."""
    return {name.partition(".")[0] for name in modules(source)}


def modules(source: str) -> set[str]:
    """Everything that a file imports: a from-import counts with each name that it takes."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports start at the root"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_rule_itself():
    source = "import os.path, emu3_jax.mesh\ndef f():\n    from tokenizer.vq import VQ\n"
    assert imported(source) == {"os", "tokenizer", "emu3_jax"}
    assert modules(source) == {"os.path", "tokenizer.vq.VQ", "emu3_jax.mesh"}


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_one_way(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        wrong = imported(path.read_text()) & OURS - ALLOWED[folder] - {folder}
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_launching_imports_what_loads_no_jax():
    for path in (ROOT / "launch").rglob("*.py"):
        ours = {name for name in modules(path.read_text()) if name.partition(".")[0] in OURS}
        wrong = {name for name in ours if name not in LAUNCH and not name.startswith("launch.")}
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_training_needs_neither_tensorflow_nor_torch():
    """Nor transformers: they are for tests and for reading other data."""
    for folder in ALLOWED:
        for path in (ROOT / folder).rglob("*.py"):
            heavy = imported(path.read_text()) & {"tensorflow", "torch", "transformers"}
            assert not heavy, f"{path.relative_to(ROOT)} imports {', '.join(sorted(heavy))}"


def jobs(config) -> list[train.Train]:
    """Every training job in a config."""
    if isinstance(config, train.Train):
        return [config]
    if not dataclasses.is_dataclass(config):
        return []
    return [j for f in dataclasses.fields(config) for j in jobs(getattr(config, f.name))]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds(name):
    """A job comes of it, and whatever it trains has shapes."""
    path = ROOT / "configs" / name
    module = runpy.run_path(str(path))
    assert f"configs/{name}" in module["__doc__"], "its docstring shows the command"
    job = module["get_config"]()
    assert dataclasses.is_dataclass(job) and callable(job.run)
    for training in jobs(job):
        with jax.set_mesh(mesh.Mesh().make(axis_type=training.task.axis_type)):
            weights, _ = jax.eval_shape(training.task.init, jax.random.key(0))
        assert jax.tree.leaves(weights)
        rate = training.optimizer.schedule(training.steps)(0)
        assert rate <= training.optimizer.rate
