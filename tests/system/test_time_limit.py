"""The time limit interrupts what does not end, in any thread, and leaves everything else alone."""

import contextlib
import threading
import time

import pytest

from tinylora.system.time_limit import OutOfTime, with_time_limit


def forever() -> None:
    while True:
        pass


def test_what_ends_in_time_is_as_without_a_limit() -> None:
    assert with_time_limit(60, lambda: 3) == 3
    with pytest.raises(KeyError, match="x"):
        with_time_limit(60, lambda: {}["x"])


def test_what_does_not_end_is_interrupted_in_every_thread() -> None:
    ended: list[str] = []

    def limited(name: str) -> None:
        with pytest.raises(OutOfTime):
            with_time_limit(0.1, forever)
        ended.append(name)

    threads = [threading.Thread(target=limited, args=(name,), daemon=True) for name in "abc"]
    for thread in threads:
        thread.start()
    limited("main")
    for thread in threads:
        thread.join(60)
    assert sorted(ended) == ["a", "b", "c", "main"]


def test_code_that_catches_everything_it_may_is_interrupted_all_the_same() -> None:
    def stubborn() -> None:
        while True:
            with contextlib.suppress(Exception):
                forever()

    with pytest.raises(OutOfTime):
        with_time_limit(0.1, stubborn)


def test_nothing_is_interrupted_behind_the_end() -> None:
    """The time is up just when the function ends: it is out of time or not, and that is all."""
    ended = 0
    for _ in range(100):
        until = time.monotonic() + 0.002

        def until_then(until: float = until) -> int:
            while time.monotonic() < until:
                pass
            return 1

        try:
            ended += with_time_limit(0.002, until_then)
        except OutOfTime:
            ended += 1
    assert ended == 100
