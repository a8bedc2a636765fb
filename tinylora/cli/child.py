"""The command line in a process of its own, which ends with the one that started it.

The driver keeps the other end of this process's standard input and never writes to it. When the driver stops it, or is
killed, that end closes: this process interrupts itself as Ctrl-C would, which leaves a run that can go on.
"""

import _thread
import os
import signal
import threading
import time

PATIENCE_SECONDS = 20.0
"""How long an interrupted process may take for its last step."""


def main() -> None:
    """The `tinylora` command, under that watch."""
    # A shell that starts the driver in the background leaves Ctrl-C ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from tinylora.cli import main as command

    command()


def _end_with_parent() -> None:
    # os.read and not sys.stdin: a daemon thread that holds sys.stdin's lock at the end of Python is a fatal error
    while os.read(0, 4096):
        pass
    _thread.interrupt_main()
    time.sleep(PATIENCE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
