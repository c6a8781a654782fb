"""XManager: the same JobSet as on GKE, or this machine's processes, as an experiment of XManager's.

XManager's own Kubernetes executor knows single pods only, so launch/experiment.py has another.
Nothing here but `submit` needs XManager, which `make launch` installs in .venv-launch.
"""

import shlex
import sys

from launch import gke, spec


def render(job: spec.Job) -> dict[str, str]:
    """GKE's JobSet; for accelerator "cpu" the script that each process runs."""
    if job.accelerator != "cpu":
        return gke.render(job)
    command = job.command(job.local.python or sys.executable)
    return {"process.sh": f"#!/bin/sh\nexec {shlex.join(command)}\n"}


def commands(job: spec.Job) -> spec.Commands:
    """A JobSet has the job's name, whoever made it: kubectl watches and ends it."""
    submit = (".venv-launch/bin/python -m launch.submit --job=FILE --to=xmanager",)
    if job.accelerator != "cpu":
        jobset = gke.commands(job)
        return spec.Commands(submit, jobset.watch, jobset.cancel, (jobset.resume[0], *submit))
    here = ("# its output is in this terminal, and Ctrl-C ends it",)
    return spec.Commands(submit, watch=here, cancel=here, resume=submit)


def submit(job: spec.Job) -> int:
    """Launches an experiment with one work unit; 1 if it could not be started or failed here."""
    files = render(job)
    try:
        from launch import experiment
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] != "xmanager":
            raise
        raise ValueError(
            "XManager is not installed here; `make launch` installs it: "
            ".venv-launch/bin/python -m launch.submit ..."
        ) from None
    spec.write(job, files)
    return experiment.launch(job)
