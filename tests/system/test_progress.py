"""Bars: what they say, where they are drawn and where not, and what they leave behind."""

import io
import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pseudo_terminal import Terminal, finish, screen, start, stream_of, terminal

from tinylora.system import progress
from tinylora.system.progress import Bar, bars
from tinylora.talk import say_to_stderr as say


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def on_a(one: Terminal, patch: pytest.MonkeyPatch, columns: int = 100, term: str = "xterm-256color") -> Iterator[None]:
    """sys.stderr is that terminal, and bars are asked for."""
    patch.setenv("TERM", term)
    patch.setenv("COLUMNS", str(columns))
    patch.delenv("NO_COLOR", raising=False)
    with stream_of(one) as stream:
        patch.setattr(sys, "stderr", stream)
        with bars():
            yield
        assert sys.stderr is stream


# --- what is said ---


def test_counts() -> None:
    bar = Bar("untrained", 1000, "items")
    assert bar.count() == "0/1,000 items"
    bar.advance(128)
    assert bar.count() == "128/1,000 items"
    bar = Bar("fetching", 98_362_432, "bytes")
    bar.update(12_345_678)
    assert bar.count() == "12.3 MB of 98.4 MB"
    assert Bar("unpacking", None, "tensors").count() == ""


def test_the_time_left_is_that_of_the_mean_and_goes_down_between_two_looks() -> None:
    clock = Clock()
    with Bar("basis", 200, "modules", clock=clock) as bar:
        assert bar.time() == "" and math.isnan(bar.seconds_left())
        clock.now += 5
        assert bar.time() == "5 s so far"
        bar.update(1)
        assert bar.time() == "5 s so far"  # one of many that run side by side says little
        bar.update(10)
        assert bar.seconds_left() == 95 and bar.time() == "95 s left"
        clock.now += 35
        assert bar.seconds_left() == 60 and bar.time() == "60 s left"
        clock.now += 100
        assert bar.seconds_left() == 0 and bar.time() == ""  # it was wrong, and does not say more
        bar.update(20)
        assert bar.seconds_left() == 140 / 20 * 180 and bar.time() == "21 min left"
        bar.update(200)
        assert bar.time() == ""


def test_ten_seconds_are_enough_for_a_first_guess() -> None:
    clock = Clock()
    with Bar("fetching", 10**10, "bytes", clock=clock) as bar:
        clock.now += 10
        bar.update(10**8)
        assert bar.seconds_left() == pytest.approx(990)


def test_what_came_before_the_units_were_known_tells_nothing_of_them() -> None:
    clock = Clock()
    with Bar("unpacking", None, "tensors", clock=clock) as bar:
        clock.now += 60
        assert bar.time() == "60 s so far"
        bar.update(0, 100)
        clock.now += 1
        bar.update(10, 100)
        assert bar.seconds_left() == pytest.approx(9)


def test_units_that_are_not_alike_tell_no_time_left_unless_the_caller_does() -> None:
    clock = Clock()
    with Bar("sweep", 10, "jobs", timed=False, clock=clock) as bar:
        clock.now += 90
        bar.update(9)
        assert bar.time() == "90 s so far"
        bar.update(9, seconds_left=30)
        clock.now += 10
        assert bar.time() == "20 s left"


def test_what_is_measured_never_goes_back_nor_beyond_the_whole(tmp_path: Path) -> None:
    file = tmp_path / "part"
    bar = Bar("fetching", 10, "bytes", measure=lambda: file.stat().st_size)
    bar.measure()  # not there yet
    for size, done in ((4, 4), (2, 4), (20, 10)):
        file.write_bytes(b"x" * size)
        bar.measure()
        assert bar.done == done


@pytest.mark.parametrize("terminal_columns", [20, 40, 80, 200])
@pytest.mark.parametrize("label", [3, 30, 300])
def test_columns_fit_where_there_is_room_for_anything(terminal_columns: int, label: int) -> None:
    counts = 15
    words, length = progress._widths(terminal_columns, label, counts)
    assert words <= label and 0 <= length <= progress.LONGEST_BAR
    if terminal_columns >= 60:
        assert words >= min(label, progress.SHORTEST_LABEL) and length >= progress.SHORTEST_BAR
        assert words + counts + length + progress.LEFT_WIDTH + 4 <= terminal_columns


# --- where it is drawn ---


def test_nothing_is_drawn_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Library users get silence, on a terminal, too."""
    with terminal() as one, stream_of(one) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with Bar("basis", 3, "modules") as bar:
            bar.advance()
            assert not bar.is_on and not progress.is_on()
        with bars(wanted=False), Bar("basis", 3, "modules"):
            assert not progress.is_on() and sys.stderr is stream
    assert one.text == ""


def test_a_bar_is_drawn_and_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal() as one:
        with on_a(one, monkeypatch):
            say("before")
            with Bar("untrained", 64, "items") as bar:
                assert bar.is_on and progress.is_on()
                one.wait_for("untrained 0/64 items ━━━")
                bar.advance(16)
                one.wait_for("untrained 16/64 items ━━━")  # by the thread that draws
            say("after")
        assert not progress.is_on()
    assert screen(one.text) == (["before", "after"], True)


def test_work_within_work_is_drawn_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal() as one, on_a(one, monkeypatch):
        with Bar("controls", 10, "conditions", timed=False) as outer:
            for number in range(2):
                with Bar(f"random vector {number}", 1000, "items"):
                    one.wait_for_line(f"controls        {number}/10 conditions ━")
                    one.wait_for_line(f"random vector {number}   0/1,000 items ━")
                outer.advance()
            one.wait_for_line("controls        2/10 conditions ━")  # it has not moved
        say("after")
    assert screen(one.text)[0] == ["after"]


def test_lines_go_above_the_bar_and_are_not_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line longer than the terminal is wrapped by the terminal, so that it can be copied as one."""
    long = "go on with: tinylora train --resume runs/" + 30 * "x-"
    with terminal() as one, on_a(one, monkeypatch, columns=60), Bar("basis", 4, "modules") as bar:
        say("[bold]one[/bold] :smile: 1/2")
        bar.advance()
        say(long)
        print("two", "three", sep="\n", file=sys.stderr)
        sys.stderr.writelines(["four\r\n", "50 %\r100 %\n"])
        sys.stderr.write("be")
        one.wait_for("100 %")
        sys.stderr.write("gun\nnot ended")
    assert f"{long}\r\n" in one.text and "[bold]one[/bold] :smile: 1/2\r\n" in one.text  # nor coloured
    lines, _ = screen(one.text, 60)
    assert lines == [
        "[bold]one[/bold] :smile: 1/2", long[:60], long[60:], "two", "three", "four", "100 %", "begun", "not ended",
    ]  # fmt: skip


def test_a_handler_of_the_log_made_before_the_bar_does_not_tear_it(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.Logger("tinylora.test")
    with terminal() as one, on_a(one, monkeypatch):
        logger.addHandler(logging.StreamHandler())
        logger.warning("early")
        with Bar("basis", 4, "modules"):
            logger.warning("in the middle")
        logger.warning("late")
    assert screen(one.text)[0] == ["early", "in the middle", "late"]


def test_nothing_to_do_and_nothing_known_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal() as one, on_a(one, monkeypatch):
        with Bar("fetching", 0, "bytes") as bar:  # all of it is there: no bar flashes up
            bar.update(0, 0)
        assert one.text == ""
        with Bar("fetching", 0, "bytes") as bar:
            bar.update(0, 2_000_000)
            one.wait_for("fetching 0 bytes of 2.0 MB ━")
        bar.update(1_000_000)  # a thread that comes late
        with Bar("unpacking", None, "tensors") as bar:
            one.wait_for("unpacking  ━")
            bar.update(3, 9)
            one.wait_for("3/9 tensors")
    assert screen(one.text)[0] == []


@pytest.mark.parametrize("columns", [12, 25, 40])
def test_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    with terminal() as one, on_a(one, monkeypatch, columns=columns):
        with Bar("a label that is rather long", 1000, "items") as bar:
            bar.advance(500)
            one.wait_for("a")
        say("after")
    assert screen(one.text, columns)[0] == ["after"]


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_colour(monkeypatch: pytest.MonkeyPatch, no_color: str) -> None:
    with terminal() as one, on_a(one, monkeypatch):
        monkeypatch.setenv("NO_COLOR", no_color)
        with Bar("basis", 4, "modules") as bar:
            bar.advance(2)
            one.wait_for("2/4 modules ━")
    assert ("\x1b[38;" in one.text) == (not no_color)


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_go_up_gets_no_bar(monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    with terminal() as one, on_a(one, monkeypatch, term=term), Bar("basis", 4, "modules"):
        assert not progress.is_on()
    assert one.text == ""


def test_a_job_in_the_background_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "tcgetpgrp", lambda number: os.getpgrp() + 1)
    with terminal() as one, on_a(one, monkeypatch), Bar("basis", 4, "modules"):
        assert not progress.is_on()
    assert one.text == ""


@pytest.mark.parametrize("kind", ["open", "closed", "in memory", "none"])
def test_what_is_no_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    with (tmp_path / "log").open("w") as log:
        streams = {"open": log, "closed": log, "in memory": io.StringIO(), "none": None}
        monkeypatch.setattr(sys, "stderr", streams[kind])
        if kind == "closed":
            log.close()
        with bars(), Bar("basis", 4, "modules"):
            assert not progress.is_on() and sys.stderr is streams[kind]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_terminal_is_as_it_was_after_an_error(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    with terminal() as one:
        outer, inner = Bar("controls", 3, "conditions"), Bar("basis", 4, "modules")
        with pytest.raises(error), on_a(one, monkeypatch), outer, inner:
            raise error
        assert not progress.is_on()
    assert screen(one.text) == ([], True)


def test_ctrl_c_while_a_bar_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.live import Live

    def interrupted(self: Live) -> None:
        if self._started:
            self._started = False
            assert self._refresh_thread is not None
            self._refresh_thread.stop()
            raise KeyboardInterrupt

    with terminal() as one:
        with pytest.raises(KeyboardInterrupt), on_a(one, monkeypatch), Bar("basis", 4, "modules"):
            one.wait_for("0/4 modules")
            monkeypatch.setattr(Live, "stop", interrupted)
        with stream_of(one) as stream:
            print("interrupted", file=stream)
    assert screen(one.text)[0][-1] == "interrupted"


# --- a process of its own ---

DIGGING = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background leaves it ignored
before = set(sys.modules)
import typer
from tinylora.cli.common import Json, verb
from tinylora.system.progress import Bar
assert "rich.live" not in sys.modules
app = typer.Typer()
@app.command()
@verb
def dig(as_json: Json = False) -> None:
    with Bar("digging", 10, "holes") as bar:
        bar.advance(3)
        print("ready", flush=True)
        time.sleep({seconds})
app()
"""


def test_ctrl_c_leaves_the_cursor_and_no_bar() -> None:
    with terminal() as one:
        process = start(["-c", DIGGING.format(seconds=600)], one)
        one.wait_for("3/10 holes ━", process)
        code, _, _ = finish(process, interrupt=True)
    assert code == 130
    assert screen(one.text)[1] and "\x1b[?25l" not in one.text  # it never went, so even kill -9 leaves it
    assert screen(one.text)[0][-1] == "tinylora: interrupted"


@pytest.mark.parametrize(("words", "environment"), [(["--json"], {}), ([], {"TERM": "dumb"})])
def test_with_json_and_on_a_dumb_terminal_a_verb_shows_none(words: list[str], environment: dict[str, str]) -> None:
    with terminal() as one:
        assert finish(start(["-c", DIGGING.format(seconds=0.5), *words], one, **environment))[0] == 0
    assert one.text == "ready\r\n"


def test_rich_comes_with_the_first_bar() -> None:
    code = (
        "import sys\nimport typer\nbefore = set(sys.modules)\nimport tinylora.cli\n"
        "from tinylora.system.progress import Bar\n"
        "with Bar('digging', 2, 'holes') as bar:\n    bar.advance()\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\nassert 'rich' not in new, new"
    )
    with terminal() as one:
        assert finish(start(["-c", code], one))[0] == 0, one.text
    assert one.text == ""


def test_the_screen_of_these_tests() -> None:
    """What it is read by has to be right itself."""
    assert screen("a\r\nbcd\rx\x1b[31m!\x1b[0m\r\n") == (["a", "x!d"], True)
    assert screen("a\r\nb\r\x1b[2K\x1b[1A\x1b[2Kc") == (["c"], True)
    assert screen("abcdef\x1b[?25l", columns=4) == (["abcd", "ef"], False)
