"""What a program leaves behind ends with the scoring, whatever session it went into; others' processes are let be."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinylora.tasks.sandbox import run as sandbox_run
from tinylora.tasks.sandbox.descendants import none_left_behind
from tinylora.tasks.sandbox.run import check_isolation, run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc and prctl")

LEAVES = """
import os, time
def f():
    for _ in range({depth}):
        if os.fork():
            return 1
        os.setsid()
    open({path!r}, "w").write(str(os.getpid()))
    {more}
    time.sleep(600)
    os._exit(0)
"""


MASKED = "import signal; signal.pthread_sigmask(0, range(1, 65))"


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("depth", "more"),
    [
        (1, "pass"),
        (3, "pass"),
        (2, "os.closerange(0, 60)"),
        (1, MASKED),
    ],
    ids=["setsid", "thrice", "closed", "masked"],
)
def test_a_child_in_a_session_of_its_own_ends(
    tmp_path: Path, depth: int, more: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_run.sandbox_child, "__file__", str(without_process_limit(tmp_path)))
    witness = tmp_path / "pid"
    outcome = run_python(
        LEAVES.format(depth=depth, path=str(witness), more=more) + "\nf()\nimport time\ntime.sleep(0.5)\n",
        ["True == True"], timeout_seconds=20, isolate=False,
    )  # fmt: skip
    deadline = time.monotonic() + 5
    while not witness.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert witness.exists(), outcome
    assert not lives(int(witness.read_text()))


def without_process_limit(folder: Path) -> Path:
    """The child's program for whom no limit on processes counts, as for root."""
    source = Path(sandbox_run.sandbox_child.__file__).read_text()
    assert '"RLIMIT_NPROC": 0' in source
    program = folder / "child.py"
    program.write_text(source.replace('"RLIMIT_NPROC": 0', '"RLIMIT_NPROC": 4096'))
    return program


def test_the_supervisor_may_be_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code is the same user's as what watches over it."""
    monkeypatch.setattr(sandbox_run.sandbox_child, "__file__", str(without_process_limit(tmp_path)))
    witness = tmp_path / "pid"
    more = f"import signal; open({str(tmp_path / 'done')!r}, 'w').close(); os.kill({{parent}}, signal.SIGKILL)"
    code = "import os\nparent = os.getppid()\n" + LEAVES.format(
        depth=1, path=str(witness), more=more.replace("{parent}", "parent")
    )
    run_python(code + "\nf()\nimport time\ntime.sleep(5)\n", [], timeout_seconds=20, isolate=False)
    assert (tmp_path / "done").exists() and not lives(int(witness.read_text()))


def test_others_processes_are_let_be() -> None:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as before:
        with none_left_behind():
            during = subprocess.Popen(["sleep", "600"])  # of this session: another thread's
            left = subprocess.Popen(["sleep", "600"], start_new_session=True)
        assert before.poll() is None and during.poll() is None
        assert not lives(left.pid)
        for process in (before, during):
            process.kill()
            process.wait(timeout=10)
        left.wait(timeout=10)
    assert os.getpid()


def test_a_python_below_the_temporary_folder_is_shut_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        check_isolation()
    except Exception as error:
        pytest.skip(str(error))
    if not str(tmp_path).startswith("/tmp/"):
        pytest.skip("the temporary folder is another one")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    home = Path(sys.base_prefix)
    python = tmp_path / "bin" / version
    python.parent.mkdir()
    shutil.copy2(os.path.realpath(sys.executable), python)
    leave_out = shutil.ignore_patterns("site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__",
                                       "config-*", "tkinter", "ensurepip", "lib2to3")  # fmt: skip
    shutil.copytree(home / "lib" / version, tmp_path / "lib" / version, ignore=leave_out, symlinks=False)
    for library in (home / "lib").glob("libpython*"):
        shutil.copy2(library, tmp_path / "lib")
    monkeypatch.setattr(sandbox_run.sys, "executable", str(python))
    code = "import json, os\ndef f():\n    open('/tmp/x', 'w').write('a')\n    return json.dumps(os.listdir('/tmp/'))"
    assert run_python("import decimal\ndef f(): return 3", ["assert f() == 3"], timeout_seconds=60).passed
    outcome = run_python(code, ["assert 'x' in f()"], timeout_seconds=60)
    assert outcome.passed, outcome
    write = f"def f():\n    open({str(tmp_path / 'lib' / version / 'os.py')!r}, 'a')"
    assert not run_python(write, ["f()"], timeout_seconds=60).passed
