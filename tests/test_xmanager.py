"""XManager for real, in .venv-launch: processes of this machine, and JobSets. `make
test-all` makes that environment."""

import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import pytest

from launch import gke, spec, xmanager
from tests import fake_kubernetes

ROOT = pathlib.Path(__file__).parent.parent
PYTHON = ROOT / ".venv-launch" / "bin" / "python"
needs_xmanager = pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-launch; `make launch`")
CONFIG = """
    import dataclasses, os, pathlib, sys

    @dataclasses.dataclass
    class Job:
        run_dir: str = ""
        fails: int = -1

        def run(self):
            import jax
            index = os.environ["EMU3_PROCESS_ID"]
            counts = f"{jax.process_count()} {jax.device_count()} {os.environ['WORD']}"
            pathlib.Path(self.run_dir, f"process{index}").write_text(counts)
            if int(index) == self.fails:
                raise ValueError("told to fail")

    def get_config():
        return Job()
"""


@pytest.fixture
def run(tmp_path):
    """Runs this Python code with XManager in a directory of its own; what it printed."""
    (tmp_path / "config.py").write_text(textwrap.dedent(CONFIG))

    def start(code: str, status: int = 0, **environ):
        environ = os.environ | dict(HOME=str(tmp_path), PYTHONPATH=str(ROOT)) | environ
        environ.pop("XLA_FLAGS", None)
        done = subprocess.run(
            [PYTHON, "-c", textwrap.dedent(code)], cwd=tmp_path, env=environ, text=True,
            capture_output=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout, done.stderr

    return start


LOCAL = """
    import sys
    from launch import spec, xmanager
    job = spec.Job("toy", "config.py", env=dict(WORD="w"), storage=spec.Storage("."),
                   local=spec.Local(processes=2, devices=2), overrides={overrides})
    job.check()
    sys.exit(xmanager.submit(job))
"""


@pytest.mark.slow
@needs_xmanager
def test_processes_of_this_machine(run, tmp_path):
    """Two of them are one run, and a failure of one is XManager's."""
    run(LOCAL.format(overrides=()))
    for index in range(2):
        assert (tmp_path / f"process{index}").read_text() == "2 4 w"
    out, err = run(LOCAL.format(overrides=("fails=1",)), status=1)
    assert "error: told to fail" in out
    assert err.splitlines()[-1].endswith("returned non-zero code: 2")


SWEEP = """
    import asyncio, dataclasses, sys
    from absl import flags
    from xmanager import xm, xm_local
    from launch import experiment, gke, spec

    flags.FLAGS(["launcher"])
    job = spec.Job("emu3", "config.py", accelerator="h200", nodes=2, image="R/emu3:1",
                   storage=spec.Storage("/gcs/runs/emu3", bucket="b"),
                   gke=spec.Gke(service_account="emu3-train"))
    with xm_local.create_experiment("sweep") as found:
        for fails in (3, 4):
            one = dataclasses.replace(job, name=f"emu3-{{fails}}")
            found.add(xm.Job(experiment.Image("emu3"), experiment.JobSet(one),
                             args={{"fails": fails}}, env_vars={{"WORD": "w"}}))
    handle = experiment.Handle(one)
    assert handle.get_status().is_active
    {then}
"""


def jobset(fails: int) -> dict:
    return gke.manifest(spec.Job(
        f"emu3-{fails}", "config.py", (f"fails={fails}",), "h200", nodes=2, image="R/emu3:1",
        storage=spec.Storage("/gcs/runs/emu3", bucket="b"), env=dict(WORD="w"),
        gke=spec.Gke(service_account="emu3-train"),
    ))  # fmt: skip


@pytest.mark.slow
@needs_xmanager
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")
def test_jobsets(run, tmp_path):
    """Each work unit of a sweep becomes one; its handle knows how it is, and ends it."""
    with fake_kubernetes.serve(tmp_path) as (kubeconfig, jobsets):
        run(SWEEP.format(then=""), KUBECONFIG=str(kubeconfig))
        assert jobsets == {("default", f"emu3-{fails}"): jobset(fails) for fails in (3, 4)}
        again = SWEEP.split("with")[0].format() + """
    one = dataclasses.replace(job, name="emu3-4")
    handle = experiment.Handle(one)
    assert handle.get_status().is_failed
    try:
        asyncio.run(handle.wait())
    except RuntimeError as error:
        assert str(error) == "JobSet emu3-4 failed"
    else:
        sys.exit("it did not fail")
    asyncio.run(experiment.Handle(dataclasses.replace(job, name="emu3-3")).wait())
    handle.stop()
    sys.exit(experiment.launch(dataclasses.replace(job, name="emu3-3")))
"""
        jobsets["default", "emu3-3"]["status"] = dict(terminalState="Completed")
        jobsets["default", "emu3-4"]["status"] = dict(terminalState="Failed")
        _, err = run(again, KUBECONFIG=str(kubeconfig), status=1)
        assert list(jobsets) == [("default", "emu3-3")]
        assert err.splitlines()[-1].endswith('jobsets "emu3-3" already exists')


def test_without_xmanager(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "xmanager", None)
    monkeypatch.delitem(sys.modules, "launch.experiment", raising=False)
    with pytest.raises(ValueError, match="^XManager is not installed here; `make launch`"):
        xmanager.submit(spec.Job("toy", "config.py"))
    assert list(tmp_path.iterdir()) == []


def test_a_jobset_is_the_one_of_gke():
    made = spec.Job("emu3", "config.py", accelerator="v5p", topology="4x4x4", image="R/emu3:1")
    assert xmanager.render(made) == gke.render(made)
    assert xmanager.commands(made).cancel == gke.commands(made).cancel
