"""The demos: every stage of the project in order, one job after the other."""

import dataclasses
import json
import pathlib
import resource
import time
from typing import Any

from emu3_jax import config, metrics


class Stages:
    """Job: runs its fields in order, each a job of its own; what is complete is not done again.

    The field `run_dir` is where they all write. A stage that was interrupted goes on where it was.
    The seconds of each stage, over all starts, are kept in `run_dir`/seconds.json for the report.
    """

    run_dir: str

    def names(self) -> list[str]:
        """The stages, in order."""
        return [field.name for field in dataclasses.fields(self) if field.name != "run_dir"]

    def stage(self, name: str) -> Any:
        """The job of a stage, or with "" all of them; ValueError names the stages."""
        if name and name not in self.names():
            raise ValueError(f"the demo has no stage {name!r}; it has {', '.join(self.names())}")
        return getattr(self, name) if name else self

    def run(self) -> None:
        """Runs all stages, or says that they are done and where to look."""
        run_dir = pathlib.Path(self.run_dir)
        done, seconds = run_dir / "demo.json", run_dir / "seconds.json"
        wanted = json.dumps(config.to_json(self), indent=1)
        report = run_dir / "report.html"
        if done.exists() and done.read_text() == wanted and report.exists():
            print(f"The demo is complete: open {report}")
            return
        done.unlink(missing_ok=True)
        run_dir.mkdir(parents=True, exist_ok=True)
        spent = json.loads(seconds.read_text()) if seconds.exists() else {}
        for number, stage in enumerate(self.names(), start=1):
            print(f"\n[{number}/{len(self.names())}] {stage}", flush=True)
            start = time.time()
            try:
                getattr(self, stage).run()
            finally:
                spent[stage] = spent.get(stage, 0.0) + time.time() - start
                seconds.write_text(json.dumps(spent, indent=1))
        done.write_text(wanted)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"\nThe demo is complete after {metrics.time_left(sum(spent.values()))} "
            f"(peak memory of this start {memory:.1f} GiB): open {report}"
        )


@dataclasses.dataclass
class Demo(Stages):
    """Pictures: drawn from captions, and captions for them."""

    run_dir: str
    images: Any
    vocabulary: Any
    tokenizer: Any
    store: Any
    decoder: Any
    draw: Any
    evaluate: Any
    export: Any
    report: Any


@dataclasses.dataclass
class VideoDemo(Stages):
    """Clips: their next frames, from their captions and first frames."""

    run_dir: str
    clips: Any
    vocabulary: Any
    tokenizer: Any
    store: Any
    decoder: Any
    predict: Any
    evaluate: Any
    report: Any
