"""The job specification: what it refuses and how it says so; the command that submits."""

import dataclasses
import fnmatch
import json
import pathlib
import re
import subprocess
import sys

import pytest

from emu3_jax import config
from launch import accelerators, spec, submit
from tests import toy

ROOT = pathlib.Path(__file__).parent.parent
JOBS = sorted(path.name for path in (ROOT / "launch" / "jobs").glob("*.py"))
SLICES = dict(accelerator="v5p", topology="4x4x4", slices=2, overrides=("mesh.data=2",))


def job(**fields) -> spec.Job:
    default = dict(name="emu3", config="configs/emu3_8b_stage1.py", image="R/emu3:1")
    return spec.Job(**default | dict(accelerator="v5p", topology="4x4x4") | fields)


@pytest.mark.parametrize(
    "fields, want",
    [
        (dict(name="Emu3_8b"), "name 'Emu3_8b': take at most 63 of a-z, 0-9 and -, with a letter "
                               "first and no - last"),
        (dict(accelerator="v7"), "accelerator 'v7' is not known; take one of v4, v5e, v5p, v6e, "
                                 "7x, h100, h100-mega, h200, cpu"),
        (dict(topology="4x4x6"), "v5p has no topology '4x4x6'; it has 2x2x1, 2x2x2, 2x2x4, 2x4x4 "
         "and AxBxC with A <= B <= C, multiples of 4, up to 8960 chips"),
        (dict(topology="8x4x4"), "v5p has no topology '8x4x4'; it has 2x2x1, 2x2x2, 2x2x4, 2x4x4 "
         "and AxBxC with A <= B <= C, multiples of 4, up to 8960 chips"),
        (dict(accelerator="v6e", topology="4x4x4"), "v6e has no topology '4x4x4'; it has 2x2, "
         "2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        (dict(topology=""), "v5p has no topology ''; it has 2x2x1, 2x2x2, 2x2x4, 2x4x4 "
         "and AxBxC with A <= B <= C, multiples of 4, up to 8960 chips"),
        (dict(accelerator="h200", nodes=2), "topology '4x4x4' and slices = 1 are of TPUs; h200 "
         "has nodes: set topology='' and slices=1"),
        (dict(slices=0), "slices = 0; take 1 or more"),
        (dict(accelerator="v6e", topology="2x2", slices=3), "slices = 3 of v6e 2x2, which is one "
         "host: several slices work together only from two hosts each; take 2x4 or slices=1"),
        (dict(nodes=2), "nodes = 2 is of GPUs; v5p 4x4x4 has 16 hosts: set nodes=1 and take a "
                        "larger topology or more slices"),
        (dict(accelerator="h200", topology="", nodes=0), "nodes = 0; take 1 or more"),
        (dict(restart=spec.Restart(max_restarts=-1)), "restart.max_restarts = -1; take 0 or more"),
        (dict(capacity=spec.Capacity("preemptible")), "capacity.model 'preemptible': take one of "
         "on_demand, reserved, spot, flex_start"),
        (dict(capacity=spec.Capacity("reserved")), "capacity.model 'reserved' with "
         "capacity.reservation '': a reservation goes with model='reserved', and that with a "
         "reservation"),
        (dict(capacity=spec.Capacity("spot", "mine")), "capacity.model 'spot' with "
         "capacity.reservation 'mine': a reservation goes with model='reserved', and that with a "
         "reservation"),
        (dict(env={"A-B": "1"}), "env 'A-B' is no name of a variable; take A-Z, 0-9 and _"),
        (dict(storage=spec.Storage(bucket="gs://b")), "storage.bucket 'gs://b': take the name "
                                                      "alone, as in emu3"),
        (dict(storage=spec.Storage(mount="gcs")), "storage.mount 'gcs': take a path such as /gcs"),
        (dict(storage=spec.Storage("gs://b/runs/a")), "storage.run_dir 'gs://b/runs/a' is a URL; "
         "take a path, as in /gcs/runs/a"),
        (dict(storage=spec.Storage("runs/a", bucket="b")), "storage.run_dir 'runs/a' is not in the "
         "bucket, and a restart would not find it; take a path under /gcs"),
        (dict(overrides=("stepz=3",)), "--config.stepz: Train has no field 'stepz'; did you mean "
                                       "'steps'?"),
        (dict(config="configs/emu.py"), "--config=configs/emu.py: no such file"),
        (dict(overrides=("mesh.tensor=3",)), "configs/emu3_8b_stage1.py: mesh "
         "data=1*fsdp=-1*context=1*tensor=3 does not fit the 64 devices of v5p 1 x 4x4x4; the "
         "product must be 64 (-1 takes what is left): add an override such as mesh.fsdp=-1"),
        (dict(overrides=("mesh.fsdp=32",)), "configs/emu3_8b_stage1.py: mesh "
         "data=1*fsdp=32*context=1*tensor=1 does not fit the 64 devices of v5p 1 x 4x4x4; the "
         "product must be 64 (-1 takes what is left): add an override such as mesh.fsdp=-1"),
        (dict(accelerator="h200", topology="", nodes=3, overrides=("mesh.context=16",)),
         "configs/emu3_8b_stage1.py: mesh data=1*fsdp=-1*context=16*tensor=1 does not fit the 24 "
         "devices of h200 3 nodes; the product must be 24 (-1 takes what is left): add an override "
         "such as mesh.fsdp=-1"),
        (dict(slices=2), "configs/emu3_8b_stage1.py: mesh.data = 1 does not split over 2 slices; "
                         "add the override mesh.data=2"),
    ],
)  # fmt: skip
def test_what_can_run_nowhere(fields, want, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError) as error:
        job(**fields).check()
    assert str(error.value) == want


def test_counts():
    """Hosts and devices, as the vendors' tables have them; 7x has two devices a chip."""
    cases = [("v4", "2x2x2", 1, 2, 8), ("v5e", "16x16", 2, 64, 512), ("v6e", "2x2", 1, 1, 4),
             ("v5p", "16x16x24", 1, 1536, 6144), ("7x", "4x4x8", 2, 32, 512)]  # fmt: skip
    for name, topology, slices, hosts, devices in cases:
        made = job(accelerator=name, topology=topology, slices=slices)
        assert (made.hosts, made.devices) == (hosts, devices), name
    made = job(accelerator="h200", topology="", nodes=4)
    assert (made.hosts, made.devices) == (4, 32)
    made = job(accelerator="cpu", topology="", local=spec.Local(processes=2, devices=3))
    assert made.devices == 6


def test_topologies():
    """Those of the vendors' tables are there, each once; none is beyond the pod."""
    tables = dict(v4="2x2x1 4x4x8 8x8x12 8x16x16", v5e="2x4 16x16", v6e="2x2 8x16",
                  v5p="2x4x4 8x8x8 16x16x24", **{"7x": "2x2x4 8x8x16 16x16x16"})  # fmt: skip
    assert tables.keys() == accelerators.TPUS.keys()
    for name, some in tables.items():
        found = accelerators.TPUS[name].topologies()
        assert {*some.split()} <= {*found} and len({*found}) == len(found)
        sizes = [accelerators.chips(topology) for topology in found]
        assert sizes == sorted(sizes) and sizes[-1] <= max(accelerators.TPUS[name].most, 256)


def test_the_command_and_its_variables():
    made = job(
        overrides=("steps=3", "mesh.data=2"), env=dict(A="b", EMU3_INITIALIZATION_TIMEOUT="9"),
        storage=spec.Storage("/gcs/runs/emu3", xla_cache="/gcs/xla"),
    )  # fmt: skip
    assert made.command("py") == [
        "py", "-u", "-m", "emu3_jax.launch", "--config=configs/emu3_8b_stage1.py",
        "--config.run_dir=/gcs/runs/emu3", "--config.steps=3", "--config.mesh.data=2",
    ]  # fmt: skip
    assert made.environment() == dict(
        EMU3_INITIALIZATION_TIMEOUT="9", JAX_COMPILATION_CACHE_DIR="/gcs/xla", A="b"
    )
    assert job().environment() == dict(EMU3_INITIALIZATION_TIMEOUT="1800")


def test_a_job_without_a_mesh_runs_anywhere(monkeypatch):
    monkeypatch.chdir(ROOT)
    job(config="configs/convert.py").check()
    job(**SLICES).check()


@pytest.mark.parametrize("name", JOBS)
def test_every_job_file_can_be_submitted(name, monkeypatch, capsys):
    """By the commands in its docstring."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "launch" / "jobs" / name).read_text()
    lines = [line.split() for line in text.splitlines() if "-m launch.submit" in line]
    assert lines
    for line in lines:
        argv = line[line.index("launch.submit") + 1 :]
        assert argv[0].partition(":")[0] == f"--job=launch/jobs/{name}"
        assert submit.main([*argv, "--dry-run"]) == 0
        out, err = capsys.readouterr()
        assert err == "" and "emu3_jax.launch" in out
        assert "FILE" not in out  # but the file that was given
        assert out.startswith("# runs/launch/")
        parts = [line for line in out.splitlines() if line.startswith("# to ")]
        assert parts == ["# to submit", "# to watch", "# to cancel", "# to resume"]


def test_what_a_user_gets_wrong_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    file = "--job=launch/jobs/emu3_8b_stage1.py"
    other = tmp_path / "other.py"
    other.write_text("from tests import toy\ndef get_job():\n    return toy.Job()\n")
    ends = "want one --to=BACK_END, of gke, xmanager, tpu_vm, slurm, local"
    cases = {
        (file,): f"no --to; {ends}",
        (file, "--to=k8s"): f"--to=k8s; {ends}",
        (file, "--to", "gke"): f"--to; {ends}",
        (file, "--to=gke", "--to=local"): f"--to=gke --to=local; {ends}",
        ("--to=gke",): "want one --job=FILE, as in --job=launch/jobs/emu3_8b_stage1.py",
        (file, "--to=gke", "--job.slice=3"): "--job.slice: Job has no field 'slice'; did you mean "
                                             "'slices'?",
        (file, "--to=gke", "--job.topology=4x4x5"): "v5p has no topology '4x4x5'; it has 2x2x1, "
        "2x2x2, 2x2x4, 2x4x4 and AxBxC with A <= B <= C, multiples of 4, up to 8960 chips",
        (file, "--to=gke", "--dryrun"): "--dryrun: want --job=FILE and --job.FIELD=VALUE only",
        (f"--job={other}", "--to=gke"): "get_job() returned Job; want a launch.spec.Job",
    }  # fmt: skip
    assert toy.Job is not spec.Job
    for argv, want in cases.items():
        assert submit.main(list(argv)) == 2, argv
        assert capsys.readouterr() == ("", f"error: {want}\n")


def test_what_is_submitted_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec.write(job(), {"a.txt": "b"})
    assert (spec.folder(job()) / "a.txt").read_text() == "b"


def test_the_command_line_changes_fields(monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = ["--job=launch/jobs/emu3_8b_stage1.py", "--job.slices=4", "--job.capacity.model=spot",
            "--job.capacity.reservation=", "--job.overrides=('mesh.data=4','steps=9')"]  # fmt: skip
    made = config.load(argv, "job")
    default = config.load(argv[:1], "job")
    assert made == dataclasses.replace(
        default, slices=4, capacity=spec.Capacity("spot"), overrides=("mesh.data=4", "steps=9")
    )


def test_launching_loads_no_jax():
    """Nor XManager: a submission fails early, and says why, without any of them."""
    apart = ("__init__", "experiment")
    names = [path.stem for path in (ROOT / "launch").glob("*.py") if path.stem not in apart]
    lines = [f"import launch.{name}" for name in names]
    code = "\n".join(["import sys", *lines, "print({'jax', 'xmanager'} & {*sys.modules})"])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True
    )
    assert done.stdout == "set()\n"


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest of the line) of the Dockerfile."""
    text = (ROOT / "launch" / "Dockerfile").read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def ignored(path: str) -> bool:
    """Whether the builder of the image does not see a file or directory of the root."""
    patterns = (ROOT / ".dockerignore").read_text().split()
    return any(fnmatch.fnmatch(path, pattern.removeprefix("**/")) for pattern in patterns)


def test_the_image_has_the_repository_and_what_the_lock_says():
    """In the directory in which the command runs; nothing is added or left out on the way."""
    said = instructions()
    copied = [rest.split()[:-1] for name, rest in said if name == "COPY"]
    assert copied == [["requirements.lock"], ["."]]
    assert (ROOT / "requirements.lock").exists() and not ignored("requirements.lock")
    (installs,) = [rest for _, rest in said if rest.startswith("pip install")]
    assert installs == 'pip install --no-cache-dir -r requirements.lock "jax[${JAX}]"'
    names = [name for name, _ in said]
    assert names.index("WORKDIR") < names.index("COPY")
    kept = "emu3_jax", "configs", "data_pipelines", "launch", "tokenizer", "inference", "demo"
    assert not any(ignored(name) for name in (*kept, "README.md"))
    (marks,) = re.findall("^jax==.*; (.*)$", (ROOT / "requirements.lock").read_text(), re.M)[:1]
    assert marks == "python_full_version < '3.12'" and dict(said)["FROM"] == "python:3.11-slim"


def test_the_image_has_nothing_of_this_machine():
    ours = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    for name in (*ours, ".git", "stores", ".venv", ".venv-ingest", ".venv-launch"):
        assert ignored(name.replace("*", "a")), name


def test_the_image_starts_python_itself():
    """No shell takes its signals; relative paths lead where the bucket is mounted."""
    said = dict(instructions())
    assert "ENTRYPOINT" not in said
    assert json.loads(said["CMD"]) == job().command()[:4]
    mount = spec.Storage().mount
    assert ("ARG", f"MOUNT={mount}") in instructions()
    links = re.findall(r"ln -s \$\{MOUNT\}/(\w+) (\w+)", said["RUN"])
    assert links == [("stores", "stores"), ("runs", "runs")]
