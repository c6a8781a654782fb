"""What needs XManager: an executor that makes JobSets, and an experiment of one job.

In an XManager launcher of one's own:

    experiment.add(xm.Job(Image("emu3"), JobSet(job), args={"optimizer.rate": 1e-4}))

where `job` is a launch.spec.Job; arguments become overrides of its configuration. Each needs its
own `name` and `storage.run_dir`.
"""

import asyncio
import dataclasses
import stat
import sys
from collections.abc import Sequence
from typing import Any

import attr
from absl import flags, logging
from xmanager import xm, xm_local
from xmanager.xm import job_operators
from xmanager.xm_local import executables, handles, registry, status

from emu3_jax import exit_codes
from launch import gke, spec, supervisor

POLL = 15  # seconds
STATES = {
    "": status.LocalWorkUnitStatusEnum.RUNNING,
    "Completed": status.LocalWorkUnitStatusEnum.COMPLETED,
    "Failed": status.LocalWorkUnitStatusEnum.FAILED,
}


def launch(job: spec.Job) -> int:
    """Starts the job as an experiment's only work unit; waits where it runs on this machine."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])  # XManager's own flags keep their defaults
    logging.set_verbosity(logging.FATAL)  # it logs the error that is printed below, with tracebacks
    try:
        with xm_local.create_experiment(experiment_title=job.name) as experiment:
            experiment.add(_group(job) if job.accelerator == "cpu" else _jobset(job))
    except (RuntimeError, xm.ExperimentUnitError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.FAILED
    return exit_codes.DONE


def _jobset(job: spec.Job) -> xm.Job:
    return xm.Job(Image(job.name), JobSet(job))


def _group(job: spec.Job) -> xm.JobGroup:
    """The processes of this machine. XManager starts none of them again."""
    script = spec.folder(job) / "process.sh"
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    count, address = job.local.processes, f"127.0.0.1:{supervisor.free_port()}"
    jobs = {}
    for index in range(count):
        environ = job.environment()
        environ |= supervisor.cpus(job.local.devices, environ)
        environ |= supervisor.places(count, index, address)
        binary = executables.LocalBinary(f"process{index}", str(script.resolve()))
        jobs[f"process{index}"] = xm.Job(binary, xm_local.Local(), env_vars=environ)
    return xm.JobGroup(**jobs)


@attr.s(auto_attribs=True)
class Image(xm.Executable):
    """A container image that exists; the job names it. So XManager has nothing to package."""


class JobSetSpec(xm.ExecutorSpec):
    """Where a JobSet runs: the job says it."""


@attr.s(auto_attribs=True)
class JobSet(xm.Executor):
    """XManager's executor for launch/gke.py: each of its jobs becomes one JobSet."""

    job: spec.Job
    requirements: xm.JobRequirements = attr.Factory(xm.JobRequirements)

    Spec = JobSetSpec

    def __attrs_post_init__(self):
        registry.register(JobSet, launch=JobSet.launch)

    @classmethod
    async def launch(
        cls, local_experiment_unit: Any, job_group: xm.JobGroup
    ) -> Sequence["Handle"]:
        """Called by XManager, which names these arguments. RuntimeError if kubectl fails."""
        jobs = job_operators.flatten_jobs(job_group)
        return [_create(_changed(job)) for job in jobs if isinstance(job.executor, cls)]


def _changed(job: xm.Job) -> spec.Job:
    """The executor's job with what XManager's adds to it."""
    default = job.executor.job
    fields = job.args.to_dict(kwargs_only=True).items()
    return dataclasses.replace(
        default,
        overrides=(*default.overrides, *(f"{name}={value}" for name, value in fields)),
        env=default.env | job.env_vars,
    )


def _create(job: spec.Job) -> "Handle":
    """Not under XManager's name for it, which begins with a digit and so names no JobSet."""
    job.check()
    text = gke.render(job)["jobset.yaml"]
    _kubectl(job, "create", "-f", "-", text=text)
    return Handle(job)


def _kubectl(job: spec.Job, *words: str, text: str | None = None) -> str:
    done = gke.run(gke.kubectl(job, *words), input=text, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"kubectl {words[0]}: {done.stderr.strip()}")
    print(done.stdout, end="")
    return done.stdout


@attr.s(auto_attribs=True)
class Handle(handles.ExecutionHandle):
    """A JobSet that was created."""

    job: spec.Job

    async def wait(self) -> None:
        """Until it has ended; RuntimeError if it failed."""
        while (found := self.get_status()).is_active:
            await asyncio.sleep(POLL)
        if found.is_failed:
            raise RuntimeError(f"JobSet {self.job.name} failed")

    def get_status(self) -> status.LocalWorkUnitStatus:
        """From the JobSet's status; RuntimeError if there is none of that name."""
        path = "jsonpath={.status.terminalState}"
        state = _kubectl(self.job, "get", "jobset", self.job.name, "-o", path)
        return status.LocalWorkUnitStatus(STATES[state])

    def stop(self) -> None:
        """Ends it; what it has trained is saved first."""
        _kubectl(self.job, "delete", "jobset", self.job.name, "--wait=false")
