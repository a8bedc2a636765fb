"""A terminal without a person: what a process writes to it, and what would stand on the screen."""

import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import pytest

from tinylora.system.progress import Bar

LIMIT_SECONDS = 240.0
"""For anything that is waited for: a slow machine on which others work takes a minute to import torch."""
CONTROL = re.compile(r"\x1b\[(\??)([\d;]*)([A-Za-z])")


class Terminal:
    """The near end of a pseudo-terminal, emptied all the time, so that nobody who writes to it has to wait."""

    def __init__(self) -> None:
        self._master, self.slave = os.openpty()
        self._bytes = bytearray()
        self._stop = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            ready, _, _ = select.select([self._master], [], [], 0.05)
            if ready:
                try:
                    self._bytes += os.read(self._master, 65536)
                except OSError:  # nobody holds the other end
                    return
            elif self._stop.is_set():
                return

    @property
    def text(self) -> str:
        """All that was written so far."""
        return self._bytes.decode("utf-8", errors="replace")

    @property
    def words(self) -> str:
        """The same without colours and other control sequences."""
        return CONTROL.sub("", self.text)

    def wait_for(self, words: str, process: "subprocess.Popen[str] | None" = None) -> None:
        """Until these were written, by a process that has not ended before."""
        self._wait_until(lambda: words in self.words, words, process)

    def wait_for_line(self, start: str) -> None:
        """Until a line stands there that begins so."""
        self._wait_until(lambda: any(line.startswith(start) for line in screen(self.text)[0]), start)

    def _wait_until(
        self, is_there: Callable[[], bool], what: str, process: "subprocess.Popen[str] | None" = None
    ) -> None:
        until = time.monotonic() + LIMIT_SECONDS
        while not is_there():
            has_ended = process is not None and process.poll() is not None
            assert time.monotonic() < until and not has_ended, f"no {what!r} in {self.text!r}"
            time.sleep(0.02)

    def close(self) -> None:
        """Take in what is still under way."""
        self._stop.set()
        self._reader.join(timeout=LIMIT_SECONDS)
        assert not self._reader.is_alive()
        os.close(self.slave)
        os.close(self._master)


@contextmanager
def terminal() -> Iterator[Terminal]:
    """One that is closed at the end of the block; `text` can be read after it, too."""
    found = Terminal()
    try:
        yield found
    finally:
        found.close()


@contextmanager
def stream_of(one: Terminal) -> Iterator[TextIO]:
    """To write to it in this process."""
    with os.fdopen(os.dup(one.slave), "w", encoding="utf-8", buffering=1) as stream:
        yield stream


def start(
    arguments: Sequence[str], one: Terminal, *, stdout: int | None = None, stderr: int | None = None, **environment: str
) -> "subprocess.Popen[str]":
    """Python with these arguments in a session of its own, at the terminal but for what goes elsewhere."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=one.slave,
        stdout=one.slave if stdout is None else stdout,
        stderr=one.slave if stderr is None else stderr,
        text=True,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30", **environment},
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]", interrupt: bool = False) -> tuple[int, str, str]:
    """Its exit code and what it wrote elsewhere; after Ctrl-C, if that is asked for. Killed if it does not end."""
    if interrupt:
        process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=LIMIT_SECONDS)
    finally:
        process.kill()
    return process.returncode, out or "", err or ""


def bars_of(module: Any, patch: pytest.MonkeyPatch) -> list[Bar]:
    """The bars that a module makes from now on, shown or not."""
    made: list[Bar] = []

    def make(*values: Any, **options: Any) -> Bar:
        made.append(Bar(*values, **options))
        return made[-1]

    patch.setattr(module, "Bar", make)
    return made


def screen(text: str, columns: int = 100) -> tuple[list[str], bool]:
    """The lines that stand there in the end, scrolled away or not, and whether the cursor is visible.

    Knows what is used: going up, to the line's begin and end, erasing lines, colours, the cursor's visibility.
    """
    rows: list[list[str]] = [[]]
    row = column = 0
    visible = True
    position = 0
    while position < len(text):
        if found := CONTROL.match(text, position):
            position = found.end()
            private, numbers, kind = found.groups()
            number = int(numbers) if numbers.isdigit() else None
            if private:
                visible = kind == "h" if number == 25 else visible
            elif kind == "A":
                row = max(0, row - (number or 1))
            elif kind == "K":
                rows[row] = [] if number == 2 else rows[row][:column]
            else:
                assert kind == "m", f"what does {found[0]!r} do?"
            continue
        character = text[position]
        position += 1
        if character == "\r":
            column = 0
        elif character == "\n":
            row, column = row + 1, 0
        else:
            if column == columns:
                row, column = row + 1, 0
            while len(rows) <= row:
                rows.append([])
            line = rows[row]
            line += [" "] * (column + 1 - len(line))
            line[column] = character
            column += 1
        while len(rows) <= row:
            rows.append([])
    lines = ["".join(line).rstrip() for line in rows]
    while lines and not lines[-1]:
        lines.pop()
    return lines, visible
