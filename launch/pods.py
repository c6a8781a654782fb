"""What one host of a JobSet runs: the pod's node, container, variables and volumes."""

import json
import os

from launch import accelerators, fabrics, spec

KUEUE = "kueue.x-k8s.io"
CLOUD = "cloud.google.com"
CONTAINER = "train"
COORDINATOR_PORT = 8476  # not JAX's own 8482, which firewalls do not know
TPU_PORTS = (8471, 8080, 8431, COORDINATOR_PORT)  # TPU, megascale, metrics, JAX
# Checkpoints are committed by renaming a directory. The machine types here would otherwise keep
# what they know of files forever, and not see what other hosts write.
FUSE = ("implicit-dirs,file-system:rename-dir-limit:200000,"
        "metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0")  # fmt: skip


def role(job: spec.Job) -> str:
    """What child Jobs are called."""
    return "slice" if job.tpu else "node"


def annotations(job: spec.Job) -> dict[str, str]:
    """What the pod asks of Cloud Storage FUSE, Kueue and the network."""
    found = {}
    if job.storage.bucket:
        found["gke-gcsfuse/volumes"] = "true"
    if job.gpu and job.queue.topology:
        found[f"{KUEUE}/podset-preferred-topology"] = job.queue.topology
    fabric = _fabric(job)
    networks = job.gke.networks or (fabric.networks if fabric else ())
    if networks and not job.gke.host_network:
        cards = [dict(interfaceName=f"eth{i}", network=name)
                 for i, name in enumerate(("default", *networks))]  # fmt: skip
        found["networking.gke.io/default-interface"] = "eth0"
        found["networking.gke.io/interfaces"] = json.dumps(cards)
    if fabric and fabric.daemon:
        devices = [dict(path=path) for path in fabrics.DAEMON_DEVICES]
        found["devices.gke.io/container.tcpxo-daemon"] = json.dumps(devices)
    return found


def _fabric(job: spec.Job) -> fabrics.Fabric | None:
    return fabrics.FABRICS[job.gpu.fabric] if job.gpu else None


def pod(job: spec.Job) -> dict:
    """The pod's spec: one process for a whole host."""
    fabric, gke = _fabric(job), job.gke
    account = dict(serviceAccountName=gke.service_account) if gke.service_account else {}
    network = dict(hostNetwork=True, dnsPolicy="ClusterFirstWithHostNet")
    daemon = dict(initContainers=[_daemon(job)]) if fabric and fabric.daemon else {}
    return dict(
        restartPolicy="Never",  # the failure policy needs it; JobSet's default is another
        terminationGracePeriodSeconds=job.restart.grace_seconds,
        **account,
        **(network if gke.host_network else {}),
        nodeSelector=_selector(job),
        tolerations=_tolerations(job),
        **daemon,
        containers=[_container(job)],
        volumes=_volumes(job),
    )


def _selector(job: spec.Job) -> dict[str, str]:
    if job.tpu:
        chip = {f"{CLOUD}/gke-tpu-accelerator": job.tpu.label,
                f"{CLOUD}/gke-tpu-topology": job.topology}  # fmt: skip
    else:
        chip = {f"{CLOUD}/gke-accelerator": job.gpu.label}
    capacity = {
        "on_demand": {},
        "reserved": {f"{CLOUD}/reservation-name": job.capacity.reservation},
        "spot": {f"{CLOUD}/gke-spot": "true"},
        "flex_start": {f"{CLOUD}/gke-flex-start": "true"},
    }
    return chip | capacity[job.capacity.model]


def _tolerations(job: spec.Job) -> list[dict]:
    keys = [_resource(job)]
    if job.gpu:
        keys.append(f"{CLOUD}/impending-node-termination")
    if job.capacity.model == "spot":
        keys.append(f"{CLOUD}/gke-spot")
    if job.capacity.model == "flex_start":
        keys.append(f"{CLOUD}/gke-queued")
    return [dict(key=key, operator="Exists") for key in keys]


def _resource(job: spec.Job) -> str:
    return "google.com/tpu" if job.tpu else "nvidia.com/gpu"


def _container(job: spec.Job) -> dict:
    """Python itself gets the signals: no shell waits for it."""
    fabric = _fabric(job)
    command = job.command()
    if fabric and fabric.script:
        command = ["bash", "-c", f'source {fabric.script}; exec "$@"', "bash", *command]
    chips = str(accelerators.TPU_HOST if job.tpu else accelerators.GPU_HOST)
    # No cpu or memory: Kueue would want a quota for them. On 7x the recipes run two containers a
    # pod, one for each NUMA node; one is simpler, and has all four chips.
    asked = {_resource(job): chips}
    ports = dict(ports=[dict(containerPort=port) for port in TPU_PORTS]) if job.tpu else {}
    privileged = dict(securityContext=dict(privileged=True)) if job.gke.privileged else {}
    return dict(
        name=CONTAINER,
        image=job.image,
        **privileged,
        command=command,
        **ports,
        env=_env(job),
        resources=dict(requests=asked, limits=asked),
        volumeMounts=[dict(name=name, mountPath=path) for name, (path, _) in _mounts(job).items()],
    )


def _env(job: spec.Job) -> list[dict]:
    """Which process this is of how many, and where they meet; Kubernetes adds its place in the
    slice, JOB_COMPLETION_INDEX. JAX itself would look at one child Job only, or ask GKE."""
    first = f"{job.name}-{role(job)}-0-0.{job.name}"
    ours = dict(
        EMU3_NUM_PROCESSES=str(job.slices * job.hosts),
        EMU3_HOSTS_PER_SLICE=str(job.hosts),
        JAX_COORDINATOR_ADDRESS=f"{first}:{COORDINATOR_PORT}",
    )
    fabric = _fabric(job)
    values = ours | (fabric.env if fabric else {}) | job.environment()
    child = dict(fieldRef=dict(fieldPath="metadata.labels['jobset.sigs.k8s.io/job-index']"))
    return [
        dict(name="EMU3_SLICE_ID", valueFrom=child),
        *(dict(name=name, value=value) for name, value in values.items()),
    ]


def _mounts(job: spec.Job) -> dict[str, tuple[str, dict]]:
    """Volumes of the container: name -> (path, source)."""
    found = dict(shm=("/dev/shm", dict(emptyDir=dict(medium="Memory"))))
    fabric = _fabric(job)
    for path, host in (fabric.hosts if fabric else {}).items():
        found[_name(path)] = (path, dict(hostPath=dict(path=host)))
    if job.storage.bucket:
        attributes = dict(bucketName=job.storage.bucket, mountOptions=FUSE)
        if job.gke.host_network:
            attributes["hostNetworkPodKSA"] = "true"  # else the node's own account is asked
        driver = dict(driver="gcsfuse.csi.storage.gke.io", volumeAttributes=attributes)
        found["bucket"] = (job.storage.mount, dict(csi=driver))
    return found


def _name(path: str) -> str:
    return os.path.basename(path).replace("_", "-")


def _volumes(job: spec.Job) -> list[dict]:
    found = {name: source for name, (_, source) in _mounts(job).items()}
    fabric = _fabric(job)
    if fabric and fabric.daemon:
        for path, host in fabrics.DAEMON_HOSTS.items():
            found.setdefault(_name(path), dict(hostPath=dict(path=host)))
    return [dict(name=name, **source) for name, source in found.items()]


def _daemon(job: spec.Job) -> dict:
    """TCPXO's daemon as a side car: an init container that stays, and ends after the others."""
    mounts = [dict(name=_name(path), mountPath=path) for path in fabrics.DAEMON_HOSTS]
    return dict(
        name="tcpxo-daemon",
        image=job.gke.tcpxo_daemon,
        restartPolicy="Always",
        securityContext=dict(capabilities=dict(add=["NET_ADMIN", "NET_BIND_SERVICE"])),
        command=fabrics.DAEMON_COMMAND,
        env=[dict(name="LD_LIBRARY_PATH", value=f"{fabrics.NVIDIA}/lib64")],
        volumeMounts=mounts,
    )
