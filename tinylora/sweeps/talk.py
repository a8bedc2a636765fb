"""What a sweep's child prints: a log with a bound, and its last lines."""

import os
from collections.abc import Sequence
from pathlib import Path

from tinylora.system.files import cut, open_to_append, write_all

LAST_LINES = 15
"""Lines of a failed child's output that are kept."""
LONGEST_LINE = 1000
"""Characters of such a line."""
MOST_TALK_BYTES, KEPT_TALK_BYTES = 16 * 2**20, 2**20
"""A child's output is cut when it has more bytes than the first; so many of its beginning and of its end stay."""


def cut_talk(path: Path) -> None:
    """Keep the beginning and the end of a log that has become too long, and say in it what was left out.

    A child appends to it meanwhile, wherever its end is; what it writes in the moment of the cut may be lost.
    """
    try:
        size = path.stat().st_size
    except OSError:
        return
    if size <= MOST_TALK_BYTES:
        return
    with path.open("rb") as file:
        file.seek(size - KEPT_TALK_BYTES)
        end = file.read(KEPT_TALK_BYTES)
    cut(path, KEPT_TALK_BYTES)
    fd = open_to_append(path)
    try:
        write_all(fd, f"\n[{size - 2 * KEPT_TALK_BYTES:,} bytes are left out here]\n".encode() + end)
    finally:
        os.close(fd)


def last_lines(path: Path, start: int) -> Sequence[str]:
    """The last lines of a file from a byte on; if it has been cut to less since, of all of it."""
    with path.open("rb") as file:
        size = path.stat().st_size
        file.seek(max(start if start <= size else 0, size - 100_000))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line for line in text.split("\n") if line.strip()][-LAST_LINES:]
    return [line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..." for line in lines]
