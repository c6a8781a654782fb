"""TPU VMs: a queued resource of Cloud TPU, and the script that each of its machines boots with.

Nothing starts a TPU VM's process again, so the script does, as launch/supervisor.py does here: a
failure of one process ends the others, and each machine starts its own again. It goes by exit codes
(emu3_jax.exit_codes) and counts over reboots. Machines that are taken away (spot) do not come back:
`resume` asks for new ones. Those that are done stay, and cost, until `cancel`. Not run on TPU yet.
"""

import shlex
import subprocess
import textwrap

from emu3_jax import exit_codes
from launch import accelerators, shell, spec

FILE = "tpu_vm.sh"
UNIT = "emu3"  # of systemd, and the container
QUEUE = "compute tpus queued-resources"
PLACE = ("EMU3_NUM_PROCESSES", "EMU3_PROCESS_ID", "JAX_COORDINATOR_ADDRESS")
PORT = 8476  # the firewall of TPU VMs lets it through, unlike JAX's own 8482
LONGEST = "168h"  # what flex-start grants
LIMIT = 63  # of a node's name
TOGETHER = "2x4"  # one machine of eight chips, where GKE has two hosts
# As in launch/pods.py: checkpoints are committed by renaming, and other hosts write, too.
FUSE = ("--implicit-dirs", "--rename-dir-limit=200000", "--metadata-cache-ttl-secs=0",
        "--metadata-cache-negative-ttl-secs=0")  # fmt: skip

SCRIPT = """\
#!/bin/bash
# Runs as root at every boot. To see what it says: journalctl -u {unit}
state=${{STATE_DIRECTORY:-/var/lib/{unit}}}
if [ "$1" != supervise ]; then
  # As a unit of its own, it is told to stop before the network and docker are.
  install -D --mode=755 "$0" "$state/start"
  exec systemd-run --unit={unit} --collect --property=After=network-online.target \\
    --property=After=docker.service --property=KillMode=mixed \\
    --property=TimeoutStopSec={grace} "$state/start" supervise
fi

{follow}
# Of this machine, from Cloud TPU.
attribute() {{
  curl --silent --show-error --fail --retry 5 --header Metadata-Flavor:Google \\
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}}

# Becomes the process of this machine.
attempt() {{
  set -eo pipefail
{attempt}
}}

export HOME=/root PATH=$PATH:/snap/bin
{exports}
failures=$state/failures
told=0
trap 'told=1; kill -TERM "$child" 2> /dev/null' TERM
while [ "$told" = 0 ]; do
  attempt &
  child=$!
  [ "$told" = 0 ] || kill -TERM "$child"  # told before there was anything to tell
  follow "$child"
  if [ "$told" = 1 ]; then
    echo "ended with $code; told to stop, so not starting again"
    exit "$code"
  fi
  echo "ended with $code; $again"
  sleep 10
done
echo "told to stop between two attempts"
exit {terminated}
"""
# gcsfuse as its manual installs it.
MOUNT = """\
if ! command -v gcsfuse > /dev/null; then
  repository=https://packages.cloud.google.com/apt
  key=/usr/share/keyrings/cloud.google.asc
  curl --silent --show-error --fail --output $key $repository/doc/apt-key.gpg
  echo "deb [signed-by=$key] $repository gcsfuse-$(lsb_release -cs) main" \\
    > /etc/apt/sources.list.d/gcsfuse.list
  apt-get update --quiet
  apt-get install --quiet --yes gcsfuse
fi
if ! mountpoint --quiet {mount}; then
  umount --lazy {mount} &> /dev/null || true  # of a gcsfuse that was killed
  mkdir -p {mount}
  gcsfuse {options} \\
    {bucket} {mount}
fi"""
# The lists are of addresses, or of name:number:address.
ONE_SLICE = """\
workers=$(attribute worker-network-endpoints)
first=${workers%%,*}
slice=0"""
SLICES = """\
workers=$(attribute worker-network-endpoints)
slices=$(attribute tpu-env)
of_slice() { grep -m 1 "^ *$1:" <<< "$slices" | cut -d : -f 2 | tr -d "' "; }
first=$(of_slice MEGASCALE_COORDINATOR_ADDRESS)
slice=$(of_slice MEGASCALE_SLICE_ID)"""
JOIN = """\
number=$(attribute agent-worker-number)
hosts=$(tr , '\\n' <<< "$workers" | wc -l)
export EMU3_NUM_PROCESSES=$(({slices} * hosts))
export EMU3_PROCESS_ID=$((slice * hosts + number))
export JAX_COORDINATOR_ADDRESS=${{first##*:}}:{port}
rm -f /tmp/libtpu_lockfile  # of a process that was killed"""


def render(job: spec.Job) -> dict[str, str]:
    """The script that the machines boot with. Raises ValueError for what TPU VMs do not have."""
    check(job)
    parts = [*_mount(job), SLICES if job.slices > 1 else ONE_SLICE,
             JOIN.format(slices=job.slices, port=PORT), *_command(job)]  # fmt: skip
    exports = [f"export {name}={shlex.quote(text)}" for name, text in job.environment().items()]
    text = SCRIPT.format(
        unit=UNIT,
        grace=job.restart.grace_seconds,
        follow=shell.follow(job),
        attempt=textwrap.indent("\n".join(parts), "  "),
        exports="\n".join(exports),
        terminated=exit_codes.TERMINATED,
    )
    return {FILE: text}


def commands(job: spec.Job) -> spec.Commands:
    """gcloud's lines. What one process is told to save, all save; so `cancel` tells the first."""
    create = shlex.join(_create(job))
    delete = shlex.join(_gcloud(job, f"{QUEUE} delete", job.name, "--force", "--quiet"))
    state = _gcloud(job, f"{QUEUE} describe", job.name, "--format=value(state.state)")
    return spec.Commands(
        submit=(create,),
        watch=(shlex.join(state), _on_first(job, f"sudo journalctl --follow --unit={UNIT}")),
        cancel=(_on_first(job, f"sudo systemctl stop {UNIT}"), delete),
        resume=(delete, create),
    )


def submit(job: spec.Job) -> int:
    """Asks for the queued resource with gcloud; its exit code."""
    spec.write(job, render(job))
    try:
        return subprocess.run(_create(job), check=False).returncode
    except FileNotFoundError:
        raise ValueError("gcloud is not installed; see cloud.google.com/sdk") from None


def check(job: spec.Job) -> None:
    """Raises ValueError, with what to change, for what TPU VMs do not have."""
    if not job.tpu:
        known = ", ".join(name for name, tpu in accelerators.TPUS.items() if tpu.runtime)
        raise ValueError(f"accelerator {job.accelerator!r} is no TPU; take one of {known}")
    if not job.tpu.runtime:
        raise ValueError(f"{job.accelerator} is not to be had as TPU VMs; take --to=gke")
    for field in ("project", "zone"):
        if not getattr(job.tpu_vm, field):
            raise ValueError(f"tpu_vm.{field} is not set; set --job.tpu_vm.{field}=")
    _check_slices(job)
    if not job.image and not job.tpu_vm.directory:
        raise ValueError(f"neither image nor tpu_vm.directory is set; take {spec.IMAGE}")
    if job.image and (job.tpu_vm.directory or job.tpu_vm.setup):
        raise ValueError("tpu_vm.directory and tpu_vm.setup are for jobs without image; set one")
    lost = job.capacity.model in ("spot", "flex_start")
    if not job.storage.bucket and (lost or _machines(job) > 1):
        raise ValueError(
            "storage.bucket is not set: a TPU VM's disk goes with it, and is no other's; set "
            "--job.storage.bucket="
        )


def _check_slices(job: spec.Job) -> None:
    chips = accelerators.chips(job.topology)
    default = next(t for t in job.tpu.topologies() if accelerators.chips(t) == chips)
    if job.topology != default:
        raise ValueError(
            f"topology {job.topology!r}: on TPU VMs, {_type(job)} is {default}; take that, or "
            "--to=gke"
        )
    if job.slices == 1:
        return
    if _machines(job) == 1:
        raise ValueError(
            f"slices = {job.slices} of {_type(job)}, which is one TPU VM: several slices work "
            "together only from two each; take a larger topology or slices=1"
        )
    longest = f"{job.name}-{job.slices - 1}"
    if len(longest) > LIMIT:
        raise ValueError(
            f"name {job.name!r} has {len(job.name)} characters, and the node {longest} has "
            f"{len(longest)} of {LIMIT}: shorten name to {len(job.name) - len(longest) + LIMIT}"
        )


def _machines(job: spec.Job) -> int:
    """TPU VMs of a slice."""
    return 1 if job.topology == TOGETHER else job.hosts


def _type(job: spec.Job) -> str:
    """What Cloud TPU calls a slice."""
    return f"{job.tpu.vm}-{accelerators.chips(job.topology) * job.tpu.vm_unit}"


def _gcloud(job: spec.Job, command: str, name: str, *options: str) -> list[str]:
    place = (f"--project={job.tpu_vm.project}", f"--zone={job.tpu_vm.zone}")
    return ["gcloud", *command.split(), name, *place, *options]


def _create(job: spec.Job) -> list[str]:
    several = (f"--node-prefix={job.name}", f"--node-count={job.slices}")
    track, capacity = {
        "on_demand": ("", ()),
        "reserved": ("alpha ", (f"--reservation={job.capacity.reservation}",)),
        "spot": ("", ("--spot",)),
        "flex_start": ("alpha ", ("--provisioning-model=flex-start",
                                  f"--max-run-duration={LONGEST}")),
    }[job.capacity.model]  # fmt: skip
    account = job.tpu_vm.service_account
    return _gcloud(
        job, f"{track}{QUEUE} create", job.name,
        *(several if job.slices > 1 else (f"--node-id={job.name}",)),
        f"--accelerator-type={_type(job)}",
        f"--runtime-version={job.tpu_vm.runtime or job.tpu.runtime}",
        *capacity,
        *((f"--service-account={account}",) if account else ()),
        f"--metadata-from-file=startup-script={spec.folder(job) / FILE}",
    )  # fmt: skip


def _on_first(job: spec.Job, command: str) -> str:
    """What runs this on the machine of process 0."""
    node = f"{job.name}-0" if job.slices > 1 else job.name
    ssh = _gcloud(job, "compute tpus tpu-vm ssh", node, "--worker=0", f"--command={command}")
    return shlex.join(ssh)


def _mount(job: spec.Job) -> list[str]:
    if not job.storage.bucket:
        return []
    mount, options = shlex.quote(job.storage.mount), " ".join(FUSE)
    return [MOUNT.format(mount=mount, options=options, bucket=shlex.quote(job.storage.bucket))]


def _command(job: spec.Job) -> list[str]:
    """Lines of which the last becomes the process, or a client of docker that stands for it."""
    if not job.image:
        command = f"exec {shlex.join(job.command())}"
        return [f"cd {shlex.quote(job.tpu_vm.directory)}", *job.tpu_vm.setup, command]
    registry = job.image.partition("/")[0]
    known = [f"gcloud auth configure-docker {registry} --quiet"]
    run = ["exec", "docker", "run", "--rm", f"--name={UNIT}", "--privileged", "--network=host",
           "--ipc=host"]  # fmt: skip
    mount = [f"--volume={job.storage.mount}:{job.storage.mount}"] if job.storage.bucket else []
    variables = [f"--env={name}" for name in (*job.environment(), *PLACE)]
    parts = (run, [*mount, *variables], [job.image, *job.command()])
    return [
        *(known if registry.endswith((".pkg.dev", "gcr.io")) else []),
        f"docker rm --force {UNIT} &> /dev/null || true  # of a client that was killed",
        " \\\n  ".join(map(shlex.join, parts)),
    ]
