"""What is to run where: one job, as every back end takes it.

A job file (launch/jobs) defines get_job(), which returns a Job; `--job.field=value` changes fields.
Paths are POSIX paths as the processes see them: buckets are mounted, shared file systems too.
"""

import dataclasses
import pathlib
import re

from emu3_jax import config
from launch import accelerators

MODELS = ("on_demand", "reserved", "spot", "flex_start")
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # RFC 1035, as Kubernetes wants it
IMAGE = "one built from launch/Dockerfile, as in us-docker.pkg.dev/PROJECT/emu3/train@sha256:..."
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclasses.dataclass
class Capacity:
    """How machines are paid for: `model` is one of MODELS; reserved names its `reservation`."""

    model: str = "on_demand"
    reservation: str = ""


@dataclasses.dataclass
class Storage:
    """Where the run writes. `bucket` (a name, without gs://) is mounted at `mount`.

    `run_dir` goes to the job's configuration ("" leaves that alone), `xla_cache` keeps compiled
    programs over restarts ("" does not).
    """

    run_dir: str = ""
    bucket: str = ""
    mount: str = "/gcs"
    xla_cache: str = ""


@dataclasses.dataclass
class Queue:
    """Kueue's LocalQueue that admits the job ("": it starts at once), and its priority class.

    `topology` is the node label within which Kueue shall try to keep the nodes of a GPU job.
    """

    local_queue: str = ""
    priority: str = ""
    topology: str = ""


@dataclasses.dataclass
class Restart:
    """Starts after failures that count, seconds to save in, seconds for all processes to meet.

    Preemptions do not count. `initialization_timeout` must be longer than replacing a node takes.
    """

    max_restarts: int = 50
    grace_seconds: int = 300
    initialization_timeout: int = 1800


@dataclasses.dataclass
class Gke:
    """GKE's part. `context` is kubectl's ("" is the current one).

    `host_network` gives several slices more throughput, but needs care with Workload Identity.
    `networks` are the cluster's Network objects of a GPU node's eth1, eth2, ... (() takes the usual
    names). `tcpxo_daemon` is the image of NCCL's side car on h100-mega, of the version that the
    cluster's installer has.
    """

    context: str = ""
    namespace: str = "default"
    service_account: str = ""
    host_network: bool = False
    privileged: bool = True
    networks: tuple[str, ...] = ()
    tcpxo_daemon: str = ""


@dataclasses.dataclass
class TpuVm:
    """TPU VMs' part; `runtime` "" is the chip's own, `service_account` "" the project's.

    A job without `image` runs in `directory`, the repository: in the bucket, for example. `setup`
    are shell lines before the command there, such as those that install Python.
    """

    project: str = ""
    zone: str = ""
    runtime: str = ""
    service_account: str = ""
    directory: str = ""
    setup: tuple[str, ...] = ()


@dataclasses.dataclass
class Slurm:
    """Slurm's part. `tasks` are processes a node, 0 one for each GPU (what JAX expects of Slurm).

    `directory` is the repository on the shared file system; with `container_image` (enroot's) it
    may be in there. `setup` are shell lines before the command.
    """

    partition: str = ""
    account: str = ""
    time: str = "24:00:00"
    tasks: int = 0
    directory: str = ""
    container_image: str = ""
    container_mounts: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()


@dataclasses.dataclass
class Local:
    """This machine: `processes` with `devices` CPU devices each; `python` "" is this one."""

    processes: int = 2
    devices: int = 1
    python: str = ""


@dataclasses.dataclass
class Job:
    """One run: `config` with `overrides` ("steps=300000") on chips of a kind.

    A TPU job has `slices` of a `topology`; a GPU job has `nodes`; accelerator "cpu" is for trying.
    """

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    accelerator: str = "cpu"
    topology: str = ""
    slices: int = 1
    nodes: int = 1
    image: str = ""
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    capacity: Capacity = dataclasses.field(default_factory=Capacity)
    storage: Storage = dataclasses.field(default_factory=Storage)
    queue: Queue = dataclasses.field(default_factory=Queue)
    restart: Restart = dataclasses.field(default_factory=Restart)
    gke: Gke = dataclasses.field(default_factory=Gke)
    tpu_vm: TpuVm = dataclasses.field(default_factory=TpuVm)
    slurm: Slurm = dataclasses.field(default_factory=Slurm)
    local: Local = dataclasses.field(default_factory=Local)

    @property
    def tpu(self) -> accelerators.Tpu | None:
        """The kind of TPU; None if it is none."""
        return accelerators.TPUS.get(self.accelerator)

    @property
    def gpu(self) -> accelerators.Gpu | None:
        """The kind of GPU; None if it is none."""
        return accelerators.GPUS.get(self.accelerator)

    @property
    def hosts(self) -> int:
        """Machines in each slice of a TPU job; in all otherwise."""
        if self.tpu:
            return max(1, accelerators.chips(self.topology) // accelerators.TPU_HOST)
        return self.nodes

    @property
    def devices(self) -> int:
        """How many devices JAX will have in all processes together."""
        if self.tpu:
            return self.slices * accelerators.chips(self.topology) * self.tpu.devices
        if self.gpu:
            return self.nodes * accelerators.GPU_HOST
        return self.local.processes * self.local.devices

    @property
    def logs(self) -> str:
        """The directory of what processes print, where the back end keeps it in files."""
        return f"{self.storage.run_dir or f'runs/{self.name}'}/logs"

    def command(self, python: str = "python") -> list[str]:
        """What each process runs, in the repository's root."""
        return [python, "-u", "-m", "emu3_jax.launch", *self.arguments()]

    def arguments(self) -> list[str]:
        """The command line of emu3_jax.launch."""
        run_dir = [f"run_dir={self.storage.run_dir}"] if self.storage.run_dir else []
        fields = [f"--config.{field}" for field in (*run_dir, *self.overrides)]
        return [f"--config={self.config}", *fields]

    def environment(self) -> dict[str, str]:
        """Variables of every process on every back end; the job's own `env` comes last."""
        timeout = dict(EMU3_INITIALIZATION_TIMEOUT=str(self.restart.initialization_timeout))
        cache = self.storage.xla_cache
        return timeout | (dict(JAX_COMPILATION_CACHE_DIR=cache) if cache else {}) | self.env

    def check(self) -> None:
        """Raises ValueError, with what to change, for what can run nowhere."""
        if not NAME.fullmatch(self.name) or len(self.name) > 63:
            raise ValueError(
                f"name {self.name!r}: take at most 63 of a-z, 0-9 and -, with a letter first and "
                "no - last"
            )
        accelerators.check(self.accelerator, self.topology, self.slices)
        self._check_numbers()
        self._check_capacity()
        for key in self.env:
            if not VARIABLE.fullmatch(key):
                raise ValueError(f"env {key!r} is no name of a variable; take A-Z, 0-9 and _")
        self._check_storage()
        self._check_config()

    def _check_numbers(self) -> None:
        low = {
            "nodes": (self.nodes, 1),
            "restart.max_restarts": (self.restart.max_restarts, 0),
            "restart.grace_seconds": (self.restart.grace_seconds, 1),
            "restart.initialization_timeout": (self.restart.initialization_timeout, 1),
            "slurm.tasks": (self.slurm.tasks, 0),
            "local.processes": (self.local.processes, 1),
            "local.devices": (self.local.devices, 1),
        }
        for field, (value, least) in low.items():
            if value < least:
                raise ValueError(f"{field} = {value}; take {least} or more")
        if self.tpu and self.nodes != 1:
            raise ValueError(
                f"nodes = {self.nodes} is of GPUs; {self.accelerator} {self.topology} has "
                f"{self.hosts} hosts: set nodes=1 and take a larger topology or more slices"
            )

    def _check_capacity(self) -> None:
        model, reservation = self.capacity.model, self.capacity.reservation
        if model not in MODELS:
            raise ValueError(f"capacity.model {model!r}: take one of {', '.join(MODELS)}")
        if (model == "reserved") != bool(reservation):
            raise ValueError(
                f"capacity.model {model!r} with capacity.reservation {reservation!r}: a "
                "reservation goes with model='reserved', and that with a reservation"
            )

    def _check_storage(self) -> None:
        storage = self.storage
        if "/" in storage.bucket or ":" in storage.bucket:
            raise ValueError(f"storage.bucket {storage.bucket!r}: take the name alone, as in emu3")
        if not storage.mount.startswith("/") or storage.mount.endswith("/"):
            raise ValueError(f"storage.mount {storage.mount!r}: take a path such as /gcs")
        for field in ("run_dir", "xla_cache"):
            path = getattr(storage, field)
            if "://" in path:
                raise ValueError(
                    f"storage.{field} {path!r} is a URL; take a path, as in "
                    f"{storage.mount}/{path.split('://')[1].partition('/')[2]}"
                )
            inside = path.startswith(f"{storage.mount}/")
            if storage.bucket and path and not inside:
                raise ValueError(
                    f"storage.{field} {path!r} is not in the bucket, and a restart would not find "
                    f"it; take a path under {storage.mount}"
                )

    def _check_config(self) -> None:
        """The configuration loads with the overrides, and its mesh divides the devices."""
        loaded = config.load(self.arguments())
        if not hasattr(loaded, "mesh"):
            return
        what = f"{self.slices} x {self.topology}" if self.tpu else f"{self.nodes} nodes"
        try:
            data, *_ = loaded.mesh.sizes(self.devices, f"{self.accelerator} {what}")
        except ValueError as error:
            raise ValueError(
                f"{self.config}: {error}: add an override such as mesh.fsdp=-1"
            ) from None
        if data % self.slices:
            raise ValueError(
                f"{self.config}: mesh.data = {data} does not split over {self.slices} slices; add "
                f"the override mesh.data={self.slices}"
            )


@dataclasses.dataclass
class Commands:
    """Shell lines that do what submit() does, look at the job, end it, and go on after it ended.

    In them `--job=FILE` stands for all arguments that make the job.
    """

    submit: tuple[str, ...]
    watch: tuple[str, ...]
    cancel: tuple[str, ...]
    resume: tuple[str, ...]


def folder(job: Job) -> pathlib.Path:
    """Where `write` puts what is submitted, in the current directory."""
    return pathlib.Path("runs", "launch", job.name)


def write(job: Job, files: dict[str, str]) -> None:
    """Keeps what is submitted, so that Commands can name it."""
    folder(job).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder(job) / name).write_text(text)
