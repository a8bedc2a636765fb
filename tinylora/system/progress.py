"""Bars with the time left, at the foot of a terminal, for work that takes long.

Work shows itself where it is done:

    with Bar("basis", len(weights), "modules") as bar:
        for weight in weights:
            ...
            bar.advance()

Nothing is drawn before the command line asks for it with `bars`: neither from Python, nor off a terminal, nor with
--json. A bar is gone when its work ends, so that lines alone are left to scroll back to; what is printed to stderr in
the meantime goes above it. The cursor is never hidden, so that no way to end a process leaves a terminal without one.
"""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, TextIO, cast

from tinylora.talk import format_bytes, format_duration, one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

REFRESHES_PER_SECOND = 4
LEFT_WIDTH = 16
"""Columns for the time, whatever it is just now, so that a bar does not change its length."""
ENOUGH_DONE, ENOUGH_SECONDS = 0.05, 10.0
"""Either is enough to tell the time left: this share of the work, or work for so long."""
LONGEST_BAR, SHORTEST_BAR, SHORTEST_LABEL = 40, 4, 12

_foot: "_Foot | None" = None
"""Where bars are drawn now; None: nowhere."""


class Bar:
    """Work under way: so many of so many units are done. Draws nothing where bars are off."""

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str,
        *,
        timed: bool = True,
        measure: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """total: None while it is not known, 0 where there is nothing to do or to show yet. unit: in the plural; bytes
        are told as kB, MB and so on. timed: whether the units are so alike that those done tell how long the others
        take. measure: gives what is done, asked for whenever it is drawn.
        """
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self._timed, self._measure, self._clock = timed, measure, clock
        self._first, self._began = 0, clock()
        self._changed, self._told = self._began, math.nan
        self._foot: _Foot | None = None

    def __enter__(self) -> Self:
        self._foot = _foot
        self._began = self._changed = self._clock()
        self._show()
        return self

    def __exit__(self, *_: object) -> None:
        foot, self._foot = self._foot, None  # first, as a thread may still tell of progress
        if foot is not None:
            foot.hide(self)

    @property
    def is_on(self) -> bool:
        """Whether anybody could see it."""
        return self._foot is not None

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self.update(self.done + count)

    def update(self, done: int, total: int | None = None, seconds_left: float = math.nan) -> None:
        """So many are done in all. total: where it has changed. seconds_left: where the caller knows better."""
        self.done, self._changed, self._told = done, self._clock(), seconds_left
        if total is not None:
            if self.total is None:  # what came before tells nothing of the units
                self._first, self._began = done, self._changed
            self.total = total
        self._show()

    def _show(self) -> None:
        if self._foot is not None and self.total != 0:
            self._foot.show(self)

    def measure(self) -> None:
        """Ask what is done, where it is asked for."""
        if self._measure is None:
            return
        try:
            found = self._measure()
        except OSError:  # such as a file that was there a moment ago
            return
        if found > self.done:  # a file may be moved between two looks
            self.update(found if self.total is None else min(found, self.total))

    def count(self) -> str:
        """How much is done, such as 128/1,000 items."""
        if self.total is None:
            return ""
        if self.unit == "bytes":
            return f"{format_bytes(self.done)} of {format_bytes(self.total)}"
        return f"{self.done:,}/{self.total:,} {self.unit}"

    def time(self) -> str:
        """The time left, or where that is not known the time that it took so far; nothing in the first second."""
        left, took = self.seconds_left(), self._clock() - self._began
        if left > 0:
            return f"{_in_words(left)} left"
        return f"{_in_words(took)} so far" if took >= 1 and left != 0 else ""

    def seconds_left(self) -> float:
        """As the mean of what was done in this work tells, down to 0; NaN where nothing tells, or too little yet."""
        if self.total is None:
            return math.nan
        left, here, took = self._told, self.done - self._first, self._changed - self._began
        # The first units of many that run side by side take as long as all of these do.
        enough = here > 0 and (here >= ENOUGH_DONE * (self.total - self._first) or took >= ENOUGH_SECONDS)
        if math.isnan(left) and self._timed and enough:
            left = took / here * (self.total - self.done)
        return left if math.isnan(left) else max(0.0, left - (self._clock() - self._changed))


def is_on() -> bool:
    """Whether bars are drawn, so that lines which say the same may be left out."""
    return _foot is not None


@contextmanager
def bars(wanted: bool = True) -> Iterator[None]:
    """Let bars be drawn in a block, if they are wanted and stderr is a terminal in whose foreground we are."""
    global _foot
    stream = sys.stderr
    if not wanted or _foot is not None or not _can_draw(stream):
        yield
        return
    foot = _foot = _Foot(stream)
    above = sys.stderr = cast(TextIO, _Above(stream, foot))
    try:
        yield
    finally:
        _foot = None
        if sys.stderr is above:
            sys.stderr = stream
        foot.close()


def _can_draw(stream: TextIO) -> bool:
    try:
        if not stream.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
            return False
        number = stream.fileno()
    except (OSError, ValueError, AttributeError):  # closed, no file at all, or None after 2>&-
        return False
    try:
        return os.tcgetpgrp(number) == os.getpgrp()  # else somebody types something else there
    except (OSError, AttributeError):  # not the terminal of this session, or Windows
        return True


def _in_words(seconds: float) -> str:
    return f"{math.ceil(seconds)} s" if seconds < 100 else format_duration(seconds)


class _Foot:
    """The bars at the foot of one terminal, the outermost above."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bars: list[Bar] = []
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._console: Console | None = None
        self._line = ""
        """The beginning of a line whose end is not printed yet."""
        self._label = self._counts = 0
        """Width of the columns of labels and counts."""

    def show(self, bar: Bar) -> None:
        """Draw it from now on."""
        if bar in self._bars:
            return
        with self._lock:
            self._bars.append(bar)
            if self._live is None:
                self._live = self._begin()
                self._live.start(refresh=True)
            else:
                self._live.refresh()

    def hide(self, bar: Bar) -> None:
        """Draw it no more."""
        with self._lock:
            if bar in self._bars:
                self._bars.remove(bar)
                if not self._bars:
                    self._end()
                elif self._live is not None:
                    self._live.refresh()

    def close(self) -> None:
        """Leave the terminal as it was, even if Ctrl-C came while a bar was taken away."""
        with self._lock:
            self._bars.clear()
            if self._live is not None:
                self._end()
                self._stream.write("\r\x1b[K")
                self._stream.flush()

    def write(self, text: str) -> None:
        """Print what goes to stderr, above the bars."""
        with self._lock:
            if self._live is None or self._console is None:
                self._stream.write(text)
                return
            *lines, self._line = (self._line + text).split("\n")
            for line in lines:
                self._console.out(line.rstrip("\r").rpartition("\r")[2], highlight=False)
            self._line = self._line.rpartition("\r")[2]  # of another program's bar

    def _begin(self) -> "Live":
        from rich.console import Console
        from rich.live import Live

        class WithCursor(Console):
            def show_cursor(self, show: bool = True) -> bool:
                return False

        if self._console is None:
            self._console = WithCursor(file=self._stream, force_terminal=True, force_interactive=True)
        return Live(
            console=self._console, get_renderable=self._draw, refresh_per_second=REFRESHES_PER_SECOND, transient=True,
            redirect_stdout=False, redirect_stderr=False, vertical_overflow="crop",
        )  # fmt: skip

    def _end(self) -> None:
        assert self._live is not None
        self._live.stop()
        self._live = None
        self._label = self._counts = 0
        if self._line:
            self._stream.write(self._line)
            self._line = ""

    def _draw(self) -> "Table":
        """All bars, in the columns of one table. Takes no lock, as the thread that draws holds rich's."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        assert self._console is not None
        table = Table.grid(padding=(0, 1, 0, 0))
        shown = list(self._bars)
        for bar in shown:
            bar.measure()
            # Never narrower than before, so that an outer bar stands still while inner ones change.
            self._label = max(self._label, len(bar.label))
            self._counts = max(self._counts, len(bar.count()))
        label, length = _widths(self._console.width, self._label, self._counts)
        for width in (label, self._counts, length, LEFT_WIDTH):
            table.add_column(width=width)
        for bar in shown:
            table.add_row(
                Text(one_line(bar.label), no_wrap=True, overflow="ellipsis"),
                Text(bar.count(), no_wrap=True, justify="right"),
                ProgressBar(total=bar.total, completed=bar.done, width=length) if length else "",
                Text(bar.time(), no_wrap=True),
            )
        return table


def _widths(terminal: int, label: int, counts: int) -> tuple[int, int]:
    """Columns for the labels and for the bars themselves; 0 where there is no room for bars."""
    room = terminal - counts - LEFT_WIDTH - 4  # a blank behind each, and the last column left free
    label = min(label, max(SHORTEST_LABEL, room - LONGEST_BAR // 2))
    length = min(LONGEST_BAR, room - label)
    return label, length if length >= SHORTEST_BAR else 0


class _Above:
    """Stands for stderr while bars may be drawn: whole lines go above them."""

    def __init__(self, stream: TextIO, foot: _Foot) -> None:
        self._stream, self._foot = stream, foot

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self._foot.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
