"""What JobSet's webhook and the API server refuse although every schema takes it."""

import itertools
import re

from launch import accelerators

RULE_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


def problems(jobset: dict) -> list[str]:
    """Everything wrong with a JobSet."""
    found = [f"bad name {jobset['metadata']['name']}"] * (
        not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", jobset["metadata"]["name"])
    )
    for key, value in jobset["metadata"].get("labels", {}).items():
        found += [f"label {key}"] * (not LABEL_VALUE.fullmatch(value))
    rules = jobset["spec"]["failurePolicy"]["rules"]
    names = [rule["name"] for rule in rules]
    found += ["rule names"] * (len({*names}) < len(names))
    found += [f"rule {name}" for name in names if not RULE_NAME.fullmatch(name)]
    replicated = {each["name"]: each for each in jobset["spec"]["replicatedJobs"]}
    targets = itertools.chain.from_iterable(rule.get("targetReplicatedJobs", ()) for rule in rules)
    found += [f"rule for {target}" for target in targets if target not in replicated]
    for name, each in replicated.items():
        child = each["template"]["spec"]
        last = f"{each['replicas'] - 1}-{child['parallelism'] - 1}"
        pod = f"{jobset['metadata']['name']}-{name}-{last}-abcde"
        found += [f"pod name {pod}"] * (len(pod) > 63)
        found += pod_problems(child)
    return found


def pod_problems(child: dict) -> list[str]:
    """Everything wrong with the spec of one of its child Jobs."""
    pod = child["template"]["spec"]
    found = ["completions"] * (child["parallelism"] != child["completions"])
    found += ["restartPolicy"] * (pod["restartPolicy"] != "Never")
    containers = [*pod["containers"], *pod.get("initContainers", ())]
    names = {each["name"] for each in containers}
    found += ["container names"] * (len(names) < len(containers))
    for rule in child["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", dict(containerName=containers[0]["name"], values=[1]))
        found += [f"rule for {codes['containerName']}"] * (codes["containerName"] not in names)
        values = codes["values"]
        found += [f"exit codes {values}"] * (values != sorted({*values}) or 0 in values)
    for each in containers:
        resources = each.get("resources", dict(limits={}, requests={}))
        found += ["limits"] * (resources["limits"] != resources["requests"])
        keys = [entry["name"] for entry in each["env"]]
        found += [f"{key} twice" for key in {*keys} if keys.count(key) > 1]
        mounted = {mount["name"] for mount in each["volumeMounts"]}
        found += [f"no volume {name}" for name in mounted - {v["name"] for v in pod["volumes"]}]
    return found + chip_problems(child["parallelism"], pod)


def chip_problems(hosts: int, pod: dict) -> list[str]:
    """Selectors that fit no node, or as many chips as the slice does not have."""
    selector, asked = pod["nodeSelector"], pod["containers"][0]["resources"]["limits"]
    topology = selector.get("cloud.google.com/gke-tpu-topology")
    found = [f"value {value}" for value in selector.values() if not LABEL_VALUE.fullmatch(value)]
    if topology is None:
        return found + ["gpus"] * (asked != {"nvidia.com/gpu": "8"})
    labels = {tpu.label: tpu for tpu in accelerators.TPUS.values()}
    tpu = labels[selector["cloud.google.com/gke-tpu-accelerator"]]
    found += [f"topology {topology}"] * (topology not in tpu.topologies())
    chips = hosts * int(asked["google.com/tpu"])
    return found + [f"{chips} chips for {topology}"] * (chips != accelerators.chips(topology))
