"""The one command: python -m launch.submit --job=launch/jobs/NAME.py --to=BACK_END [--dry-run]

BACK_END is gke, xmanager, tpu_vm, slurm or local; --job.field=value changes fields of the job. With
--dry-run it prints what would be submitted, and how to watch, cancel and resume it. Run it in the
repository's root. What a user can cause ends with one line and exit code 2.
"""

import importlib
import shlex
import sys

from emu3_jax import config, exit_codes
from launch import spec

BACK_ENDS = ("gke", "xmanager", "tpu_vm", "slurm", "local")


def main(argv: list[str]) -> int:
    """Checks the job, then prints or submits it."""
    try:
        name, dry_run, rest = options(argv)
        job = config.load(rest, "job")
        if not isinstance(job, spec.Job):
            raise ValueError(f"get_job() returned {type(job).__name__}; want a launch.spec.Job")
        job.check()
        back_end = importlib.import_module(f"launch.{name}")
        if not dry_run:
            return back_end.submit(job)
        text = shown(job, back_end.render(job), back_end.commands(job))
        print(text.replace("--job=FILE", shlex.join(rest)), end="")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.USAGE
    return exit_codes.DONE


def options(argv: list[str]) -> tuple[str, bool, list[str]]:
    """The back end's name, whether only to print, and the arguments that are the job's."""
    asked = [arg for arg in argv if arg.partition("=")[0] == "--to"]
    name = asked[0].partition("=")[2] if len(asked) == 1 else ""
    if name not in BACK_ENDS:
        raise ValueError(
            f"{' '.join(asked) or 'no --to'}; want one --to=BACK_END, of {', '.join(BACK_ENDS)}"
        )
    rest = [arg for arg in argv if arg not in (*asked, "--dry-run")]
    return name, "--dry-run" in argv, rest


def shown(job: spec.Job, files: dict[str, str], commands: spec.Commands) -> str:
    """What --dry-run prints: files, then command lines, all of it valid to paste."""
    parts = [
        f"# {spec.folder(job) / name}, which submitting writes\n{text.rstrip()}\n"
        for name, text in files.items()
    ]
    for verb in ("submit", "watch", "cancel", "resume"):
        lines = "\n".join(getattr(commands, verb))
        parts.append(f"# to {verb}\n{lines}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
