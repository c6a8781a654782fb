"""JobSets: golden files, JobSet's and Kubernetes' schemas, and what only the servers check."""

import copy
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import subprocess

import jsonschema
import kubernetes_validate
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_jax import exit_codes
from launch import accelerators, gke, spec
from tests import fake_kubernetes
from tests.jobset_rules import pod_problems, problems

GOLDEN = pathlib.Path(__file__).parent / "golden" / "launch"
CRD = pathlib.Path(__file__).parents[2] / "shared" / "schemas" / "jobset.x-k8s.io_jobsets.yaml"


def job(accelerator: str, **fields) -> spec.Job:
    default = dict(
        name="emu3", config="configs/emu3_8b_stage1.py", accelerator=accelerator, image="R/emu3:1",
        env={"A": "b c"}, overrides=("steps=7",),
    )  # fmt: skip
    return spec.Job(**default | fields)


BUCKET = dict(
    storage=spec.Storage("/gcs/runs/emu3", bucket="emu3-bucket", xla_cache="/gcs/xla"),
    gke=spec.Gke(service_account="emu3-train"),
)
QUEUE = spec.Queue("multislice-queue", "prod")
DAEMON = "R/tcpgpudmarxd-dev:v1.0.20"
JOBS = {  # every accelerator, and every field that shows
    "v4": job("v4", topology="2x2x2", **BUCKET),
    "v5e": job("v5e", topology="16x16", slices=2, queue=spec.Queue("queue")),
    "v5p": job("v5p", topology="8x8x16", slices=2, queue=QUEUE,
               capacity=spec.Capacity("reserved", "my-reservation"), **BUCKET),
    "v6e": job("v6e", topology="16x16", slices=4, capacity=spec.Capacity("spot"),
               storage=BUCKET["storage"],
               gke=spec.Gke(namespace="emu3", service_account="emu3-train", host_network=True)),
    "v6e_one_host": job("v6e", topology="2x2", gke=spec.Gke(privileged=False)),
    "7x": job("7x", topology="4x4x8", capacity=spec.Capacity("flex_start"), queue=QUEUE),
    "h100": job("h100", nodes=2),
    "h100_mega": job("h100-mega", nodes=4, gke=spec.Gke(tcpxo_daemon=DAEMON)),
    "h200": job("h200", nodes=32, queue=spec.Queue("q", topology="kubernetes.io/hostname"),
                **BUCKET),
    "h200_host_network": job("h200", gke=spec.Gke(host_network=True)),
}  # fmt: skip


@functools.cache
def schema() -> jsonschema.protocols.Validator:
    """JobSet's schema with unknown fields forbidden."""
    version = yaml.load(CRD.read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"][0]
    whole = version["schema"]["openAPIV3Schema"]
    del whole["properties"]["metadata"]  # the CRD leaves it to Kubernetes
    whole["properties"]["metadata"] = {}

    def close(node):
        if isinstance(node, dict):
            if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
                node.setdefault("additionalProperties", False)
            if node.pop("x-kubernetes-int-or-string", False):
                node.pop("anyOf", None)
                node["type"] = ["integer", "string"]
        for child in node.values() if isinstance(node, dict) else node:
            if isinstance(child, dict | list):
                close(child)

    close(whole)
    return jsonschema.Draft202012Validator(whole)


def child_job(jobset: dict) -> dict:
    template = jobset["spec"]["replicatedJobs"][0]["template"]
    return dict(apiVersion="batch/v1", kind="Job", metadata=dict(name="child"), **template)


@pytest.mark.parametrize("name", JOBS)
def test_the_golden_file(name):
    (text,) = gke.render(JOBS[name]).values()
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), "on purpose? run once with UPDATE_GOLDEN=1 and read the diff"
    assert yaml.safe_load(text) == gke.manifest(JOBS[name])


def test_every_accelerator_has_a_golden_file():
    assert {each.accelerator for each in JOBS.values()} == {*accelerators.NAMES} - {"cpu"}
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == {*JOBS}


@pytest.mark.skipif(not CRD.exists(), reason=f"no {CRD.name} in shared/schemas beside this")
@pytest.mark.parametrize("name", JOBS)
def test_jobsets_schema(name):
    assert [e.message for e in schema().iter_errors(gke.manifest(JOBS[name]))] == []


@pytest.mark.skipif(not CRD.exists(), reason=f"no {CRD.name} in shared/schemas beside this")
def test_jobsets_schema_finds_errors():
    """Unknown fields at every depth, wrong types, wrong choices."""
    def wrong(change):
        jobset = copy.deepcopy(gke.manifest(JOBS["v5p"]))
        child = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
        change(jobset["spec"], child, child["template"]["spec"]["containers"][0])
        return len(list(schema().iter_errors(jobset)))

    assert wrong(lambda top, child, container: top.update(suspended=True))
    assert wrong(lambda top, child, container: child.update(backofLimit=0))
    assert wrong(lambda top, child, container: container.update(nam="train"))
    assert wrong(lambda top, child, container: container["env"][0].update(value=8476))
    assert wrong(lambda top, child, container: top["failurePolicy"].update(restartStrategy="No"))
    assert wrong(lambda top, child, container: top["failurePolicy"]["rules"][0].pop("name"))


@pytest.mark.parametrize("name", JOBS)
def test_kubernetes_schema_of_the_child_job(name):
    child = child_job(gke.manifest(JOBS[name]))
    kubernetes_validate.validate(child, "1.32", strict=True)
    child["spec"]["template"]["spec"]["hostNetworks"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(child, "1.32", strict=True)


@pytest.mark.parametrize("name", JOBS)
def test_what_only_the_servers_check(name):
    assert problems(gke.manifest(JOBS[name])) == []


@pytest.mark.parametrize(
    "path, value, want",
    [
        ("containers.0.resources.limits", {"google.com/tpu": "8"}, "limits"),
        ("containers.0.name", "other", "rule for train"),
        ("restartPolicy", "OnFailure", "restartPolicy"),
        ("nodeSelector.cloud-google-com/gke-tpu-topology", "4x4x4", "1024 chips for 4x4x4"),
        ("volumes", [], "no volume shm"),
    ],
)
def test_the_checks_of_the_servers_find_errors(path, value, want):
    child = copy.deepcopy(child_job(gke.manifest(JOBS["v5p"])))["spec"]
    *above, last = path.replace("cloud-google-com", "cloud google com").split(".")
    node = child["template"]["spec"]
    for key in above:
        node = node[int(key) if key.isdecimal() else key]
    node[last.replace(" ", ".")] = value
    assert want in pod_problems(child)


def test_exit_codes_decide():
    """Each code belongs to one rule, and each rule's failures to one of JobSet's."""
    jobset = gke.manifest(JOBS["v5p"])
    child = child_job(jobset)["spec"]
    codes = [rule["onExitCodes"]["values"] for rule in child["podFailurePolicy"]["rules"]
             if "onExitCodes" in rule]  # fmt: skip
    assert codes == [sorted(exit_codes.UNCOUNTED), sorted(exit_codes.FATAL)]
    first, second = jobset["spec"]["failurePolicy"]["rules"]
    assert (first["action"], second["action"]) == (
        "RestartJobSetAndIgnoreMaxRestarts", "FailJobSet")  # fmt: skip
    said = "Container train for pod default/p failed with exit code {} matching FailJob rule"

    def uncounted(message):
        return any(re.search(p, message) for p in first["onJobFailureMessagePatterns"])

    assert all(uncounted(said.format(code)) for code in exit_codes.UNCOUNTED)
    others = {*exit_codes.MEANING} - {*exit_codes.UNCOUNTED}
    assert not any(uncounted(said.format(code)) for code in [*others, 421, 1433])
    assert uncounted("Pod default/p has condition DisruptionTarget matching FailJob rule")


@pytest.mark.parametrize(
    "name, first, count, hosts",
    [("h200", "emu3-node-0-0.emu3:8476", 32, 32), ("v5p", "emu3-slice-0-0.emu3:8476", 512, 256)],
)
def test_a_process_knows_its_place(name, first, count, hosts):
    """With JOB_COMPLETION_INDEX, which Kubernetes sets; what emu3_jax.launch needs."""
    child = child_job(gke.manifest(JOBS[name]))["spec"]
    (container,) = child["template"]["spec"]["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert child["completionMode"] == "Indexed" and child["completions"] == hosts
    assert env["JAX_COORDINATOR_ADDRESS"] == first
    assert (env["EMU3_NUM_PROCESSES"], env["EMU3_HOSTS_PER_SLICE"]) == (str(count), str(hosts))
    (child,) = [entry for entry in container["env"] if entry["name"] == "EMU3_SLICE_ID"]
    path = child["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.labels['jobset.sigs.k8s.io/job-index']"


def test_signals_reach_python_itself():
    """Also where the variables of a fabric come from a script."""
    (container,) = child_job(gke.manifest(JOBS["v5p"]))["spec"]["template"]["spec"]["containers"]
    assert container["command"] == JOBS["v5p"].command()
    (container,) = child_job(gke.manifest(JOBS["h200"]))["spec"]["template"]["spec"]["containers"]
    assert container["command"][:2] == ["bash", "-c"]
    assert container["command"][2].endswith('; exec "$@"')
    assert container["command"][4:] == JOBS["h200"].command()


@pytest.mark.parametrize("accelerator, role", [("v5p", "slice"), ("h200", "node")])
def test_the_longest_name(accelerator, role):
    fields = dict(topology="4x4x8", slices=12) if role == "slice" else dict(nodes=123)
    made = job(accelerator, name="a", **fields)
    rest = f"-{role}-{made.slices - 1}-{made.hosts - 1}-abcde"
    longest = dataclasses.replace(made, name="a" * (63 - len(rest)))
    assert problems(gke.manifest(longest)) == []
    with pytest.raises(ValueError, match=rf"64 of 63: shorten name to {len(longest.name)}$"):
        gke.manifest(dataclasses.replace(longest, name=longest.name + "a"))


@pytest.mark.parametrize(
    "made, want",
    [
        (job("cpu"), "accelerator 'cpu' is for --to=local; on GKE take one of v4, v5e, v5p, v6e, "
                     "7x, h100, h100-mega, h200"),
        (job("h200", image=""), "image is not set; take one built from launch/Dockerfile, as in "
                                "us-docker.pkg.dev/PROJECT/emu3/train@sha256:..."),
        (job("h200", queue=spec.Queue(priority="prod")),
         "queue.priority 'prod' is Kueue's: set queue.local_queue"),
        (job("h200", storage=spec.Storage("/runs/a")), "storage.run_dir '/runs/a' is on a pod's "
         "own disk, which goes with the pod; set storage.bucket"),
        (job("h200", storage=spec.Storage(bucket="b")),
         "storage.bucket 'b' is mounted as a Kubernetes service account with Workload Identity: "
         "set gke.service_account"),
        (job("h100-mega"), "h100-mega needs gke.tcpxo_daemon, the image of the cluster's version, "
         "as in us-docker.pkg.dev/gce-ai-infra/gpudirect-tcpxo/tcpgpudmarxd-dev:v1.0.20"),
    ],
)  # fmt: skip
def test_what_gke_does_not_have(made, want):
    with pytest.raises(ValueError) as error:
        gke.render(made)
    assert str(error.value) == want


WORD = st.from_regex("[a-z]([-a-z0-9]{0,10}[a-z0-9])?", fullmatch=True)
STORAGE = st.sampled_from([spec.Storage(), BUCKET["storage"]])
GKE = st.builds(
    spec.Gke, namespace=WORD, service_account=WORD, host_network=st.booleans(),
    privileged=st.booleans(), networks=st.sampled_from([(), ("net-1", "net-2")]),
    tcpxo_daemon=st.just(DAEMON),
)  # fmt: skip
CAPACITY = st.sampled_from([spec.Capacity(), spec.Capacity("spot"), spec.Capacity("flex_start"),
                            spec.Capacity("reserved", "r")])  # fmt: skip


@st.composite
def any_job(draw) -> spec.Job:
    name = draw(st.sampled_from(accelerators.NAMES[:-1]))
    parts = dict(capacity=draw(CAPACITY), storage=draw(STORAGE), gke=draw(GKE), name=draw(WORD),
                 queue=draw(st.sampled_from([spec.Queue(), QUEUE])))  # fmt: skip
    if name not in accelerators.TPUS:
        return job(name, nodes=draw(st.integers(1, 2000)), **parts)
    topology = draw(st.sampled_from(accelerators.TPUS[name].topologies()))
    most = 1 if accelerators.chips(topology) <= accelerators.TPU_HOST else 64
    return job(name, topology=topology, slices=draw(st.integers(1, most)), **parts)


@settings(deadline=None, max_examples=40)
@given(any_job())
def test_whatever_is_accepted_is_right(made):
    accelerators.check(made.accelerator, made.topology, made.slices)
    jobset = gke.manifest(made)
    assert problems(jobset) == []
    kubernetes_validate.validate(child_job(jobset), "1.32", strict=True)
    if CRD.exists():
        assert [e.message for e in schema().iter_errors(jobset)] == []


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")
def test_submit_makes_the_jobset(tmp_path, monkeypatch, capfd):
    """And the command lines of --dry-run are right, against a small API server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    there = dataclasses.replace(JOBS["v6e"].gke, context="fake")
    made = dataclasses.replace(JOBS["v6e"], gke=there)
    with fake_kubernetes.serve(tmp_path) as (kubeconfig, jobsets):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        assert gke.submit(made) == 0
        assert jobsets == {("emu3", "emu3"): gke.manifest(made)}
        capfd.readouterr()
        assert gke.submit(made) == 1 and "already exists" in capfd.readouterr().err
        commands = gke.commands(made)
        for line in (commands.watch[0], *commands.resume, *commands.cancel):
            subprocess.run(line, shell=True, check=True)
        assert jobsets == {}
        subprocess.run(commands.submit[0], shell=True, check=True)
        assert list(jobsets) == [("emu3", "emu3")]


def test_submit_without_kubectl(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="^kubectl is not installed; gcloud components"):
        gke.submit(JOBS["v4"])
