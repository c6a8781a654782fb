"""Slurm: one sbatch script, which puts its job back into the queue unless the exit code forbids it.

The repository, the run directory and the stores are on a shared file system. Slurm tells JAX where
its processes meet. When Slurm preempts or cancels a job it grants KillWait (30 s by default) for
saving, whatever is asked for here; before the end of the job's time it is the grace period.
"""

import pathlib
import shlex
import subprocess

from launch import accelerators, shell, spec, supervisor

FILE = "slurm.sbatch"
# Seconds for the other processes when one has ended; Slurm's own way, to kill them at once
# (--kill-on-bad-exit), hides the exit code that says why.
ENDING = 60

# Of a job that is COMPLETING, Slurm has decided already: it was cancelled, or goes back into the
# queue without us.
SCRIPT = """\
#!/bin/bash
{directives}

{follow}
{exports}

failures={logs}/slurm-$SLURM_JOB_ID.failures
trap : TERM  # this shell stays when the processes are told to save
{srun} &
follow $!
if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = COMPLETING ]; then
  echo "ended with $code; Slurm is ending this job"
  exit "$code"
fi
echo "ended with $code; $again"
for _ in 1 2 3 4 5 6 7 8 9 10; do  # while Slurm's controller is away
  scontrol requeue "$SLURM_JOB_ID" && break
  sleep 60
done
sleep 600  # until Slurm ends this shell
exit "$code"
"""


def render(job: spec.Job) -> dict[str, str]:
    """The sbatch script. Raises ValueError for what Slurm does not have."""
    check(job)
    exports = [f"export {name}={shlex.quote(text)}" for name, text in _environment(job).items()]
    text = SCRIPT.format(
        directives="\n".join(f"#SBATCH --{option}" for option in _directives(job)),
        follow=shell.follow(job),
        exports="\n".join(exports),
        srun=_srun(job),
        logs=shlex.quote(job.logs),
    )
    return {FILE: text}


def commands(job: spec.Job) -> spec.Commands:
    """Slurm's lines, for the job by its name; submitted twice, the second one waits."""
    logs = shlex.quote(str(pathlib.Path(job.slurm.directory, job.logs)))
    submit = (f"mkdir -p {logs}", shlex.join(_sbatch(job)))
    mine = f'--name={job.name} --user="$USER"'
    return spec.Commands(
        submit=submit,
        watch=(f"squeue {mine}", f"tail -F {logs}/slurm-*.log"),
        cancel=(f"scancel {mine}",),
        resume=submit,
    )


def submit(job: spec.Job) -> int:
    """Gives the script to sbatch; its exit code."""
    spec.write(job, render(job))
    pathlib.Path(job.slurm.directory, job.logs).mkdir(parents=True, exist_ok=True)
    try:
        return subprocess.run(_sbatch(job), check=False).returncode
    except FileNotFoundError:
        raise ValueError("sbatch is not installed; submit on a login node of the cluster") from None


def _sbatch(job: spec.Job) -> list[str]:
    return ["sbatch", str(spec.folder(job) / FILE)]


def check(job: spec.Job) -> None:
    """Raises ValueError, with what to change, for what Slurm does not have."""
    slurm = job.slurm
    if job.tpu:
        raise ValueError(
            f"accelerator {job.accelerator!r} is not to be had with Slurm; take one of "
            f"{', '.join(accelerators.GPUS)}, cpu"
        )
    if job.storage.bucket:
        raise ValueError(
            f"storage.bucket {job.storage.bucket!r}: on Slurm, all paths are of a shared file "
            "system; set --job.storage.bucket="
        )
    if job.capacity.model not in ("on_demand", "reserved"):
        raise ValueError(
            f"capacity.model {job.capacity.model!r} is a cloud's; on Slurm, choose by "
            "slurm.partition and set --job.capacity.model=on_demand"
        )
    if job.gpu and slurm.tasks not in (0, 1, accelerators.GPU_HOST):
        raise ValueError(
            f"slurm.tasks = {slurm.tasks}: JAX takes one GPU for each task, or all for a single "
            f"one; take 0 ({accelerators.GPU_HOST} of them) or 1"
        )
    if not job.gpu and not slurm.tasks and job.local.processes % job.nodes:
        raise ValueError(
            f"local.processes = {job.local.processes} do not split over nodes = {job.nodes}"
        )
    if slurm.container_image and not job.logs.startswith("/"):
        raise ValueError(
            f"storage.run_dir {job.storage.run_dir!r}: with slurm.container_image, take the full "
            "path of a directory that slurm.container_mounts shows in the container"
        )


def _tasks(job: spec.Job) -> int:
    """Processes of a node."""
    default = accelerators.GPU_HOST if job.gpu else job.local.processes // job.nodes
    return job.slurm.tasks or default


def _directives(job: spec.Job) -> list[str]:
    slurm = job.slurm
    named = {
        "job-name": job.name,
        "dependency": "singleton",  # never two jobs that write to one run
        "partition": slurm.partition,
        "account": slurm.account,
        "reservation": job.capacity.reservation,
        "chdir": "" if slurm.container_image else slurm.directory,
        "nodes": job.nodes,
        "ntasks-per-node": _tasks(job),
        # of the node, not of each task, whose GPUs could not reach the others
        "gres": f"gpu:{accelerators.GPU_HOST}" if job.gpu else "",
        "mem": "0" if job.gpu else "",  # all of it
        "time": slurm.time,
        "signal": f"TERM@{job.restart.grace_seconds}",  # to the processes, before the time is up
        "output": f"{job.logs}/slurm-%j.log",
        "open-mode": "append",
    }
    options = [f"{name}={shlex.quote(str(value))}" for name, value in named.items() if value]
    return [*options, *(["exclusive"] if job.gpu else []), "requeue"]


def _environment(job: spec.Job) -> dict[str, str]:
    environ = job.environment()
    if job.gpu and _tasks(job) == 1:  # else JAX takes the first GPU only
        chips = ",".join(map(str, range(accelerators.GPU_HOST)))
        return dict(JAX_LOCAL_DEVICE_IDS=chips) | environ
    return environ if job.gpu else environ | supervisor.cpus(job.local.devices, environ)


def _srun(job: spec.Job) -> str:
    slurm = job.slurm
    # a task may use every core of its node, and not just one
    words = ["srun", "--label", "--kill-on-bad-exit=0", f"--wait={ENDING}", "--cpu-bind=none"]
    if slurm.container_image:
        words.append(f"--container-image={slurm.container_image}")
        if slurm.container_mounts:
            words.append(f"--container-mounts={','.join(slurm.container_mounts)}")
        if slurm.directory:
            words.append(f"--container-workdir={slurm.directory}")
    setup = "; ".join(slurm.setup)
    shell = ["bash", "-c", f'{setup}; exec "$@"', "bash"] if setup else []
    return " \\\n  ".join((shlex.join(words), shlex.join([*shell, *job.command()])))
