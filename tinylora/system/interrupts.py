"""Ctrl-C, SIGTERM and SIGHUP stop a program alike: the first one as an exception, a later one at once.

A signal that was ignored at the start, as by nohup or in a shell's background, stays ignored.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
AT_ONCE_SECONDS = 0.5
"""Signals that follow each other so fast are one: a terminal and the program between may both send it."""

_how_to_go_on: Callable[[], str] = lambda: ""  # noqa: E731


class Interrupted(KeyboardInterrupt):
    """A signal that asks to stop."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def exit_code(stop: KeyboardInterrupt) -> int:
    """128 and the signal's number, as shells count: 130 for Ctrl-C."""
    return 128 + (stop.number if isinstance(stop, Interrupted) else int(signal.SIGINT))


def listen(*, times: int = 1, even_ignored: tuple[int, ...] = ()) -> dict[int, Any]:
    """Raise `Interrupted` for the first so many signals, and end the process at one more; the handlers of before.

    even_ignored: signals that are listened to though they were ignored.
    """
    count, last = 0, -AT_ONCE_SECONDS

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal count, last
        now = time.monotonic()
        if now - last < AT_ONCE_SECONDS:
            return
        count, last = count + 1, now
        if count > times:
            end_at_once(number)
        raise Interrupted(number)

    before: dict[int, Any] = {}
    for name in NAMES:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and (signal.getsignal(number) is not signal.SIG_IGN or number in even_ignored):
            before[number] = signal.signal(number, stop)
    return before


@contextmanager
def listening(*, times: int, even_ignored: tuple[int, ...] = ()) -> Iterator[None]:
    """`listen` in a block."""
    before = listen(times=times, even_ignored=even_ignored)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_at_next() -> None:
    """From here on nothing is left to stop: a signal ends the process without a word."""
    for name in NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(number, lambda number, frame: os._exit(128 + number))


@contextmanager
def going_on(how: Callable[[], str]) -> Iterator[None]:
    """What to say in this block when the process is ended at once; `how` gives "" where nothing can go on."""
    global _how_to_go_on
    before, _how_to_go_on = _how_to_go_on, how
    try:
        yield
    finally:
        _how_to_go_on = before


def end_at_once(number: int) -> None:
    """As a kill, but with a word: files are whole at any instant, so nothing has to be tidied up."""
    with suppress(Exception):
        how = _how_to_go_on()
        os.write(2, f"\ntinylora: ended at once; what was saved is whole{how and '; ' + how}\n".encode())
    os._exit(128 + number)
