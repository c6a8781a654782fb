"""The ledger and what is summed from it, by clocks that the tests set; figures are by hand."""

import math
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from emu3_jax import exit_codes, goodput, launch, ledger, preemption


class Clock:
    """Seconds that pass when told to; the wall clock is 1,000 ahead and can be set."""

    def __init__(self):
        self.now, self.ahead = 50.0, 1000.0

    def __call__(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now + self.ahead

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    monkeypatch.setattr(ledger, "_loading", 0.0)  # of other tests
    return Clock()


@pytest.fixture
def open_ledger(tmp_path, clock):
    return lambda **more: ledger.Ledger(str(tmp_path), clock=clock, wall=clock.wall, **more)


def stepping(book: ledger.Ledger, clock: Clock, seconds: float, step: int) -> None:
    """`seconds` of steps, the last of which is `step`."""
    with book.span("step"):
        clock.wait(seconds)
    book.mark(step)


def kill(tmp_path) -> None:
    """The last attempt did not live to write how it ended."""
    path = tmp_path / goodput.FILE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def of(**seconds) -> dict[str, float]:
    """Seconds by span, the others 0."""
    return dict.fromkeys(goodput.SPANS, 0.0) | seconds


def test_time_is_in_one_span_at_any_moment(open_ledger, clock):
    with open_ledger() as book:
        clock.wait(1)
        with book.span("step"):
            clock.wait(2)
            with book.span("save"):
                clock.wait(4)
                clock.ahead += 10_000  # setting the wall clock changes nothing
                with book.span("data"):
                    clock.wait(8)
                clock.wait(16)
            clock.wait(32)
        clock.wait(64)  # after the first span it is no start-up any more
        assert book.seconds == of(start_up=1, step=34, save=20, data=8, other=64)


def test_waiting_for_batches_is_data(open_ledger, clock):
    def batches():
        for batch in range(2):
            clock.wait(3)
            yield batch

    with open_ledger() as book, book.span("step"):
        for _ in book.timed(batches()):
            clock.wait(5)
        assert book.seconds == of(data=6, step=10)


def test_compilation_is_moved_out_of_the_span_it_happens_in(open_ledger, clock):
    def compiled(seconds: float, name: str = "backend_compile_duration") -> None:
        jax.monitoring.record_event_duration_secs(f"/jax/core/compile/{name}", seconds)

    with open_ledger() as book:
        clock.wait(5)
        compiled(2, "jaxpr_trace_duration")
        with book.span("step"):
            clock.wait(10)
            compiled(3)  # within the next one, as one after the other
            clock.wait(1)
            compiled(1)
            compiled(8)
            clock.wait(4)
            compiled(2, "jaxpr_to_mlir_module_duration")
            assert book.seconds == of(start_up=3, compile=12, step=5)
            clock.wait(1)
            other = threading.Thread(target=compiled, args=(1,))
            other.start()
            other.join()
            jax.monitoring.record_event_duration_secs("/jax/checkpoint/write_duration", 1)
            assert book.seconds == of(start_up=3, compile=12, step=6)
        with book.span("save"):
            clock.wait(1)
            compiled(3600)  # JAX measures by the wall clock: no more than there was
            compiled(-3600)
        assert book.seconds == of(start_up=3, compile=13, step=6)


def test_jax_tells_what_it_compiles(tmp_path):
    """By the names under which the installed one does so."""
    with ledger.Ledger(str(tmp_path)) as book:
        start = book.seconds
        with book.span("step"):
            jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T)(jnp.ones((8, 8))).block_until_ready()
        first = book.seconds
        with book.span("step"):
            time.sleep(0.01)
        assert first["compile"] > start["compile"] and min(first.values()) >= 0
        assert book.seconds["compile"] == first["compile"]
        assert book.seconds["step"] >= first["step"] + 0.01


def test_spans_cost_little(tmp_path):
    """Less than 5 us in and out, in the best of some tries."""
    with ledger.Ledger(str(tmp_path)) as book:
        best = math.inf
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(500):
                with book.span("step"):
                    pass
            best = min(best, (time.perf_counter() - start) / 500)
    assert best < 5e-6


def test_the_first_attempt_of_a_process_began_with_it(open_ledger, clock):
    ledger.loaded(time.monotonic() - 7)
    with open_ledger() as book:
        clock.wait(1)
        assert book.seconds["start_up"] == pytest.approx(8, abs=0.5)
    with open_ledger() as book:
        assert book.seconds["start_up"] == 0


def test_three_attempts_and_a_rewind(open_ledger, clock, tmp_path):
    with open_ledger() as book:
        clock.wait(10)
        book.begin(0)
        stepping(book, clock, 100, 100)  # there is a checkpoint
        with book.span("data"):
            clock.wait(5)
        stepping(book, clock, 50, 150)
        clock.wait(3)
    kill(tmp_path)
    clock.wait(17)
    with pytest.raises(RuntimeError), open_ledger():
        clock.wait(4)
        raise RuntimeError("before it knew its step")
    clock.wait(6)
    with open_ledger() as book:
        clock.wait(8)
        book.begin(100)
        assert book.goodput() == 100 / (165 + 20 + 4 + 6 + 8)
        stepping(book, clock, 100, 200)
        stepping(book, clock, 40, 240)
        book.rewound(200)
        stepping(book, clock, 60, 260)
        with book.span("save"):
            clock.wait(7)
        assert book.goodput() == 260 / 410
    attempts = goodput.read(str(tmp_path))
    whole = goodput.summary(attempts)
    spans = of(start_up=10 + 4 + 8, data=5, save=7, step=100 + 100 + 60)
    assert whole.seconds == spans | dict(lost=50 + 40, down=3 + 17 + 6)
    assert (whole.total, whole.goodput, whole.lost_steps) == (410, 260 / 410, 50 + 40)
    assert whole.ends == {
        "no end written: killed, hung or still running": 1,
        "1, an unforeseen exception (RuntimeError)": 1,
        "0, all steps are done": 1,
    }
    assert [attempt.step for attempt in attempts] == [0, None, 100]
    assert attempts[0].start == 1050
    assert goodput.table(attempts).splitlines()[:4] == [
        "goodput 63.4%: of 6:50 since the first start, 4:20 were steps that count",
        "",
        "step               4:20   63.4%",
        "lost               1:30   22.0%",
    ]
    last = goodput.table(attempts).splitlines()[-1]
    assert last.endswith("3:35  100 to 240, 200 to 260; 0, all steps are done")


def test_steps_are_lost_from_where_any_later_attempt_began(open_ledger, clock, tmp_path):
    """Between marks they take equally long, after the last one only their time is known."""
    marks = [(0, [(100, 10), (300, 40)]), (200, [(250, 25)]), (120, [(400, 30)])]
    for start, steps in marks:
        with open_ledger() as book:
            book.begin(start)
            for step, seconds in steps:
                stepping(book, clock, seconds, step)
            with book.span("step"):
                clock.wait(5)
    whole = goodput.summary(goodput.read(str(tmp_path)))
    kept = 10 + 40 * 20 / 200
    assert whole.seconds["lost"] == (50 - kept + 5) + (25 + 5)
    assert whole.seconds["step"] == kept + 30 + 5
    assert whole.lost_steps == 180 + 50


def test_what_followed_the_last_mark_is_lost_where_the_next_attempt_begins_there(
    open_ledger, clock, tmp_path
):
    for start in (0, 100):
        with pytest.raises(OSError), open_ledger() as book:
            book.begin(start)
            stepping(book, clock, 20, start + 100)
            with book.span("step"):
                clock.wait(5)
                raise OSError
    whole = goodput.summary(goodput.read(str(tmp_path)))
    assert (whole.seconds["step"], whole.seconds["lost"], whole.lost_steps) == (45, 5, 0)


def test_a_preempted_run_loses_nothing(open_ledger, clock, tmp_path):
    for start in (0, 100):
        with pytest.raises(preemption.Preempted), open_ledger() as book:
            book.begin(start)
            stepping(book, clock, 20, start + 100)
            raise preemption.Preempted("saved")
    whole = goodput.summary(goodput.read(str(tmp_path)))
    assert whole.goodput == 1 and whole.lost_steps == 0


def test_a_run_that_is_done_is_not_down(open_ledger, clock, tmp_path):
    for start, pause in ((0, 1000), (100, 0)):
        with open_ledger() as book:
            book.begin(start)
            stepping(book, clock, 20, start + 100)
        clock.wait(pause)
    assert goodput.summary(goodput.read(str(tmp_path))).seconds["down"] == 0


def test_time_between_attempts_is_never_negative(open_ledger, clock, tmp_path):
    for back in (500, 0):
        with pytest.raises(RuntimeError), open_ledger():
            clock.wait(1)
            raise RuntimeError
        clock.ahead -= back
    assert goodput.summary(goodput.read(str(tmp_path))).seconds["down"] == 0


def test_a_line_cut_short_costs_only_itself(open_ledger, clock, tmp_path):
    with open_ledger() as book:
        book.begin(0)
        stepping(book, clock, 10, 10)
        stepping(book, clock, 10, 20)
    kill(tmp_path)
    path = tmp_path / goodput.FILE
    path.write_text(path.read_text()[:-20])
    with open_ledger() as book:
        book.begin(0)
        stepping(book, clock, 10, 10)
    first, second = goodput.read(str(tmp_path))
    assert first.stretches[0].steps == [0, 10] and first.code is None
    assert second.stretches[0].steps == [0, 10] and second.code == exit_codes.DONE


def test_an_attempt_that_wakes_up_late_keeps_to_its_own(open_ledger, clock, tmp_path):
    with open_ledger() as late:
        late.begin(0)
        with open_ledger() as book:
            late.mark(10)
            book.begin(0)
            book.mark(20)
    first, second = goodput.read(str(tmp_path))
    assert (first.stretches[0].steps, second.stretches[0].steps) == ([0, 10], [0, 20])


def test_only_one_process_writes(open_ledger, clock, tmp_path):
    with open_ledger() as book:
        book.begin(0)
        clock.wait(90)
    written = (tmp_path / goodput.FILE).read_text()
    with open_ledger(writes=False) as book:
        assert book.begin(0) == 0
        stepping(book, clock, 10, 10)
        with book.span("data"):
            clock.wait(10)
        assert book.seconds == of(step=10, data=10)
        assert book.goodput() == 0.5
    assert (tmp_path / goodput.FILE).read_text() == written


@pytest.mark.parametrize(
    "error, code",
    [
        (preemption.Preempted("saved"), exit_codes.PREEMPTED),
        (exit_codes.GaveUp("again"), exit_codes.GAVE_UP),
        (UnicodeError("a kind of ValueError"), exit_codes.USAGE),
        (KeyboardInterrupt(), exit_codes.INTERRUPTED),
        (OSError("disk"), exit_codes.TRANSIENT),
        (jax.errors.JaxRuntimeError("INTERNAL: this is the only process"), exit_codes.FAILED),
        (RuntimeError("a mistake"), exit_codes.FAILED),
    ],
)
def test_how_it_ended_is_written(open_ledger, tmp_path, error, code):
    with pytest.raises(type(error)), open_ledger():
        raise error
    (attempt,) = goodput.read(str(tmp_path))
    assert (attempt.code, attempt.why) == (code, type(error).__name__)


@pytest.mark.parametrize(
    "before, step, count",
    [
        ("", 0, 0),
        ("0!", 0, 1),
        ("0! 0- 0!", 0, 3),  # - was killed, ! failed
        ("0! 0! 0!", 10, 0),  # there is a newer checkpoint
        ("0! 0! 10! 10!", 10, 2),
        ("0! 10! ?! ?- ", 10, 3),  # ? did not know its step
        ("?! ?!", 0, 2),
        ("300! 200!", 100, 2),  # checkpoints that were broken
        ("5000! 6000! 7000!", 4000, 1),  # somebody went back
        ("0! 0! 0+", 0, 0),  # + ended in an orderly way
        ("0! 0! 0+ 0!", 0, 1),
    ],
)
def test_attempts_that_get_nowhere_are_counted(before, step, count):
    codes = {"!": exit_codes.FAILED, "-": None, "+": exit_codes.PREEMPTED}
    attempts = []
    for word in before.split():
        start, code = word[:-1], codes[word[-1]]
        stretches = [] if start == "?" else [goodput.Stretch([int(start)], [0], 0)]
        attempts.append(goodput.Attempt(1, 0, 0, {}, stretches, code=code))
    assert goodput.stuck(attempts, step) == count


def test_an_attempt_is_told_how_many_got_nowhere(open_ledger):
    """Anew after a person has started the run again."""
    told = []
    for error in (OSError, RuntimeError, OSError, exit_codes.GaveUp, OSError, KeyboardInterrupt):
        with pytest.raises(error), open_ledger() as book:
            told.append(book.begin(20))
            raise error
    assert told == [0, 1, 2, 3, 0, 1]


def test_a_damaged_checkpoint_is_not_where_an_attempt_began(open_ledger, clock, tmp_path):
    for start, want in ((100, 0), (120, 0), (120, 1)):
        with pytest.raises(OSError), open_ledger() as book:
            book.begin(300)  # cannot be restored
            assert book.begin(start) == want
            raise OSError
    assert [a.step for a in goodput.read(str(tmp_path))] == [100, 120, 120]


def test_an_attempt_that_went_back_got_somewhere(open_ledger, clock, tmp_path):
    for _ in range(2):
        with pytest.raises(OSError), open_ledger() as book:
            book.begin(100)
            stepping(book, clock, 10, 200)
            book.rewound(100)
            assert book.begin(100) == 0
            stepping(book, clock, 10, 150)
            raise OSError
    assert goodput.table(goodput.read(str(tmp_path))).count("100 to 200, 100 to 150;") == 2


def test_the_command_prints_the_table(open_ledger, clock, tmp_path, capsys):
    with open_ledger() as book:
        clock.wait(1)
        book.begin(0)
        stepping(book, clock, 3, 10)
    command = "--config=configs/goodput.py"
    assert launch.main([command, f"--config.run_dir={tmp_path}"]) == exit_codes.DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "goodput 75.0%: of 0:04 since the first start, 0:03 were steps that count"
    assert lines[-1].endswith("0:04  0 to 10; 0, all steps are done")
    assert launch.main([command]) == exit_codes.USAGE
    assert launch.main([command, f"--config.run_dir={tmp_path}/x"]) == exit_codes.USAGE
    assert capsys.readouterr().err.splitlines() == [
        "error: give --config.run_dir=RUN, the directory of a training run",
        f"error: {tmp_path}/x: no ledger.jsonl there; want the directory of a training run",
    ]
