"""Job: a page on this machine to draw, to ask about an image and to go on with a video.

A mesh is current in one thread alone, and a model does one thing at a time. So the thread that runs
the job works (Worker), and the threads that serve the page (inference/page.py) ask it.

R pictures drawn at once  T position in a picture  H rows, W columns, C colours  h rows, w columns
of codes
"""

import contextlib
import dataclasses
import ipaddress
import math
import os
import pathlib
import queue
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from emu3_jax import untrusted
from emu3_jax.sampling import PRESETS, Sampling
from inference import draw
from inference.artist import Artist, Canvas, Model
from inference.chat import Chat

GREY = 128  # what is not drawn yet
BEAT = 1.0  # seconds after which whoever waits for news looks up
PREVIEW = 0.5  # seconds between two looks at a drawing, or twice what the last one took


@dataclasses.dataclass
class Studio:
    """Serves the page at http://HOST:PORT until Ctrl-C. Port 0 takes a free one.

    `canvas` and `sampling` are what the page offers first; answers have at most `length` ids. There
    is no password, so another `host` than this machine's own is for networks that are trusted.
    """

    model: Model = dataclasses.field(default_factory=Model)
    canvas: Canvas = dataclasses.field(default_factory=lambda: Canvas(seconds=2.0, fps=24.0))
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    length: int = 256
    host: str = "127.0.0.1"
    port: int = 7860

    def run(self) -> None:
        """Serves until interrupted; raises ValueError if Gradio or the port is not to be had."""
        with tempfile.TemporaryDirectory() as scratch, _listening(self.host, self.port) as here:
            os.environ["GRADIO_TEMP_DIR"] = scratch  # what is uploaded and drawn goes with the job
            page = _page()
            with self.model.load() as artist:
                worker = Worker(artist)
                with page.served(self, worker, here):
                    if not loopback(self.host):
                        print(f"warning: host {self.host} is open to other machines, without a "
                              "password")  # fmt: skip
                    host = f"[{self.host}]" if ":" in self.host else self.host
                    port = here.getsockname()[1]
                    print(f"the studio is at http://{host}:{port} until Ctrl-C", flush=True)
                    with contextlib.suppress(KeyboardInterrupt):
                        worker.work()


class News(NamedTuple):
    """A line on how it goes, and what there is to show; None: as before."""

    line: str | None = None
    shown: Any = None


class Worker:
    """Does, in the thread that calls `work`, what other threads `ask` for."""

    def __init__(self, artist: Artist):
        self._artist = artist
        self._tasks, self._ended = queue.SimpleQueue(), threading.Event()

    def work(self) -> None:
        """One task after the other, until interrupted."""
        try:
            while True:
                self._do(*self._tasks.get())
        finally:
            self._ended.set()

    def ask(self, task: Callable[[Artist, Callable], News]) -> Iterator[News]:
        """What task(artist, tell) tells, as in tell(line, shown), and last what it returns.

        Now and then there are News of nothing. Closing the iterator ends the task when it next
        tells something. Raises ValueError with one line if the task fails.
        """
        news, dropped = queue.SimpleQueue(), threading.Event()
        self._tasks.put((task, news, dropped))
        try:
            while (said := self._next(news)) is not None:
                if isinstance(said, ValueError):
                    raise said
                yield said
        finally:
            dropped.set()

    def _next(self, news: queue.SimpleQueue) -> News | ValueError | None:
        try:
            return news.get(timeout=BEAT)
        except queue.Empty:
            return ValueError("the studio was ended") if self._ended.is_set() else News()

    def _do(self, task, news, dropped) -> None:
        def tell(line: str | None = None, shown: Any = None) -> None:
            if dropped.is_set():
                raise _Dropped
            news.put(News(line, shown))

        try:
            news.put(task(self._artist, tell))
            news.put(None)
        except _Dropped:
            pass
        except ValueError as error:
            news.put(error)
        except Exception as error:  # a defect, or no memory left: the next task may do
            traceback.print_exc()
            line = untrusted.first_line(error)
            news.put(ValueError(f"{type(error).__name__}: {line}; the terminal says more"))


class _Dropped(Exception):
    """Nobody waits for the task any more."""


def draw_images(
    artist: Artist, tell: Callable, model: Model, prompt: str, samples: int, canvas: Canvas,
    sampling: Sampling,
) -> News:  # fmt: skip
    """A task: the paths of so many PNGs; meanwhile the pictures so far, [R, H, W, C]."""
    tell("reading the prompt (a new size or setting is compiled first)")
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    pictures = [canvas.picture(artist, prompt.strip(), copy) for copy in range(samples)]
    progress, due = draw.Progress("drawing", 0.0, tell), 0.0

    def watch(drawn_RT: np.ndarray, steps: int) -> None:
        nonlocal due
        progress(drawn_RT, steps)
        if (now := time.monotonic()) >= due:
            tell(None, preview(artist, drawn_RT[:samples], pictures[0].grid))
            took = time.monotonic() - now if due else 0.0  # the first one compiles
            due = time.monotonic() + max(PREVIEW, 2 * took)

    begun, paths = time.monotonic(), []
    for picture, codes_thw in zip(pictures, artist.draw(pictures, sampling, watch), strict=True):
        image_HWC = artist.shown(picture, codes_thw)
        data = draw.file(image_HWC, picture, model, sampling)
        paths.append(_kept(data, f"{draw.slug(prompt)}-{picture.copy}.png"))
    height, width, _ = image_HWC.shape
    seconds = time.monotonic() - begun
    return News(f"{width} x {height} pixels in {seconds:.1f} s; prompt and settings are in the PNG",
                paths)  # fmt: skip


def ask(
    artist: Artist, tell: Callable, image: str | None, question: str, canvas: Canvas, length: int
) -> News:
    """A task: the answer to a question about an image, or about nothing."""
    tell("reading the image" if image else "reading the question")

    def watch(drawn_RT: np.ndarray, _: int) -> None:
        tell(f"{drawn_RT.shape[1]} ids so far")

    with _by_name(image):
        block = Chat(image=image or "", canvas=canvas).block(artist)
    answer = artist.answer(block, [(question, "")], length, PRESETS["greedy"], watch)
    return News("answered", answer)


def caption(artist: Artist, tell: Callable, image: str | None, canvas: Canvas, length: int) -> News:
    """A task: an image's likeliest caption."""
    tell("reading the image")
    if not image:
        raise ValueError("there is no image; upload one")
    with _by_name(image):
        block = Chat(image=image, canvas=canvas).block(artist)
    return News("captioned", artist.describe([block], length)[0].strip())


def go_on(artist: Artist, tell: Callable, job: draw.GoOn) -> News:
    """A task: the path of an mp4 that begins with the end of the job's video."""
    tell("reading the video")
    if not job.video:
        raise ValueError("there is no video; upload one")

    def watch(drawn_RT: np.ndarray, steps: int) -> None:
        tell()
        progress(drawn_RT, steps)

    progress = draw.Progress("going on", 0.0, tell)
    with _by_name(job.video):
        data = job.drawn(artist, watch)
    return News(
        f"{job.canvas.seconds:g} s of the video, then {job.times * job.canvas.seconds:g} s drawn",
        _kept(data, f"{pathlib.Path(job.video).stem}-goes-on.mp4"),
    )


def preview(artist: Artist, drawn_RT: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """uint8 pictures_RHWC out of the codes so far; grey where there is none yet."""
    pictures_RHWC = artist.pixels(filled(drawn_RT, grid))
    drawn_hw = np.arange(math.prod(grid)).reshape(grid) < drawn_RT.shape[1]
    drawn_HW = drawn_hw.repeat(artist.factor, axis=0).repeat(artist.factor, axis=1)
    return np.where(drawn_HW[..., None], pictures_RHWC, GREY).astype(np.uint8)


def filled(drawn_RT: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """codes_Rhw out of the first ones, of which there is one at least.

    The rest repeats what is above, since what is decoded depends on its neighbours: nothing shines
    into what is drawn.
    """
    (_, w), count, index_T = grid, drawn_RT.shape[1], np.arange(math.prod(grid))
    above_T = index_T - w * np.maximum(0, -(-(index_T - count + 1) // w))
    return drawn_RT[:, np.where(above_T < 0, count - 1, above_T)].reshape(-1, *grid)


def loopback(host: str) -> bool:
    """Whether only this machine reaches it; ValueError for what is no address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise ValueError(f"host {host!r}: want an IP address of this machine, as 127.0.0.1") \
            from None  # fmt: skip


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    loopback(host)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        here = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(f"{host}, port {port}: {error}; give another --config.port") from None
    with here:
        yield here


def _page():
    try:
        from inference import page
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "gradio"):
            raise
        raise ValueError(
            "Gradio is not installed here; `make studio` installs it and starts this with "
            ".venv-studio/bin/python"
        ) from None
    return page


@contextlib.contextmanager
def _by_name(path: str | None) -> Iterator[None]:
    """Errors name an uploaded file, not where it lies."""
    try:
        yield
    except ValueError as error:
        if not path:
            raise
        raise ValueError(str(error).replace(path, pathlib.Path(path).name)) from None


def _kept(data: bytes, name: str) -> str:
    """The path of a new file of that name among Gradio's, which go with the job."""
    path = pathlib.Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"]), name)
    path.write_bytes(data)
    return str(path)
