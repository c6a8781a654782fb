"""The studio's page in headless Chromium, over a tiny model; and what it shows of a drawing.

The page is served in .venv-studio, which `make test-all` makes.
"""

import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import threading

import jax
import numpy as np
import pytest
from PIL import Image
from playwright import sync_api

from data_pipelines import video_folder
from inference import studio
from tests import test_draw, toy

ROOT = pathlib.Path(__file__).parent.parent
PYTHON = ROOT / ".venv-studio" / "bin" / "python"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SECONDS = 200  # that anything may take: each new size is compiled
# What a shell starts in the background ignores Ctrl-C, and so do its children.
START = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from emu3_jax import launch
sys.exit(launch.main(sys.argv[1:]))
"""
# The pictures that are shown, one after the other.
SEEN = """() => {
    seen = [];
    new MutationObserver(() => {
        const shown = document.querySelector("#drawn img")?.src;
        if (shown && shown != seen.at(-1)) seen.push(shown);
    }).observe(document.body, { subtree: true, childList: true, attributes: true });
}"""


class Greys:
    """An artist whose codes are levels of grey, 2 x 2 pixels each."""

    factor = 2

    def pixels(self, codes_Bhw):
        return codes_Bhw.repeat(2, axis=1).repeat(2, axis=2)[..., None].repeat(3, axis=3)


def test_a_preview_shows_what_is_drawn_and_the_rest_is_grey():
    drawn_RT = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    pictures_RHWC = studio.preview(Greys(), drawn_RT, (3, 3))
    assert pictures_RHWC.dtype == np.uint8 and pictures_RHWC.shape == (2, 6, 6, 3)
    grey = studio.GREY
    want = [[1, 2, 3], [4, 5, grey], [grey, grey, grey]]
    np.testing.assert_array_equal(pictures_RHWC[0, ::2, ::2, 0], want)
    np.testing.assert_array_equal(pictures_RHWC[1, 1, ::2, 0], [6, 7, 8])


@pytest.mark.parametrize(
    "drawn, want",
    [
        ([1], [[1, 1, 1], [1, 1, 1]]),
        ([1, 2, 3, 4], [[1, 2, 3], [4, 2, 3]]),
        ([1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]),
    ],
)
def test_codes_that_are_missing_repeat_those_above(drawn, want):
    np.testing.assert_array_equal(studio.filled(np.array([drawn]), (2, 3))[0], want)


@pytest.fixture
def worker():
    """A worker whose artist is a word, and who works in another thread."""
    found = studio.Worker("artist")
    thread = threading.Thread(target=found.work, daemon=True)
    thread.start()
    return found


def test_a_worker_tells_and_returns(worker):
    def task(artist, tell):
        tell(artist)
        tell(None, 1)
        return studio.News("done", 2)

    assert list(worker.ask(task)) == [("artist", None), (None, 1), ("done", 2)]


def test_a_task_that_nobody_waits_for_ends(worker):
    ended, seen = threading.Event(), threading.Event()

    def task(artist, tell):
        try:
            tell("first")
            seen.wait()
            while True:
                tell("more")
        finally:
            ended.set()

    news = worker.ask(task)
    assert next(news).line == "first"
    news.close()
    seen.set()
    assert ended.wait(10)
    assert [n.line for n in worker.ask(lambda artist, tell: studio.News("next"))] == ["next"]


@pytest.mark.parametrize(
    "error, told",
    [
        (ValueError("a bad video"), "a bad video"),
        (RuntimeError("no memory\nat all"), "RuntimeError: no memory; the terminal says more"),
    ],
)
def test_a_task_that_fails_gives_one_line_and_the_next_goes_on(worker, error, told, capsys):
    def task(artist, tell):
        raise error

    with pytest.raises(ValueError) as raised:
        list(worker.ask(task))
    assert str(raised.value) == told
    assert [n.line for n in worker.ask(lambda artist, tell: studio.News("next"))] == ["next"]


@pytest.mark.parametrize(
    "host, here", [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False)]
)
def test_which_hosts_are_this_machine(host, here):
    assert studio.loopback(host) is here


def test_a_host_or_a_port_that_is_not_to_be_had():
    with pytest.raises(ValueError, match="host 'nowhere': want an IP address of this machine"):
        studio.Studio(host="nowhere").run()
    with pytest.raises(ValueError, match="127.0.0.1, port 99999: .*give another --config.port"):
        studio.Studio(port=99999).run()


@pytest.mark.skipif(bool(importlib.util.find_spec("gradio")), reason="Gradio is installed")
def test_without_gradio_it_says_how_to_get_it():
    with pytest.raises(ValueError, match="Gradio is not installed here; `make studio` installs it"):
        studio.Studio(port=0).run()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where the studio of a tiny model is; Ctrl-C ends it."""
    with jax.set_mesh(toy.Single().make()):
        model = test_draw.tiny(tmp_path_factory.mktemp("tiny"))
    names = [f"--config.model.{name}={getattr(model, name)}"
             for name in ("tokenizer", "decoder", "vocab")]  # fmt: skip
    settings = ["--config.canvas.area=1024", "--config.canvas.seconds=1", "--config.canvas.fps=8",
                "--config.length=8", "--config.port=0"]  # fmt: skip
    job = subprocess.Popen(
        [PYTHON, "-c", START, "--config=configs/studio.py", *names, *settings],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | dict(XLA_FLAGS="--xla_backend_optimization_level=0"),  # of one device
    )  # fmt: skip
    line = job.stdout.readline()
    found = re.fullmatch(r"the studio is at (http://127\.0\.0\.1:[0-9]+) until Ctrl-C\n", line)
    try:
        assert found, line
        yield found[1]
        job.send_signal(signal.SIGINT)
        assert job.wait(60) == 0
    finally:
        job.kill()


@pytest.fixture
def page(address):
    """The page in a browser, which asked no other host for anything."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        opened, asked = browser.new_page(), []
        opened.set_default_timeout(SECONDS * 1000)
        opened.on("request", lambda request: asked.append(request.url))
        opened.goto(address)
        yield opened
        browser.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def press(page, name: str) -> None:
    """Presses the button of that name on the open tab."""
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def told(page, line: str) -> None:
    """Waits for a line on how it goes, or went wrong, on the open tab."""
    shown = page.locator(".told").locator("visible=true")
    sync_api.expect(shown).to_have_text(re.compile(line), timeout=SECONDS * 1000)


def fetched(page, url: str) -> Image.Image:
    """A picture that the page shows."""
    return Image.open(io.BytesIO(page.request.get(url).body()))


needs_browser = pytest.mark.skipif(
    not PYTHON.exists() or not CHROMIUM,
    reason="no .venv-studio (`make test-all`), or no Chromium (Debian's package chromium)",
)


@pytest.mark.slow
@needs_browser
def test_a_picture_is_seen_while_it_is_drawn(page):
    page.get_by_label("Size").fill("64")
    page.get_by_label("Prompt").fill("a cat")
    page.evaluate(SEEN)
    press(page, "Draw")
    told(page, r"64 x 64 pixels in .* s; prompt and settings are in the PNG")
    page.wait_for_function("() => seen.at(-1).endsWith('/a-cat-0.png')")
    *before, after = page.evaluate("seen")
    first_HWC, last_HWC = (np.asarray(fetched(page, url)) for url in (before[0], after))
    assert first_HWC.shape == last_HWC.shape == (64, 64, 3)
    assert (first_HWC[32:] == studio.GREY).all() and not (first_HWC[:2, :2] == studio.GREY).all()
    assert not (last_HWC[32:] == studio.GREY).all()
    texts = fetched(page, after).text
    assert texts["prompt"] == "a cat" and json.loads(texts["settings"])["guidance"] == 3.0

    page.get_by_label("Prompt").fill(" ")
    press(page, "Draw")
    told(page, "^the prompt is empty$")
    page.get_by_label("Prompt").fill("a cat")
    page.get_by_label("Top-p").fill("2")
    press(page, "Draw")
    told(page, r"^Sampling\(.*\): want temperature >= 0, top_k >= 0, 0 < top_p <= 1$")


@pytest.mark.slow
@needs_browser
def test_after_a_stop_the_next_is_drawn(page):
    page.get_by_label("Prompt").fill("a cat")
    page.get_by_label("Size").fill("128")
    press(page, "Draw")
    told(page, "^(reading|drawing) ")
    press(page, "Stop")
    told(page, "^stopped$")
    page.get_by_label("Size").fill("64")
    press(page, "Draw")
    told(page, "^64 x 64 pixels in ")


@pytest.mark.slow
@needs_browser
def test_questions_and_captions(page, tmp_path):
    noise_HWC = np.random.default_rng(0).integers(0, 256, (40, 32, 3), np.uint8)
    Image.fromarray(noise_HWC).save(tmp_path / "noise.png")
    page.get_by_role("tab", name="Ask").click()
    press(page, "Caption")
    told(page, "^there is no image; upload one$")
    (tmp_path / "broken.png").write_bytes(b"no image" * 100)
    page.locator("#image input[type=file]").set_input_files(tmp_path / "broken.png")
    page.locator("#image img").wait_for(state="attached")
    press(page, "Caption")
    told(page, "^broken.png: .+$")
    page.locator("#image").get_by_label("Remove Image").click()
    page.locator("#image input[type=file]").set_input_files(tmp_path / "noise.png")
    page.locator("#image img").wait_for()
    answer = page.get_by_label("Answer")
    page.get_by_label("Question").fill("What is it?")
    press(page, "Ask")
    told(page, "^answered$")
    assert answer.input_value()
    answered = answer.input_value()
    press(page, "Caption")
    told(page, "^captioned$")
    assert answer.input_value() not in ("", answered)


@pytest.mark.slow
@needs_browser
def test_a_video_goes_on(page, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    frames = [np.full((48, 64, 3), 10 * t, np.uint8) for t in range(16)]
    video_folder.write_video(tmp_path / "clip.mp4", frames, 8)
    page.get_by_role("tab", name="Go on").click()
    upload = page.locator("#video input[type=file]")
    upload.set_input_files(tmp_path / "broken.mp4")
    page.locator("#video video").wait_for(state="attached")
    press(page, "Go on")
    told(page, "^broken.mp4: corrupt video \\(.*\\)$")
    page.locator("#video").get_by_label("Clear").click()
    upload.set_input_files(tmp_path / "clip.mp4")
    page.locator("#video video").wait_for()
    page.get_by_label("Seconds").fill("3")
    press(page, "Go on")
    told(page, "^clip.mp4 has 16 frames at 8 a second, 24 are needed$")
    page.get_by_label("Seconds").fill("1")
    press(page, "Go on")
    told(page, "^1 s of the video, then 1 s drawn$")
    url = page.locator("#longer video").get_attribute("src")
    (tmp_path / "longer.mp4").write_bytes(page.request.get(url).body())
    count, fps, *size = video_folder.info(tmp_path / "longer.mp4")
    assert (count, fps, size) == (16, 8, [32, 32])


@pytest.mark.slow
@needs_browser
def test_a_page_of_another_name_is_refused(page, address):
    assert page.request.get(address, headers={"Host": "elsewhere.example"}).status == 400
