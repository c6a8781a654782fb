"""A supervisor for processes of this machine: what JobSet does for pods.

The processes of one attempt begin and end together. How they end says whether there is another
(emu3_jax.exit_codes). Their output goes to files, the first one's to the terminal, too.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import math
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping

from emu3_jax import exit_codes

KEPT = 20  # attempts whose output stays
LOGS = "attempt-*-process-*.log"
POLL = 0.05  # seconds
QUICK = 60  # seconds; attempts that end sooner make the wait before the next one longer
DEVICES = "--xla_force_host_platform_device_count"


def supervise(
    command: list[str],
    processes: Callable[[int], int],
    logs: str | os.PathLike,
    *,
    devices: int = 1,
    environ: Mapping[str, str] | None = None,
    max_restarts: int = 50,
    grace_seconds: float = 300,
    patience: float = 10,
    longest_delay: float = 30,
    on_start: Callable[[list[subprocess.Popen]], None] = lambda children: None,
) -> int:
    """Runs `command` in several processes, again and again until it is done; an exit code.

    processes      how many, given the number of restarts so far
    devices        CPU devices of all processes together
    environ        variables of each process, to which its place among them is added
    max_restarts   after failures; preemptions do not count
    grace_seconds  after the first process was told to stop, until those left are killed
    patience       the same after the first one failed
    longest_delay  seconds before a restart, at most, after attempts that all ended quickly
    on_start       called with the processes of each attempt

    SIGTERM and Ctrl-C tell all processes to stop, a second one kills them; then it ends with their
    code, 130 after Ctrl-C. No process outlives it, whatever ends it (on Linux, and as long as the
    main thread called it, which signals need too). Raises ValueError where another supervisor has
    these `logs`.
    """
    policy = _Policy(max_restarts, longest_delay)
    environ = os.environ if environ is None else environ
    with _locked(pathlib.Path(logs)) as directory, _signals() as signals:
        first = 1 + max((_number(path) for path in directory.glob(LOGS)), default=0)
        for restarts in itertools.count():
            attempt = _Attempt(directory, first + restarts)
            with attempt.start(command, processes(restarts), devices, environ):
                on_start(attempt.children)
                attempt.wait(signals, grace_seconds, patience)
            code = policy.judge(attempt, signals)
            if code is None:
                code = policy.pause(signals)
            if code is not None:
                return code


@dataclasses.dataclass
class _Policy:
    """Whether an attempt is the last one, and how long to wait before the next."""

    max_restarts: int
    longest_delay: float
    counted: int = 0
    quick: int = 0  # ends in a row

    def judge(self, attempt: "_Attempt", signals: list[int]) -> int | None:
        """The supervisor's exit code, or None to start again; says which, in one line."""
        index = attempt.decides()
        code, story = attempt.codes[index], attempt.story(index)
        if code == exit_codes.DONE:
            return _say(story, code)
        if code in exit_codes.FATAL:
            return _say(f"{story}; another attempt would end the same", code)
        if signals:
            code = exit_codes.INTERRUPTED if signal.SIGINT in signals else code
            return _say(f"{story}; told to stop, so not starting again", code)
        budget = "not counted"
        if code not in exit_codes.UNCOUNTED:
            self.counted += 1
            budget = f"{self.counted} of {self.max_restarts} counted"
        if self.counted > self.max_restarts:
            return _say(f"{story}; all {self.max_restarts} restarts are used up", code)
        self.quick = self.quick + 1 if attempt.seconds < QUICK else 0
        return _say(f"{story}; starting again ({budget})", None)

    def pause(self, signals: list[int]) -> int | None:
        """Twice as long after each quick end; an exit code if told to stop meanwhile."""
        end = time.monotonic() + min(self.longest_delay, 0.1 * 2 ** min(self.quick, 20))
        while time.monotonic() < end and not signals:
            time.sleep(POLL)
        if not signals:
            return None
        interrupted = signal.SIGINT in signals
        code = exit_codes.INTERRUPTED if interrupted else exit_codes.TERMINATED
        return _say("told to stop between two attempts", code)


def _say(line: str, code: int | None) -> int | None:
    print(line, flush=True)
    return code


class _Attempt:
    """The processes of one attempt: started, watched and gone together."""

    def __init__(self, directory: pathlib.Path, number: int):
        self.directory, self.number = directory, number
        self.children: list[subprocess.Popen] = []
        self.codes: dict[int, int] = {}  # of those that ended, in that order
        self.seconds = 0.0
        for path in directory.glob(LOGS):
            if _number(path) <= number - KEPT:
                path.unlink()

    def log(self, index: int) -> pathlib.Path:
        """Where the output of a process is."""
        return self.directory / f"attempt-{self.number:03}-process-{index}.log"

    @contextlib.contextmanager
    def start(self, command: list[str], count: int, devices: int, environ) -> Iterator[None]:
        """All processes run; none does when it is left."""
        if devices % count:
            raise ValueError(f"{devices} devices do not split over {count} processes")
        begin, address = time.monotonic(), f"127.0.0.1:{free_port()}"
        environ = {**environ, **cpus(devices // count, environ)}
        try:
            for index in range(count):
                with open(self.log(index), "wb") as output:
                    self.children.append(subprocess.Popen(
                        [*_dying_with_us(), *command],
                        env=environ | places(count, index, address),
                        stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                        start_new_session=True,  # Ctrl-C comes to the supervisor alone
                    ))  # fmt: skip
            with open(self.log(0), "rb") as self._said:
                yield
        finally:
            self._kill()
            self.seconds = time.monotonic() - begin

    def wait(self, signals: list[int], grace_seconds: float, patience: float) -> None:
        """Until all have ended: by themselves, or because others did and their time is up."""
        told, deadline = 0, math.inf
        while self._look() < len(self.children):
            now = time.monotonic()
            bad = [code for code in self.codes.values() if code != exit_codes.DONE]
            if bad and deadline == math.inf:
                deadline = now + (grace_seconds if bad[0] in exit_codes.UNCOUNTED else patience)
            if len(signals) > told:
                deadline = now if told else min(deadline, now + grace_seconds)
                told = len(signals)
                for child in self.children:
                    child.send_signal(signal.SIGTERM)  # it saves, or ends where it cannot
            if now >= deadline:
                self._kill()
            time.sleep(POLL)

    def decides(self) -> int:
        """The process whose end is the attempt's: of the worst kind, the first."""

        def kind(index: int) -> int:
            code = self.codes[index]
            kinds = (exit_codes.FATAL, (), exit_codes.UNCOUNTED, (exit_codes.DONE,))
            return next((i for i, codes in enumerate(kinds) if code in codes), 1)

        return min(self.codes, key=kind)

    def story(self, index: int) -> str:
        """How the attempt ended, as the beginning of a line."""
        code = self.codes[index]
        if code == exit_codes.DONE:
            return f"attempt {self.number}: {exit_codes.MEANING[code]}"
        meaning = f" ({exit_codes.MEANING[code]})" if code in exit_codes.MEANING else ""
        return (f"attempt {self.number}: process {index} ended with {code}{meaning}, see "
                f"{self.log(index)}")  # fmt: skip

    def _look(self) -> int:
        """How many have ended by now; what the first process said goes to the terminal."""
        ended = {}
        for index, child in enumerate(self.children):
            if index not in self.codes and child.poll() is not None:
                _kill_group(child)  # what it had started itself
                ended[index] = 128 - child.returncode if child.returncode < 0 else child.returncode
        # of those that ended in one moment, some only because of others
        after = sorted(ended, key=lambda index: ended[index] == exit_codes.TRANSIENT)
        self.codes |= {index: ended[index] for index in after}
        sys.stdout.write(self._said.read().decode(errors="replace"))
        sys.stdout.flush()
        return len(self.codes)

    def _kill(self) -> None:
        for child in self.children:
            if child.returncode is None:
                _kill_group(child)
                child.wait()


def _kill_group(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter: macOS, of zombies
        os.killpg(child.pid, signal.SIGKILL)


def _dying_with_us() -> list[str]:
    """Words before a command: the kernel kills it when this process is gone, however that ends."""
    has = sys.platform == "linux" and shutil.which("setpriv")
    return ["setpriv", "--pdeathsig", "KILL"] if has else []


def places(count: int, index: int, address: str) -> dict[str, str]:
    """Variables that tell a process which one it is of how many, and where they meet."""
    return dict(
        EMU3_NUM_PROCESSES=str(count), EMU3_PROCESS_ID=str(index), JAX_COORDINATOR_ADDRESS=address
    )


def cpus(devices: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that give a process CPU devices, with the flags that `environ` has already."""
    others = [flag for flag in environ.get("XLA_FLAGS", "").split() if not flag.startswith(DEVICES)]
    return dict(JAX_PLATFORMS="cpu", XLA_FLAGS=" ".join([*others, f"{DEVICES}={devices}"]))


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _number(log: pathlib.Path) -> int:
    return int(log.name.split("-")[1])


@contextlib.contextmanager
def _locked(logs: pathlib.Path) -> Iterator[pathlib.Path]:
    """The directory, for one supervisor at a time; the lock goes with the process."""
    logs.mkdir(parents=True, exist_ok=True)
    with open(logs / "supervisor.pid", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid = file.read()
            raise ValueError(
                f"{logs}: process {pid} supervises this run already; end it with kill -TERM {pid}"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield logs
        finally:
            file.truncate(0)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT are added to, instead of what they do otherwise."""
    received: list[int] = []
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(kind, lambda number, _: received.append(number)) for kind in kinds]
    try:
        yield received
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
