"""End whatever a program has left behind, though it went into a session of its own (Linux; elsewhere nothing is done).

While the program runs, this process adopts what loses its parent below it (PR_SET_CHILD_SUBREAPER), so that nothing
gets away to the first process of the machine. What then stands below this process in another session, and did not
before, is the program's: it is stopped first, so that it starts no more, and killed. A program that starts new
processes faster than they are stopped is given up after PATIENCE_SECONDS.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tinylora.errors import UserError

PATIENCE_SECONDS = 5.0
_SET_SUBREAPER, _GET_SUBREAPER = 36, 37
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def none_left_behind() -> Iterator[None]:
    """Around the whole life of a program. Raises: UserError where something of it is still there at the end."""
    if sys.platform != "linux":
        yield
        return
    library = ctypes.CDLL(None, use_errno=True)
    with _ONE_AT_A_TIME:
        adopted_before = ctypes.c_int(0)
        library.prctl(_GET_SUBREAPER, ctypes.byref(adopted_before), 0, 0, 0)
        before = {pid for pid, _ in _descendants()}
        library.prctl(_SET_SUBREAPER, 1, 0, 0, 0)
        try:
            yield
        finally:
            try:
                _end(before)
            finally:
                library.prctl(_SET_SUBREAPER, adopted_before.value, 0, 0, 0)


def _end(before: set[int]) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    stopped: set[int] = set()
    while found := {pid for pid, session in _descendants() if pid not in before and session != os.getsid(0)}:
        if time.monotonic() > until:
            raise UserError(
                f"the code of a reply has left {len(found)} processes behind that cannot be ended, such as "
                f"{min(found)}; end them, and let such code run shut in, without unsafe_without_namespaces"
            )
        for pid in found - stopped:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGSTOP)
        if found <= stopped:  # nothing new since: none of them can start another
            for pid in found:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            for pid in found:
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.001)
        stopped |= found


def _descendants() -> list[tuple[int, int]]:
    """(process, session) of all that stands below this process."""
    children: dict[int, list[tuple[int, int]]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()  # its name may hold anything, also brackets
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(int(fields[1]), []).append((int(name), int(fields[3])))
    found, todo = [], [os.getpid()]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += [pid for pid, _ in below]
    return found
