"""Standard streams that take whatever is printed, in any encoding, closed or full."""

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


def prepare_streams() -> None:
    """Let stdout and stderr escape what their encoding cannot show, and open the null device where one is closed.

    Else the next file that is opened would get the number of a closed stream, and what is printed would go into it.
    sys.stdin stays None where it was closed, so that whoever reads can say so.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
    sys.stdout = sys.stdout or _null(1)
    sys.stderr = sys.stderr or _null(2)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def can_show(text: str) -> bool:
    """Whether stdout's encoding has every character."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def let_go(stream: TextIO) -> None:
    """Send what a stream holds and cannot get rid of to the null device; Python would complain at its end."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _null(number: int) -> TextIO:
    return open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
