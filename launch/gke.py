"""GKE: a JobSet, one child Job for each TPU slice or one for all GPU nodes, which Kueue may queue.

A failure of any pod starts all pods anew, never two generations at once, unless the exit code
says that it would end the same; only failures that are no preemption count (emu3_jax.exit_codes).
The cluster needs JobSet 0.10 or later, Kueue where there is a queue, and the Cloud Storage FUSE
driver where there is a bucket.
"""

import shlex
import subprocess

import yaml

from emu3_jax import exit_codes
from launch import accelerators, fabrics, pods, spec

LIMIT = 63  # of a label, and so of a pod's name
KEPT_SECONDS = 7 * 24 * 3600  # a finished JobSet, for its logs and events


class _Dumper(yaml.SafeDumper):
    """Lists indented as people write them, and nothing said by reference."""

    def ignore_aliases(self, data):
        return True

    def increase_indent(self, flow=False, indentless=False):
        return super().increase_indent(flow, False)


def render(job: spec.Job) -> dict[str, str]:
    """The JobSet as YAML. Raises ValueError for what GKE does not have."""
    text = yaml.dump(manifest(job), Dumper=_Dumper, sort_keys=False, width=1000)
    return {"jobset.yaml": text}


def commands(job: spec.Job) -> spec.Commands:
    """kubectl's lines; ending a job is a preemption, too: it saves first."""
    ours = f"jobset.sigs.k8s.io/jobset-name={job.name}"
    first = f"{ours},jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    create = kubectl(job, "create", "-f", str(spec.folder(job) / "jobset.yaml"))
    return spec.Commands(
        submit=(shlex.join(create),),
        watch=(
            shlex.join(kubectl(job, "get", "jobset", job.name)),
            shlex.join(kubectl(job, "get", "pods", "-l", ours)),
            shlex.join(kubectl(job, "logs", "-f", "-c", pods.CONTAINER, "-l", first)),
        ),
        cancel=(shlex.join(kubectl(job, "delete", "jobset", job.name)),),
        resume=(
            shlex.join(kubectl(job, "delete", "jobset", job.name, "--ignore-not-found")),
            shlex.join(create),
        ),
    )


def submit(job: spec.Job) -> int:
    """Creates the JobSet with kubectl; its exit code."""
    spec.write(job, render(job))
    return run(kubectl(job, "create", "-f", str(spec.folder(job) / "jobset.yaml"))).returncode


def kubectl(job: spec.Job, *words: str) -> list[str]:
    """A command line of kubectl for the job's cluster and namespace."""
    context = [f"--context={job.gke.context}"] if job.gke.context else []
    return ["kubectl", *context, f"--namespace={job.gke.namespace}", *words]


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    """Runs kubectl; ValueError if it is not installed."""
    try:
        return subprocess.run(command, text=True, check=False, **options)
    except FileNotFoundError:
        raise ValueError(f"{command[0]} is not installed; gcloud components install it") from None


def manifest(job: spec.Job) -> dict:
    """The JobSet as JSON values."""
    check(job)
    rules = [
        dict(
            name="preempted", action="RestartJobSetAndIgnoreMaxRestarts",
            onJobFailureReasons=["PodFailurePolicy"],
            # what the Job controller writes: "... failed with exit code 42 matching ..."
            onJobFailureMessagePatterns=["DisruptionTarget", f"exit code ({_uncounted()}) "],
        ),
        dict(name="fatal", action="FailJobSet", onJobFailureReasons=["PodFailurePolicy"]),
    ]  # fmt: skip
    failures = dict(
        maxRestarts=job.restart.max_restarts, restartStrategy="BlockingRecreate", rules=rules
    )
    replicated = dict(name=pods.role(job), replicas=job.slices, template=dict(spec=_child(job)))
    return dict(
        apiVersion="jobset.x-k8s.io/v1alpha2",
        kind="JobSet",
        metadata=_metadata(job),
        spec=dict(
            **(dict(suspend=True) if job.queue.local_queue else {}),  # until Kueue admits it
            ttlSecondsAfterFinished=KEPT_SECONDS,
            network=dict(enableDNSHostnames=True, publishNotReadyAddresses=True),
            failurePolicy=failures,
            replicatedJobs=[replicated],
        ),
    )


def check(job: spec.Job) -> None:
    """Raises ValueError, with what to change, for what GKE does not have."""
    if job.accelerator == "cpu":
        known = ", ".join(accelerators.NAMES[:-1])
        raise ValueError(f"accelerator 'cpu' is for --to=local; on GKE take one of {known}")
    if not job.image:
        raise ValueError(f"image is not set; take {spec.IMAGE}")
    if job.queue.priority and not job.queue.local_queue:
        raise ValueError(f"queue.priority {job.queue.priority!r} is Kueue's: set queue.local_queue")
    longest = f"{job.name}-{pods.role(job)}-{job.slices - 1}-{job.hosts - 1}-abcde"
    if len(longest) > LIMIT:
        raise ValueError(
            f"name {job.name!r} has {len(job.name)} characters, and the pod {longest} has "
            f"{len(longest)} of {LIMIT}: shorten name to {len(job.name) - len(longest) + LIMIT}"
        )
    if job.storage.run_dir and not job.storage.bucket:
        raise ValueError(
            f"storage.run_dir {job.storage.run_dir!r} is on a pod's own disk, which goes with the "
            "pod; set storage.bucket"
        )
    if job.storage.bucket and not job.gke.service_account:
        raise ValueError(
            f"storage.bucket {job.storage.bucket!r} is mounted as a Kubernetes service account "
            "with Workload Identity: set gke.service_account"
        )
    if job.gpu and job.gpu.fabric == "tcpxo" and not job.gke.tcpxo_daemon:
        raise ValueError(f"{job.accelerator} needs gke.tcpxo_daemon, the image of the cluster's "
                         f"version, as in {fabrics.DAEMON}:v1.0.20")  # fmt: skip


def _uncounted() -> str:
    return "|".join(map(str, exit_codes.UNCOUNTED))


def _metadata(job: spec.Job) -> dict:
    labels = {}
    if job.queue.local_queue:  # a label: current Kueue does not read the annotation
        labels[f"{pods.KUEUE}/queue-name"] = job.queue.local_queue
    if job.queue.priority:
        labels[f"{pods.KUEUE}/priority-class"] = job.queue.priority
    annotations = {}
    if job.tpu and job.hosts > 1:  # a slice of several hosts is a node pool: one child Job each
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = f"{pods.CLOUD}/gke-nodepool"
    return dict(
        name=job.name,
        namespace=job.gke.namespace,
        **(dict(labels=labels) if labels else {}),
        **(dict(annotations=annotations) if annotations else {}),
    )


def _child(job: spec.Job) -> dict:
    """The child Job: every failure that is known by its exit code is told to the JobSet."""

    def exits(codes):
        on = dict(containerName=pods.CONTAINER, operator="In", values=sorted(codes))
        return dict(action="FailJob", onExitCodes=on)

    evicted = dict(type="DisruptionTarget", status="True")
    rules = [
        exits(exit_codes.UNCOUNTED),
        dict(action="FailJob", onPodConditions=[evicted]),
        exits(exit_codes.FATAL),
    ]
    annotations = pods.annotations(job)
    return dict(
        parallelism=job.hosts,
        completions=job.hosts,
        completionMode="Indexed",
        backoffLimit=0,  # one pod alone cannot come back
        podFailurePolicy=dict(rules=rules),
        template=dict(
            **(dict(metadata=dict(annotations=annotations)) if annotations else {}),
            spec=pods.pod(job),
        ),
    )
