"""Talk: what is said to a person while something runs goes to stderr, and how lengths of time and sizes are said.

What a person is shown holds text of strangers: models, files, names. Nothing in it reaches a terminal that would move
the cursor, change colours, title or clipboard, turn the direction of a line, or hide: `show` prints results, and
`say_to_stderr` talk, through `harmless`.
"""

import math
import shlex
import sys
import unicodedata
from collections.abc import Callable

Say = Callable[[str], None]


def say_to_stderr(text: str) -> None:
    """Talk goes to stderr, results to stdout.

    Where it cannot be written (a terminal that is gone, a full disk under a log) it is lost, and the work goes on; a
    reader that has closed the pipe has had enough of both.
    """
    try:
        print(harmless(text), file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def show(text: str, *, end: str = "\n", flush: bool = False) -> None:
    """Print a result for people."""
    print(harmless(text), end=end, flush=flush)


_JOINERS = {"\u200c", "\u200d"}
"""Persian, Indic scripts and emoji cannot do without them, and they move nothing."""
_HIDDEN = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")


def harmless(text: str) -> str:
    """Text with control characters made visible. Line ends and tabs stay.

    Control characters become Unicode's pictures of them; what would turn the direction of a line, hide itself or be no
    character at all becomes its number.

    >>> harmless("a\\x1b[31mb\\u202ec")
    'a␛[31mb[U+202E]c'
    """
    if text.isprintable() and text.isascii():
        return text
    return "".join(_visible(character) for character in text.replace("\r\n", "\n"))


def one_line(text: str, most: int = 1000) -> str:
    """A name or another text of one line, which cannot make a second one; the middle of a long one is left out."""
    if len(text) > most:
        head, tail = most - most // 3, most // 3
        text = f"{text[:head]} [... {len(text) - head - tail:,} characters left out ...] {text[-tail:]}"
    return harmless(text.replace("\n", "\u240a").replace("\t", " "))


def _visible(character: str) -> str:
    if character in "\n\t" or character in _JOINERS:
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    hidden = unicodedata.category(character) in _HIDDEN or 0xFE00 <= code <= 0xFE0E
    return f"[U+{code:04X}]" if hidden else character


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
