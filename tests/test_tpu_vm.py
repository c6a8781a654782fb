"""TPU VMs: golden files, gcloud's own check of command lines, and the script as a shell runs it."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess

import pytest

from emu3_jax import exit_codes
from launch import accelerators, spec, submit, tpu_vm
from tests import test_slurm

GOLDEN = pathlib.Path(__file__).parent / "golden" / "launch"


def job(accelerator: str = "v5p", **fields) -> spec.Job:
    default = dict(
        name="emu3", config="configs/emu3_8b_stage1.py", accelerator=accelerator, image="R/emu3:1",
        env={"A": "b c"}, overrides=("steps=7",), storage=spec.Storage("/gcs/a", bucket="b"),
        tpu_vm=spec.TpuVm(project="p", zone="z"),
    )  # fmt: skip
    return spec.Job(**default | fields)


CHECKOUT = spec.TpuVm(project="p", zone="z", runtime="tpu-ubuntu2204-base", directory="/repo dir",
                      setup=("true", "export C='d e'"))  # fmt: skip
JOBS = {  # every accelerator that has TPU VMs, and every field that shows
    "v4": job("v4", topology="2x2x1", image="", tpu_vm=CHECKOUT, storage=spec.Storage()),
    "v5e": job("v5e", topology="2x4", capacity=spec.Capacity("flex_start")),
    "v5p": job("v5p", topology="8x8x16", slices=12, capacity=spec.Capacity("reserved", "mine"),
               image="us-docker.pkg.dev/P/emu3/train:1", restart=spec.Restart(9, 200),
               tpu_vm=spec.TpuVm("p", "z", service_account="a@p.iam.gserviceaccount.com")),
    "v6e": job("v6e", topology="16x16", slices=2, capacity=spec.Capacity("spot")),
}  # fmt: skip


def script(asked: spec.Job) -> str:
    (text,) = tpu_vm.render(asked).values()
    return text


@pytest.mark.parametrize("name", JOBS)
def test_the_golden_file(name):
    """All that --dry-run shows."""
    text = submit.shown(JOBS[name], tpu_vm.render(JOBS[name]), tpu_vm.commands(JOBS[name]))
    path = GOLDEN / f"tpu_vm_{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), "on purpose? run once with UPDATE_GOLDEN=1 and read the diff"


def test_every_accelerator_with_tpu_vms_has_a_golden_file():
    having = {name for name, tpu in accelerators.TPUS.items() if tpu.runtime}
    assert {each.accelerator for each in JOBS.values()} == having
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {f"tpu_vm_{name}" for name in JOBS}


@pytest.mark.parametrize("name", JOBS)
def test_the_script_is_a_shell_script(name, tmp_path):
    test_slurm.assert_shell(script(JOBS[name]), tmp_path / "script")


def lint(lines: list[str], directory: pathlib.Path) -> list[str | None]:
    """What gcloud has against each of these command lines."""
    (directory / "lines.json").write_text(json.dumps([dict(command_string=x) for x in lines]))
    done = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={directory}/lines.json"],
        env=os.environ | dict(CLOUDSDK_CONFIG=str(directory)), check=True, capture_output=True,
    )  # fmt: skip
    return [found["error_message"] for found in json.loads(done.stdout)]


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="no gcloud")
def test_gcloud_takes_the_command_lines(tmp_path):
    """For every way to pay, one slice and several; it does find errors."""
    lines = {}
    for made in JOBS.values():
        commands = dataclasses.asdict(tpu_vm.commands(made))
        lines |= dict.fromkeys(line for several in commands.values() for line in several)
    assert lint([*lines], tmp_path) == [None] * len(lines)
    wrong = next(iter(lines)).replace("--node-id", "--node")
    (message,) = lint([wrong], tmp_path)
    assert "unrecognized arguments: --node" in message


def test_what_is_asked_of_cloud_tpu():
    """The type counts cores or chips; a reservation is asked for by its name."""
    created = {name: tpu_vm.commands(made).submit[0].split() for name, made in JOBS.items()}
    for name, want in dict(v4="v4-8", v5e="v5litepod-8", v5p="v5p-2048", v6e="v6e-256").items():
        assert f"--accelerator-type={want}" in created[name]
    assert "--node-id=emu3" in created["v5e"]
    assert {"--node-prefix=emu3", "--node-count=12"} < {*created["v5p"]}
    assert "--reservation=mine" in created["v5p"] and "--spot" in created["v6e"]


@pytest.mark.parametrize(
    "made, want",
    [
        (job("7x", topology="4x4x4"), "7x is not to be had as TPU VMs; take --to=gke"),
        (job("h200"), "accelerator 'h200' is no TPU; take one of v4, v5e, v5p, v6e"),
        (job("cpu"), "accelerator 'cpu' is no TPU; take one of v4, v5e, v5p, v6e"),
        (job(topology="4x4x4", tpu_vm=spec.TpuVm()),
         "tpu_vm.project is not set; set --job.tpu_vm.project="),
        (job(topology="4x4x4", tpu_vm=spec.TpuVm("p")),
         "tpu_vm.zone is not set; set --job.tpu_vm.zone="),
        (job(topology="4x8x16"), "topology '4x8x16': on TPU VMs, v5p-1024 is 8x8x8; take that, or "
                                 "--to=gke"),
        (job("v6e", topology="2x4", slices=2), "slices = 2 of v6e-8, which is one TPU VM: several "
         "slices work together only from two each; take a larger topology or slices=1"),
        (job(topology="4x4x4", image=""), "neither image nor tpu_vm.directory is set; take one "
         "built from launch/Dockerfile, as in us-docker.pkg.dev/PROJECT/emu3/train@sha256:..."),
        (job(topology="4x4x4", tpu_vm=CHECKOUT),
         "tpu_vm.directory and tpu_vm.setup are for jobs without image; set one"),
        (job(topology="4x4x4", storage=spec.Storage()), "storage.bucket is not set: a TPU VM's "
         "disk goes with it, and is no other's; set --job.storage.bucket="),
        (job("v6e", topology="2x2", capacity=spec.Capacity("spot"), storage=spec.Storage()),
         "storage.bucket is not set: a TPU VM's disk goes with it, and is no other's; set "
         "--job.storage.bucket="),
        (job(name=62 * "a", topology="4x4x4", slices=12), f"name '{62 * 'a'}' has 62 characters, "
         f"and the node {62 * 'a'}-11 has 65 of 63: shorten name to 60"),
    ],
)  # fmt: skip
def test_what_tpu_vms_do_not_have(made, want):
    with pytest.raises(ValueError) as error:
        tpu_vm.render(made)
    assert str(error.value) == want


METADATA = {
    "agent-worker-number": "1",
    "worker-network-endpoints": "n-0:0:10.0.0.5,n-1:1:10.0.0.6",
    "tpu-env": "ACCELERATOR_TYPE: 'v6e-16'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9:8080'\n"
               "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'",
}  # fmt: skip
FAKES = {
    "systemd-run": 'while [[ $1 = --* ]]; do shift; done; exec "$@"',
    "sleep": "exec /bin/sleep 0.05",
    "rm": 'echo "rm $*"',
    "gcsfuse": 'echo "gcsfuse $*"',
    "mountpoint": "exit 1",
    "umount": "exit 32",  # nothing was mounted
    "mkdir": "exit 0",
    # the one after the client that failed leaves its container
    "docker": 'if [ $1 = rm ]; then exit 1; fi; echo "docker $*"; exec process',
    "python": 'echo "python $*"; exec process',
}


@pytest.fixture
def boot(tmp_path):
    """Boots a machine whose process ends with each of these codes; what was said, and the code."""
    fakes, state, metadata = (tmp_path / name for name in ("bin", "state", "metadata"))
    for directory in (fakes, metadata):
        directory.mkdir()
    for name, text in FAKES.items():
        test_slurm.command_line(fakes, name, text)
    test_slurm.command_line(fakes, "curl", f"""
        url=${{@: -1}}
        cat "{metadata}/${{url##*/}}" || exit 22
    """)  # fmt: skip
    codes = tmp_path / "codes"
    test_slurm.command_line(fakes, "process", f"""
        read -r ending < {codes}
        sed -i 1d {codes}
        eval "$ending"
    """)  # fmt: skip

    def start(asked: spec.Job, *endings: str, **changed: str) -> tuple[list[str], int]:
        for key, value in (METADATA | changed).items():
            (metadata / key).write_text(value)
        codes.write_text("".join(f"{ending}\n" for ending in endings))
        file = tmp_path / "startup"
        file.write_text(script(asked))
        file.chmod(0o755)
        path = f"{fakes}:{os.environ['PATH']}"
        environ = os.environ | dict(PATH=path, STATE_DIRECTORY=str(state))
        done = subprocess.run([file], env=environ, text=True, capture_output=True, timeout=60)
        assert not codes.read_text(), "as many attempts as there are codes"
        return done.stdout.splitlines(), done.returncode

    return start


def ends(said: list[str]) -> list[str]:
    """The supervisor's own lines."""
    return [line for line in said if line.startswith(("ended", "all steps", "told"))]


SMALL = JOBS["v4"]


@pytest.fixture
def checkout(tmp_path):
    """A job in a checkout."""
    return dataclasses.replace(
        SMALL, tpu_vm=dataclasses.replace(CHECKOUT, directory=str(tmp_path)),
        restart=spec.Restart(max_restarts=2),
    )  # fmt: skip


def test_the_script_goes_by_exit_codes(boot, checkout):
    """Preemptions do not use the restarts up, failures do; the last code is its own."""
    again = "ended with {}; starting again ({})"
    said, code = boot(checkout, "exit 75", "exit 42", "exit 143", "kill -KILL $$", "exit 0")
    assert (ends(said), code) == ([
        again.format(75, "1 of 2 counted"), again.format(42, "not counted"),
        again.format(143, "not counted"), again.format(137, "2 of 2 counted"), "all steps are done",
    ], 0)  # fmt: skip
    said, code = boot(checkout, "exit 42", "exit 1")  # the count outlives a reboot
    assert code == 1 and ends(said)[-1].startswith("ended with 1; all 2 restarts are used up, see ")


@pytest.mark.parametrize("code", exit_codes.FATAL)
def test_what_would_end_the_same_is_not_started_again(boot, checkout, code):
    said, ended = boot(checkout, f"exit {code}")
    assert ends(said) == [f"ended with {code}; another attempt would end the same"]
    assert ended == code


@pytest.mark.parametrize(
    "does, code",
    [
        ("trap 'exit 42' TERM; kill -TERM $PPID; while :; do read -t 0.1 <> <(:); done", 42),
        ("trap '' TERM; kill -TERM $PPID; read -t 0.3 <> <(:); kill -TERM $PPID; exit 75", 75),
        ("kill -TERM $PPID; while :; do read -t 0.1 <> <(:); done", 143),
    ],
)
def test_told_to_stop(boot, checkout, does, code):
    """The process is told, waited for, and not started again."""
    said, ended = boot(checkout, does)
    assert ends(said) == [f"ended with {code}; told to stop, so not starting again"]
    assert ended == code


def test_told_to_stop_between_two_attempts(boot, checkout, tmp_path):
    sleeps = '[ "$1" = 10 ] && kill -TERM $PPID; exec /bin/sleep 0.05'
    test_slurm.command_line(tmp_path / "bin", "sleep", sleeps)
    said, ended = boot(checkout, "exit 75")
    assert ends(said)[-1] == "told to stop between two attempts" and ended == 143


PLACE = "echo $EMU3_PROCESS_ID/$EMU3_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS; exit 0"


@pytest.mark.parametrize(
    "endpoints, worker, want",
    [
        ("n-0:0:10.0.0.5,n-1:1:10.0.0.6", "1", "1/2 at 10.0.0.5:8476"),
        ("host-a,host-b,host-c,host-d", "2", "2/4 at host-a:8476"),
        ("n-0:0:10.0.0.5", "0", "0/1 at 10.0.0.5:8476"),
    ],
)
def test_each_process_knows_its_place(boot, checkout, endpoints, worker, want):
    """From what Cloud TPU tells its machine; both forms of the list."""
    told = {"worker-network-endpoints": endpoints, "agent-worker-number": worker}
    assert want in boot(checkout, PLACE, **told)[0]


def test_each_process_knows_its_place_in_all_slices(boot):
    said, _ = boot(JOBS["v6e"], PLACE)
    assert "3/4 at 10.0.0.9:8476" in said


def test_a_machine_that_knows_no_place_starts_nothing(boot, checkout):
    """It tries again, as after a failure."""
    slices = dataclasses.replace(JOBS["v6e"], restart=spec.Restart(max_restarts=1))
    said, code = boot(slices, **{"tpu-env": "ACCELERATOR_TYPE: 'v6e-16'"})
    assert code == 1 and len(ends(said)) == 2
    assert not any(line.startswith("docker") for line in said)


def test_the_command_of_the_job_starts(boot, checkout, tmp_path):
    """With its variables, through all quotes: in a checkout, or in the image with the bucket."""
    changed = dict(env=dict(QUOTES="a 'b' \"c\" $d `e`"), overrides=("task.name=it's \"$5\"",))
    shows = 'echo "$PWD"; echo "$QUOTES"; echo "$C"; exit 0'
    said, code = boot(dataclasses.replace(checkout, **changed), shows)
    command = ("python -u -m emu3_jax.launch --config=configs/emu3_8b_stage1.py "
               "{}--config.task.name=it's \"$5\"")  # fmt: skip
    assert code == 0 and said == [
        "rm -f /tmp/libtpu_lockfile", command.format(""), str(tmp_path), changed["env"]["QUOTES"],
        "d e", "all steps are done",
    ]  # fmt: skip
    said, code = boot(dataclasses.replace(JOBS["v5e"], **changed), 'echo "$QUOTES"; exit 0')
    assert code == 0 and said == [
        "gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 "
        "--metadata-cache-negative-ttl-secs=0 b /gcs",
        "rm -f /tmp/libtpu_lockfile",
        "docker run --rm --name=emu3 --privileged --network=host --ipc=host --volume=/gcs:/gcs "
        "--env=EMU3_INITIALIZATION_TIMEOUT --env=QUOTES --env=EMU3_NUM_PROCESSES "
        "--env=EMU3_PROCESS_ID --env=JAX_COORDINATOR_ADDRESS R/emu3:1 "
        + command.format("--config.run_dir=/gcs/a "),
        changed["env"]["QUOTES"], "all steps are done",
    ]  # fmt: skip


def test_submit_without_gcloud(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="^gcloud is not installed; see"):
        tpu_vm.submit(JOBS["v4"])


def test_submit_asks_gcloud(tmp_path, monkeypatch):
    """With the script in the file that the command line names."""
    monkeypatch.chdir(tmp_path)
    test_slurm.command_line(tmp_path, "gcloud", 'printf "%s\\n" "$@" > asked; exit 3')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert tpu_vm.submit(JOBS["v5e"]) == 3
    asked = ["gcloud", *(tmp_path / "asked").read_text().splitlines()]
    assert " ".join(asked) == tpu_vm.commands(JOBS["v5e"]).submit[0]
    file = asked[-1].partition("startup-script=")[2]
    assert (tmp_path / file).read_text() == script(JOBS["v5e"])
