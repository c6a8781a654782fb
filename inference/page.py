"""The studio's page: what is on it, and serving it. Only this file needs Gradio.

Nothing on the page comes from another host, and nothing is told to one.
"""

import contextlib
import dataclasses
import functools
import html
import math
import os
import socket
import threading
from collections.abc import Callable, Iterator

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import fastapi  # noqa: E402
import gradio as gr  # noqa: E402
import uvicorn  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.middleware.trustedhost import TrustedHostMiddleware  # noqa: E402

from emu3_jax.sampling import Sampling  # noqa: E402
from inference import studio  # noqa: E402
from inference.artist import Canvas  # noqa: E402
from inference.draw import GoOn  # noqa: E402

RATIOS = ["1:1", "4:3", "3:4", "16:9", "9:16"]
LARGEST = "200mb"  # file that may be uploaded
CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important;
  margin: 0 auto !important; }
.said { min-height: 1.6em; font-variant-numeric: tabular-nums; } .bad { color: #a33; }
#drawn img, #image img { image-rendering: pixelated; }
"""


@contextlib.contextmanager
def served(job: "studio.Studio", worker: "studio.Worker", here: socket.socket) -> Iterator[None]:
    """The page is served at an open socket, by a thread of its own."""
    # a page of another site must not reach it by a name that it gives this machine's address
    names = ["127.0.0.1", "localhost", "::1", "[::1]"] if studio.loopback(job.host) else ["*"]
    app = fastapi.FastAPI(
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=names)],
        docs_url=None, redoc_url=None, openapi_url=None,
    )  # fmt: skip
    local = gr.themes.Base(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    app = gr.mount_gradio_app(
        app, _blocks(job, worker), "/", server_name=job.host, footer_links=[], run_history=False,
        max_file_size=LARGEST, ssr_mode=False, theme=local, css=CSS,
    )  # fmt: skip
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs=dict(sockets=[here]), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


def _blocks(job: "studio.Studio", worker: "studio.Worker") -> gr.Blocks:
    with gr.Blocks(title="emu3_jax studio", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(f"# emu3_jax studio\n`{job.model.decoder}`")
        with gr.Row():
            with gr.Column(scale=1, min_width=230):
                canvas, sampling = _settings(job)
            with gr.Column(scale=4), gr.Tabs():
                for name, fill in (("Draw", _draw), ("Ask", _ask), ("Go on", _go_on)):
                    with gr.Tab(name):
                        fill(job, worker, canvas, sampling)
    return blocks


def _settings(job: "studio.Studio") -> tuple[list, list]:
    """The inputs of a canvas and of a sampling, in the order of _canvas and _sampling."""
    first = job.sampling
    with gr.Group():
        canvas = [
            gr.Dropdown(RATIOS, value=job.canvas.ratio, allow_custom_value=True,
                        label="Ratio, width:height"),
            gr.Number(round(math.sqrt(job.canvas.area)), precision=0, minimum=1, maximum=4096,
                      label="Size", info="side of a square of as many pixels"),
        ]  # fmt: skip
    with gr.Group():
        sampling = [
            gr.Number(first.guidance, label="Guidance", info="1: none"),
            gr.Number(first.top_k, precision=0, label="Top-k", info="0: all"),
            gr.Number(first.top_p, step=0.05, label="Top-p"),
            gr.Number(first.temperature, step=0.1, label="Temperature", info="0: the likeliest"),
            gr.Number(first.seed, precision=0, label="Seed"),
        ]
    return canvas, sampling


def _draw(job, worker, canvas, sampling) -> None:
    prompt = gr.Textbox(label="Prompt", lines=2)
    with gr.Row(equal_height=True):
        samples = gr.Slider(1, 8, value=1, step=1, label="Samples", scale=2)
        start, stop = _buttons("Draw")
    said = _said()
    drawn = gr.Gallery(show_label=False, columns=2, height=520, object_fit="contain", format="png",
                       elem_id="drawn")  # fmt: skip

    def task(prompt, samples, *settings):
        return functools.partial(
            studio.draw_images, model=job.model, prompt=prompt, samples=int(samples),
            canvas=_canvas(*settings[:2]), sampling=_sampling(*settings[2:]),
        )  # fmt: skip

    inputs = [prompt, samples, *canvas, *sampling]
    _wire(worker, task, [start.click, prompt.submit], stop, inputs, drawn, said)


def _ask(job, worker, canvas, sampling) -> None:
    with gr.Row():
        image = gr.Image(type="filepath", image_mode=None, label="Image", height=360,
                         elem_id="image", sources=["upload", "clipboard"])  # fmt: skip
        # Gradio would open the file: only our own reader does, which trusts no file
        image.preprocess = lambda upload: upload and upload.path
        with gr.Column():
            question = gr.Textbox(label="Question", lines=2)
            with gr.Row():
                asks, stop = _buttons("Ask")
                captions = gr.Button("Caption", min_width=90)
            said = _said()
            answer = gr.Textbox(label="Answer", lines=4, interactive=False, elem_id="answer")
    gr.Markdown("The image's middle is seen, in the ratio and size at the left.")

    def asked(image, question, *settings):
        return functools.partial(studio.ask, image=image, question=question,
                                 canvas=_canvas(*settings), length=job.length)  # fmt: skip

    def captioned(image, *settings):
        return functools.partial(studio.caption, image=image, canvas=_canvas(*settings),
                                 length=job.length)  # fmt: skip

    _wire(worker, asked, [asks.click, question.submit], stop, [image, question, *canvas], answer,
          said)  # fmt: skip
    _wire(worker, captioned, [captions.click], stop, [image, *canvas], answer, said)


def _go_on(job, worker, canvas, sampling) -> None:
    with gr.Row():
        video = gr.Video(label="Video", height=320, sources=["upload"], elem_id="video")
        longer = gr.Video(label="What follows", height=320, interactive=False, autoplay=True,
                          loop=True, elem_id="longer")  # fmt: skip
    caption = gr.Textbox(label="Caption", info="what the video shows")
    with gr.Row():
        seconds = gr.Number(job.canvas.seconds, label="Seconds", info="of the video's end")
        fps = gr.Number(job.canvas.fps or 24.0, minimum=0.1, label="Frames a second",
                        info="as it is read and drawn")  # fmt: skip
        times = gr.Number(1, precision=0, minimum=1, maximum=16, label="Times",
                          info="as long is drawn")  # fmt: skip
    with gr.Row():
        start, stop = _buttons("Go on")
    said = _said()

    def task(video, caption, seconds, fps, times, *settings):
        canvas = dataclasses.replace(_canvas(*settings[:2]), seconds=seconds, fps=fps)
        goes_on = GoOn(job.model, video or "", caption, times, canvas, _sampling(*settings[2:]))
        return functools.partial(studio.go_on, job=goes_on)

    inputs = [video, caption, seconds, fps, times, *canvas, *sampling]
    _wire(worker, task, [start.click], stop, inputs, longer, said)


def _buttons(name: str) -> tuple[gr.Button, gr.Button]:
    return gr.Button(name, variant="primary", min_width=90), gr.Button("Stop", min_width=90)


def _said() -> gr.HTML:
    """The line on how it goes, or what was wrong."""
    return gr.HTML(elem_classes="said")


def _wire(worker, task: Callable, starts: list[Callable], stop, inputs, shown, said) -> None:
    """Each of the events `starts` has the worker do what task(*inputs' values) gives."""

    def handle(*values):
        try:
            for news in worker.ask(task(*values)):
                yield (gr.skip() if news.shown is None else _value(news.shown),
                       gr.skip() if news.line is None else _line(news.line))  # fmt: skip
        except ValueError as error:  # a toast (gr.Error) would go after some seconds
            yield gr.skip(), _line(str(error), "told bad")

    # "once", the default, would ignore each click after a stop
    events = [start(handle, inputs, [shown, said], show_progress="hidden", trigger_mode="multiple",
                    concurrency_limit=1, concurrency_id="model", api_visibility="private")
              for start in starts]  # fmt: skip
    stop.click(lambda: _line("stopped"), None, said, cancels=events, api_visibility="private")


def _line(text: str, classes: str = "told") -> str:
    return f'<span class="{classes}">{html.escape(text)}</span>'


def _value(shown):
    """What a component takes: a gallery wants a list of pictures."""
    return shown if isinstance(shown, str) else list(shown)


def _canvas(ratio, size) -> Canvas:
    if size is None:
        raise ValueError("no size is given")
    return Canvas(str(ratio), size * size)


def _sampling(*values) -> Sampling:
    if None in values:
        raise ValueError("guidance, top-k, top-p, temperature and seed: one of them is empty")
    guidance, top_k, top_p, temperature, seed = values
    return Sampling(float(guidance), top_k, float(top_p), float(temperature), seed)
