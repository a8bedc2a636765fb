"""One command line in a child process: what it was given, and what came out."""

import atexit
import faulthandler
import io
import os
import resource
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MOST_BYTES = 2**29
"""Of a file that a child writes, so that one that prints for ever fills no disk."""
NOBODY = 65534


@dataclass(frozen=True, slots=True)
class Came:
    """What came of a child."""

    command: str
    code: int
    """As a shell has it: 128 + the signal for one that a signal ended."""
    out: str
    err: str
    seconds: float
    peak_bytes: int
    cpu_seconds: float
    hung: bool
    may_fail: bool = False
    """Exit code 1 or our own signal is what was asked for."""

    @property
    def traceback(self) -> bool:
        """Whether it showed where in Python it broke, was ended by a signal, or exited with 1."""
        shown = "Traceback (most recent call last)" in self.err or "Traceback (most recent call last)" in self.out
        ended = not self.hung and not self.may_fail and (self.code == 1 or self.code in (134, 135, 136, 137, 139))
        return shown or ended


@dataclass(frozen=True, slots=True)
class Child:
    """A command line and the circumstances of its child."""

    arguments: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str]
    limit_seconds: float = 240.0
    stdin: bytes | None = b""
    """None closes it."""
    prelude: str = ""
    """Python that runs in the child before the command line, such as one that sets the clock."""
    fresh: bool = False
    as_nobody: bool = False
    stdout: Path | None = None
    """Where stdout goes instead."""
    may_fail: bool = False
    program: str = "tinylora"
    meanwhile: Callable[[int, Path, Path], None] | None = None
    """Called with the child's process id and the files of its stdout and stderr while it runs."""
    memory_bytes: int = 24 * 2**30

    def run(self, scratch: Path) -> Came:
        """Start it, wait for its end or its limit, and read what it printed."""
        scratch.mkdir(parents=True, exist_ok=True)
        out, err, given = (scratch / name for name in ("stdout", "stderr", "stdin"))
        for old in (out, err):
            old.unlink(missing_ok=True)  # of the child before, which `meanwhile` would read
        given.write_bytes(self.stdin or b"")
        started = time.monotonic()
        pid = self._start_fresh(out, err, given) if self.fresh else self._fork(out, err, given)
        if self.meanwhile is not None:
            self.meanwhile(pid, out, err)
        status, usage, hung = _wait(pid, started + self.limit_seconds)
        if hung:
            _kill_group(pid)
            _, status, usage = os.wait4(pid, 0)
        _kill_group(pid)  # what it has left behind
        code = os.waitstatus_to_exitcode(status)
        return Came(
            command=shlex.join([self.program, *(repr(a)[1:-1] if not a.isprintable() else a for a in self.arguments)]),
            code=128 - code if code < 0 else code,
            out=_read(self.stdout if self.stdout and self.stdout.is_file() else out),
            err=_read(err),
            seconds=time.monotonic() - started,
            peak_bytes=usage.ru_maxrss * 1024,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            hung=hung,
            may_fail=self.may_fail,
        )

    def _start_fresh(self, out: Path, err: Path, given: Path) -> int:
        command = [sys.executable, "-m", self.program, *map(os.fsencode, self.arguments)]
        if self.prelude:
            code = f"{self.prelude}\nimport runpy, sys\nsys.argv[0] = {self.program!r}\n"
            code += f"runpy.run_module({self.program!r}, run_name='__main__', alter_sys=True)"
            command[1:3] = ["-c", code]
        with (self.stdout or out).open("wb") as stdout, err.open("wb") as stderr, given.open("rb") as stdin:
            process = subprocess.Popen(
                command, cwd=self.folder, env=dict(self.environment), stdout=stdout, stderr=stderr, stdin=stdin,
                start_new_session=True, preexec_fn=self._limits,
            )  # fmt: skip
        process.returncode = 0  # it is waited for by its id
        return process.pid

    def _limits(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_BYTES, MOST_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (self.memory_bytes, self.memory_bytes))
        if self.stdin is None:
            os.close(0)
        if self.as_nobody:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)

    def _fork(self, out: Path, err: Path, given: Path) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            code = self._as_child(out, err, given)
        finally:
            os._exit(code)

    def _as_child(self, out: Path, err: Path, given: Path) -> int:
        os.setsid()
        faulthandler.disable()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        files = (os.open(given, os.O_RDONLY), os.open(self.stdout or out, write), os.open(err, write))
        for target, file in enumerate(files):
            os.dup2(file, target)
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.folder)
        sys.path.insert(0, str(self.folder))
        self._limits()
        encoding, _, errors = self.environment.get("PYTHONIOENCODING", "utf-8").partition(":")
        sys.stdin = None if self.stdin is None else _text(0, "rb", encoding, errors or "strict")
        sys.stdout = _text(1, "wb", encoding, errors or "strict")
        sys.stderr = _text(2, "wb", encoding, "backslashreplace")
        sys.__stdout__, sys.__stderr__, sys.__stdin__ = sys.stdout, sys.stderr, sys.stdin
        sys.argv = [self.program, *self.arguments]
        return _exit_code(self._run_module)

    def _run_module(self) -> None:
        if self.prelude:
            exec(compile(self.prelude, "<prelude>", "exec"), {})
        runpy.run_module(self.program, run_name="__main__", alter_sys=True)


def _exit_code(run: Callable[[], None]) -> int:
    """What an interpreter would exit with after this, its last words included."""
    code = 0
    try:
        run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException as error:
        print(f"Exception ignored at exit: {error!r}", file=sys.stderr)
        code = 120
    sys.stderr.flush()
    return code


def _text(file: int, mode: str, encoding: str, errors: str) -> io.TextIOWrapper:
    raw = io.FileIO(file, mode[0], closefd=False)
    buffered = io.BufferedReader(raw) if mode == "rb" else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffered, encoding=encoding, errors=errors, line_buffering=file == 2, write_through=file == 2
    )


def _wait(pid: int, until: float) -> tuple[int, resource.struct_rusage, bool]:
    """(status, usage, whether it had not ended by then)."""
    pause = 0.005
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return status, usage, False
        if time.monotonic() > until:
            return 0, usage, True
        time.sleep(pause)
        pause = min(0.1, 1.2 * pause)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _read(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(2_000_000).decode("utf-8", errors="replace")
