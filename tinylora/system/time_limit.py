"""A time limit for Python code that is not ours, such as the template of a base model: in any thread, on any system."""

import ctypes
import threading
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
AGAIN_SECONDS = 0.5
"""Between attempts: what interrupts can be lost in a callback whose exceptions Python drops."""


class OutOfTime(Exception):
    """The code had not ended when its time was up."""


class _Interrupted(BaseException):
    """Raised in the thread whose time is up. No Exception, so that the code cannot catch it by the way."""


class _Job:
    """One call under a limit."""

    def __init__(self, thread: int, until: float) -> None:
        self.thread, self.until, self.is_interrupted = thread, until, False


_lock = threading.Lock()
_changed = threading.Condition(_lock)
_jobs: set[_Job] = set()
_wakes_at = 0.0
"""When the watching thread looks next by itself; 0 where it waits for a job, or is not there."""
_watcher: threading.Thread | None = None


def with_time_limit(seconds: float, function: Callable[[], Result]) -> Result:
    """What `function` returns. A thread of its own interrupts it between two steps of Python when the time is up.

    One call of a C function is one step. Raises: OutOfTime, and whatever the function raises.
    """
    job = _Job(threading.get_ident(), time.monotonic() + seconds)
    try:
        try:
            _begin(job)
            return function()
        finally:
            _end(job)
    except _Interrupted:
        _end(job)  # that may be what was interrupted
        raise OutOfTime from None


def _begin(job: _Job) -> None:
    global _watcher
    with _changed:
        _jobs.add(job)
        if _watcher is None or not _watcher.is_alive():  # the first job, or the first behind a fork
            _watcher = threading.Thread(target=_watch, name="time limit", daemon=True)
            _watcher.start()
        elif not _wakes_at or job.until < _wakes_at:
            _changed.notify()


def _end(job: _Job) -> None:
    with _lock:  # not the condition, whose `with` is Python and can be interrupted when the lock is taken
        _jobs.discard(job)
        if job.is_interrupted:  # the function may have ended by itself a moment before
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(job.thread), None)


def _watch() -> None:
    global _wakes_at
    with _changed:
        while True:
            _wakes_at = min((job.until for job in _jobs), default=0.0)
            _changed.wait(max(0.0, _wakes_at - time.monotonic()) if _wakes_at else None)
            now = time.monotonic()
            for job in _jobs:
                if job.until <= now:
                    job.is_interrupted, job.until = True, now + AGAIN_SECONDS
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(job.thread), ctypes.py_object(_Interrupted)
                    )
