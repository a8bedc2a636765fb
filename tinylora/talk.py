"""Talk: what is said to a person while something runs goes to stderr, and how lengths of time and sizes are said."""

import math
import shlex
import sys
from collections.abc import Callable

Say = Callable[[str], None]


def say_to_stderr(text: str) -> None:
    """Talk goes to stderr, results to stdout."""
    print(text, file=sys.stderr, flush=True)


def shell_line(*words: object) -> str:
    """A command as it can be pasted into a shell: words with spaces and the like in quotes.

    >>> shell_line("tinylora", "train", "--resume", "runs/my task-001")
    "tinylora train --resume 'runs/my task-001'"
    """
    return shlex.join(map(str, words))


def format_duration(seconds: float) -> str:
    """A length of time as a person says it: 0.8 s, 42 s, 39 min, 5 h 10 min, 3 d 4 h.

    >>> [format_duration(s) for s in (0.84, 42.4, 2356, 18600, 273600)]
    ['0.8 s', '42 s', '39 min', '5 h 10 min', '3 d 4 h']
    """
    if not math.isfinite(seconds) or seconds < 0:
        return "unknown"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if round(seconds) < 120:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"


def format_bytes(count: int) -> str:
    """A number of bytes as a person says it, in powers of 1000."""
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:,.0f} {units[0]}" if units[0] == "bytes" else f"{value:,.1f} {units[0]}"
