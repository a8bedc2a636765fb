"""What is printed: into ASCII and latin-1, into closed and full streams; and the signals that stop a verb."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tiny_run import adapter_run

needs_posix = pytest.mark.skipif(os.name == "nt", reason="signals, /dev and shells are POSIX")
HARD = "日本 é 😀 \ud83d ━"


def python(code: str, *words: str, **environment: str) -> "subprocess.Popen[str]":
    """A process of a command line with one verb more; Ctrl-C works in it as in a terminal's foreground."""
    before = (
        "import signal, sys, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tinylora.cli import main\nfrom tinylora.cli.common import app, print_json, say, verb\n"
        "sys.argv[1:] = ['dig', *sys.argv[1:]]\n"
    )
    command = [sys.executable, "-c", before + textwrap.dedent(code) + "\nmain()", *words]
    env = {**os.environ, **environment}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="surrogateescape", env=env
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
def test_what_cannot_be_shown_is_escaped(encoding: str) -> None:
    code = f"""
        @app.command()
        @verb
        def dig(as_json: bool = False) -> None:
            say({HARD!r})
            print_json({{"text": {HARD!r}}}) if as_json else print({HARD!r})
    """
    for words in ([], ["--as-json"]):
        process = python(code, *words, PYTHONIOENCODING=encoding)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in stderr, stderr
        shown = json.loads(stdout.encode(errors="surrogateescape").decode(encoding))["text"] if words else stdout
        if words:
            assert shown == HARD  # JSON's own escapes, which every parser takes back
        elif encoding != "utf-8":
            assert "\\u65e5\\u672c" in shown and "\\ud83d" in shown


@needs_posix
@pytest.mark.parametrize(
    ("shell", "code", "sentence"),
    [
        ("tinylora --help > /dev/full", 2, "the disk is full"),
        ("tinylora recipes > /dev/full", 2, "the disk is full"),
        ("tinylora settings --json > /dev/full", 2, "the disk is full"),
        ("tinylora settings | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("(sleep 1; tinylora --help) | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("tinylora recipes >&-", 0, ""),
        ("tinylora recipes >&- 2>&- <&-", 0, ""),
        ("tinylora nonsense 2> /dev/full", 2, ""),
        ("tinylora chat TINY-4WX4 <&-", 2, "standard input is closed, so no line can be typed; ask with --prompt TEXT"),
    ],
)
def test_streams_that_are_closed_or_full(shell: str, code: int, sentence: str) -> None:
    """No traceback, and none of the complaints that Python itself makes at its end."""
    if "/dev/full" in shell and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    command = shell.replace("tinylora", f"{sys.executable} -m tinylora", 1)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == bool(sentence) and all(sentence in line for line in lines), done.stderr


DIGGING = """
    from pathlib import Path
    from tinylora.system.interrupts import going_on

    @app.command()
    @verb
    def dig() -> None:
        with going_on(lambda: "go on with: tinylora dig"):
            try:
                print("ready", flush=True)
                time.sleep(600)
            finally:
                print("tidying", flush=True)
                time.sleep({seconds})
"""


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return process.stdout.readline().strip()


@needs_posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_that_asks_to_stop_is_one_sentence(number: signal.Signals) -> None:
    process = python(DIGGING.format(seconds=0))
    assert line_of(process) == "ready"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (128 + number, "tinylora: interrupted\n")


@needs_posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_one_ends_it_without_a_traceback(number: signal.Signals) -> None:
    process = python(DIGGING.format(seconds=600))
    assert line_of(process) == "ready"
    process.send_signal(signal.SIGINT)
    assert line_of(process) == "tidying"
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:  # the first ones count as one with that before
        process.send_signal(number)
        time.sleep(0.1)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert stderr == "\ntinylora: ended at once; what was saved is whole; go on with: tinylora dig\n"


@needs_posix
def test_what_nohup_ignores_stays_ignored() -> None:
    process = python("signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + textwrap.dedent(DIGGING.format(seconds=0)))
    assert line_of(process) == "ready"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


@needs_posix
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_training_says_how_to_go_on(
    tiny_folder: Path, fresh_cache: Path, tmp_path: Path, number: signal.Signals
) -> None:
    data = tmp_path / "my sums.jsonl"
    adapter_run(tiny_folder, tmp_path)
    (tmp_path / "sums.jsonl").rename(data)
    recipe = tmp_path / "sums.toml"
    recipe.write_text(
        f"[model]\nname = '{tiny_folder}'\ndevice = 'cpu'\ndtype = 'float32'\n[adapter]\nn_tie = 8\n"
        f"[task]\nname = 'jsonl'\npath = '{data}'\n[generation]\nmax_new_tokens = 4\n"
        "[grpo]\nprompts_per_step = 2\ngroup_size = 2\ntruncated = 'keep'\n"
        "[train]\nsteps = 5000\nnum_threads = 1\n[eval]\nevery = 0\nnum_validation = 2\nnum_test = 0\n"
    )
    out = tmp_path / "my runs"
    command = [sys.executable, "-m", "tinylora", "train", str(recipe), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not any(path.read_bytes().count(b"\n") > 3 for path in out.glob("*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=60)
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    run = out / "sums-001"
    assert process.returncode == 128 + number and "Traceback" not in stderr, stderr
    assert stderr.splitlines()[-1] == f"tinylora: interrupted; go on with: tinylora train --resume '{run}'"
    assert not (run / ".lock.pid").exists()
    steps = str((run / "metrics.jsonl").read_bytes().count(b"\n") + 1)
    again = [sys.executable, "-m", "tinylora", "train", "--resume", str(run), "--set", f"train.steps={steps}"]
    done = subprocess.run(again, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "resuming" in done.stderr, done.stderr
