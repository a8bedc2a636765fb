"""The command line in a process of its own, which ends with the one that started it.

The driver keeps the other end of this process's standard input and never writes to it. When the driver stops it, or is
killed, that end closes: this process interrupts itself as Ctrl-C would, which leaves a run that can go on.
"""

import _thread
import os
import signal
import sys
import threading
import time
from pathlib import Path

PATIENCE_SECONDS = 20.0
"""How long an interrupted process may take for its last step."""


def command() -> list[str]:
    """What starts this module in another process, whatever folder that is in; the verb and its words follow."""
    root = str(Path(__file__).resolve().parents[2])
    program = f"import sys; sys.path.append({root!r}); from tinylora.cli.child import main; main()"
    return [sys.executable, "-P", "-c", program]


def main() -> None:
    """The `tinylora` command, under that watch."""
    # A shell that starts the driver in the background leaves Ctrl-C ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from tinylora.cli import main as command_line

    command_line()


def _end_with_parent() -> None:
    # os.read and not sys.stdin: a daemon thread that holds sys.stdin's lock at the end of Python is a fatal error
    while os.read(0, 4096):
        pass
    _thread.interrupt_main()
    time.sleep(PATIENCE_SECONDS)
    os._exit(1)
