"""This machine: processes with CPU devices, under a supervisor. For trying, and for tests."""

import os
import shlex
import sys

from launch import spec, supervisor


def render(job: spec.Job) -> dict[str, str]:
    """What each process runs, as a shell script that starts them once, without a supervisor."""
    _check(job)
    count, address = job.local.processes, "127.0.0.1:8476"
    lines = []
    for index in range(count):
        environ = job.environment()
        environ |= supervisor.cpus(job.local.devices, environ)
        environ |= supervisor.places(count, index, address)
        words = ["env", *(f"{name}={value}" for name, value in environ.items()), *_command(job)]
        lines.append(f"{shlex.join(words)} &")
    return {"local.sh": "\n".join(["#!/bin/bash", *lines, "wait", ""])}


def commands(job: spec.Job) -> spec.Commands:
    """The supervisor in the background, and signals to it."""
    logs = shlex.quote(job.logs)
    start = shlex.join(["python", "-m", "launch.submit", "--job=FILE", "--to=local"])
    return spec.Commands(
        submit=(start,),
        watch=(f"tail -F {logs}/attempt-*",),
        cancel=(f"kill -TERM $(cat {logs}/supervisor.pid)",),
        resume=(start,),
    )


def submit(job: spec.Job) -> int:
    """Supervises the job until it is done, fails for good or is told to stop; its exit code."""
    _check(job)
    return supervisor.supervise(
        _command(job), lambda restarts: job.local.processes, job.logs,
        devices=job.local.processes * job.local.devices,
        environ=os.environ | job.environment(),
        max_restarts=job.restart.max_restarts, grace_seconds=job.restart.grace_seconds,
    )  # fmt: skip


def _check(job: spec.Job) -> None:
    if job.accelerator != "cpu":
        raise ValueError(
            f"accelerator {job.accelerator!r}: --to=local has CPU devices only; set "
            "--job.accelerator=cpu --job.topology="
        )


def _command(job: spec.Job) -> list[str]:
    return job.command(job.local.python or sys.executable)
