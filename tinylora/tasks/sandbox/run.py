"""Run code that nobody has read: in a process of its own, with limits on time, memory and files, without a network.

`sandbox_child.py` says how the machine is protected. The verdict is protected by being given here: the process that
runs the code gets the expressions that the tests ask for and answers with their values as plain data; the expected
values never leave this process, and the comparison happens here. So an early exit, an object equal to everything, a
replaced `exec` or a program that rewrites the one it runs in gains nothing over writing down the expected values, which
stand in the question for all to see. Tests of another form than `assert EXPRESSION == LITERAL` are judged where the
code runs, and code that means to cheat can pass them.
"""

import ast
import json
import marshal
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

from tinylora.errors import UserError
from tinylora.tasks.sandbox import child as sandbox_child
from tinylora.tasks.sandbox.descendants import none_left_behind

GRACE_SECONDS = 10.0
"""The child keeps the time itself; only if it has not ended that long after is it killed from outside."""
LEAST_MEMORY_MB = 64
"""Python alone takes half of it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program; `reason` is for people, and may hold text of the program's own."""

    passed: bool
    reason: str
    timed_out: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """One test: what the code's process is asked for, and what is expected of it."""

    kind: str
    """sandbox_child.VALUE or RUN."""
    source: str
    expected: Any
    """A literal; True for RUN."""


@lru_cache(maxsize=4096)
def read_test(test: str) -> Check:
    """A test as a check: `assert EXPRESSION == LITERAL` (or the other way round) by its value, all else by running it.

    Raises: UserError for a test that is no Python.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            body = ast.parse(test).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"the test {test[:100]!r} is no Python ({error})") from error
    condition = body[0].test if len(body) == 1 and isinstance(body[0], ast.Assert) else None
    if isinstance(condition, ast.Compare) and len(condition.ops) == 1 and isinstance(condition.ops[0], ast.Eq):
        sides = (condition.left, condition.comparators[0])
        for asked, given in (sides, sides[::-1]):
            with suppress(ValueError, TypeError, RecursionError):
                return Check(sandbox_child.VALUE, ast.unparse(asked), ast.literal_eval(given))
    return Check(sandbox_child.RUN, test, True)


def run_python(
    code: str,
    tests: Sequence[str],
    setup: str = "",
    *,
    timeout_seconds: float = 10.0,
    memory_mb: int = 512,
    isolate: bool = True,
) -> Outcome:
    """Run `code`, then `setup`, then the tests in order, all in one module; passed if every test holds, in time.

    timeout_seconds is wall-clock time for all of them. isolate=False leaves namespaces and the filter of system calls
    out: limits hold, but the code can read and write files and use the network as the user can.
    Raises: UserError where the machine does not allow the isolation, with what to do; for a test that is no Python;
    where the sandbox itself fails, so that a machine without memory does not count as a wrong answer.
    """
    if not timeout_seconds > 0 or memory_mb < LEAST_MEMORY_MB:
        raise UserError(
            f"running code needs timeout_seconds above 0 and memory_mb of at least {LEAST_MEMORY_MB}, "
            f"got {timeout_seconds} and {memory_mb}"
        )
    checks = [read_test(test) for test in tests]
    request = {"code": code, "setup": setup, "tests": [(check.kind, check.source) for check in checks]}
    exit_code, answer = _start(marshal.dumps(request), timeout_seconds, memory_mb, isolate)
    if exit_code == sandbox_child.REFUSED:
        raise UserError(
            "a model's code is run in Linux namespaces of its own, and this machine does not allow that "
            f"({answer[1:].decode('utf-8', 'replace') or 'no reason given'}); run where user namespaces are allowed "
            "(a container needs a security profile that does), or accept the risk with "
            "task.scorer_options.unsafe_without_namespaces = true"
        )
    if isolate and (exit_code not in (0, sandbox_child.TIMED_OUT) or (exit_code == 0 and answer[:1] != b"!")):
        raise UserError(  # not the code's fault, which cannot reach that process
            f"the process that runs a model's code failed itself (exit code {exit_code}); is the machine out of memory "
            f"or processes, or can {sys.executable} and its library not be read?"
        )
    if exit_code == sandbox_child.TIMED_OUT:
        return Outcome(False, f"timed out after {timeout_seconds:g} s", timed_out=True)
    return _judge(answer, checks)


def _start(request: bytes, timeout_seconds: float, memory_mb: int, isolate: bool) -> tuple[int, bytes]:
    """(exit code, answer) of the child, which has ended when this returns or raises."""
    if os.name != "posix":
        return sandbox_child.REFUSED, f"?no namespaces are known on {sys.platform}".encode()
    # No site packages and no module from the working folder; a fixed hash seed, so that sets have one order.
    command = [sys.executable, "-s", "-S", "-B", "-P", sandbox_child.__file__]
    environment = {"PYTHONHASHSEED": "0", "PATH": os.defpath, "LANG": "C.UTF-8", "HOME": "/tmp"}
    if "LD_LIBRARY_PATH" in os.environ:  # some Pythons do not start without
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    # Shut in, the code has a folder in memory; only without namespaces it needs one on the disk.
    on_disk = partial(tempfile.TemporaryDirectory, prefix="tinylora-", ignore_cleanup_errors=True)
    with nullcontext() if isolate else none_left_behind(), nullcontext("/") if isolate else on_disk() as folder:
        process = subprocess.Popen(
            [*command, str(timeout_seconds), str(memory_mb << 20), "1" if isolate else "0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        try:
            answer, _ = process.communicate(request, timeout_seconds + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return sandbox_child.TIMED_OUT, b""
        finally:  # also for Ctrl-C; its child dies with it, and without namespaces none_left_behind ends all else
            if not isolate:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
    return process.returncode, answer


def _judge(answer: bytes, checks: Sequence[Check]) -> Outcome:
    """Compare. Nothing in `answer` is trusted: it may have been written by the code."""
    try:
        given = json.loads(answer[1:]) if answer[:1] == b"!" else None
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict) or not isinstance(given.get("values"), list):
        return Outcome(False, "it ended before the last test")
    values, error = given["values"], given.get("error")
    error = error[:300] if isinstance(error, str) else ""
    for number, check in enumerate(checks):
        if number >= len(values):
            return Outcome(False, f"test {number + 1}: {error or 'not reached'}")
        if not same(values[number], check.expected):
            return Outcome(False, f"test {number + 1}: another value than {check.expected!r:.100}")
    return Outcome(False, error) if error else Outcome(True, "passed")


def same(given: object, expected: object) -> bool:
    """Whether a value in the form of `sandbox_child.encode`, which nobody vouches for, equals a literal.

    The effort is bounded by the size of `expected`: equal values have equally many parts.
    """
    try:
        return bool(_decode(given, [_num_parts(expected)]) == expected)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return False


def _num_parts(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(_num_parts(key) + _num_parts(part) for key, part in value.items())
    if isinstance(value, (list, tuple, set)):
        return 1 + sum(map(_num_parts, value))
    return 1


def _decode(given: Any, parts_left: list[int]) -> Any:
    parts_left[0] -= 1
    if parts_left[0] < 0:
        raise ValueError("more parts than expected")
    if given is None or given is True or given is False:
        return given
    kind, content = given
    match kind:
        case "int":
            return int(content, 16)
        case "float":
            return float(content)
        case "complex":
            return complex(content)
        case "str":
            return content if isinstance(content, str) else None
        case "bytes":
            return bytes.fromhex(content)
        case "list":
            return [_decode(part, parts_left) for part in content]
        case "tuple":
            return tuple(_decode(part, parts_left) for part in content)
        case "set" | "frozenset":
            return _frozen([_decode(part, parts_left) for part in content])
        case "dict":
            return {_decode(key, parts_left): _decode(part, parts_left) for key, part in content}
    raise ValueError(f"no type {kind!r}")


def _frozen(parts: list[Any]) -> frozenset[Any]:
    found = frozenset(parts)
    if len(found) != len(parts):
        raise ValueError("a set has each part once")
    return found


@cache
def check_isolation() -> None:
    """Raises: UserError where the machine does not allow the isolation."""
    run_python("", [], timeout_seconds=60.0)
