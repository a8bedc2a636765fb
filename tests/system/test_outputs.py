"""Where results go that a user names: devices and FIFOs are written to, files replaced only if that is asked for."""

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tinylora.errors import UserError
from tinylora.system.outputs import Output

needs_posix = pytest.mark.skipif(os.name == "nt", reason="FIFOs and /dev are POSIX")


class Reader:
    """Reads a FIFO to its end, in a thread, as another program would."""

    def __init__(self, fifo: Path) -> None:
        self.data = b""
        self._thread = threading.Thread(target=self._read, args=(fifo,), daemon=True)
        self._thread.start()

    def _read(self, fifo: Path) -> None:
        self.data = fifo.read_bytes()

    def wait(self, seconds: float) -> None:
        self._thread.join(timeout=seconds)

    @property
    def is_reading(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> bytes:
        self._thread.join(timeout=60)
        assert not self._thread.is_alive()
        return self.data


def test_a_new_file_is_written_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.jsonl"
    output = Output.at(path)
    assert path.parent.is_dir() and not list(path.parent.iterdir())  # looked at, not made
    assert output.write(b"one") == path and path.read_bytes() == b"one"


def test_a_file_that_is_there_wants_force(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("mine")
    with pytest.raises(UserError, match=r"mine\.py exists; choose another file, or replace it with --force"):
        Output.at(path)
    assert path.read_text() == "mine"
    Output.at(path, force=True).write(b"new")
    assert path.read_bytes() == b"new"


def test_a_file_that_came_about_meanwhile_is_kept_and_so_is_the_work(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    output = Output.at(path)
    path.write_text("another's")
    assert output.write(b"ours") == tmp_path / "x-2.jsonl"
    assert path.read_text() == "another's" and (tmp_path / "x-2.jsonl").read_bytes() == b"ours"


@needs_posix
def test_a_fifo_that_nobody_reads_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tinylora eval --items FIFO` answered every item and then waited for ever, without a word."""
    monkeypatch.setattr("tinylora.system.outputs.READER_SECONDS", 0.1)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(UserError, match="nobody reads it; start its reader first"):
        Output.at(fifo)
    assert stat.S_ISFIFO(os.lstat(fifo).st_mode)


@needs_posix
def test_the_reader_of_a_fifo_is_not_sent_away_before_the_data(tmp_path: Path) -> None:
    """Looking at the place before the work must not count as the end of what is written."""
    fifo, data = tmp_path / "fifo", bytes(range(256)) * 4096  # more than a pipe holds
    os.mkfifo(fifo)
    reader = Reader(fifo)
    output = Output.at(fifo)
    reader.wait(0.1)
    assert reader.is_reading
    output.write(data)
    assert reader.result() == data


@needs_posix
def test_a_fifo_is_written_to_and_stays_one(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for write in (lambda output: output.write(b"x" * 100_000), _by_name):
        reader = Reader(fifo)
        write(Output.at(fifo))
        assert reader.result() == b"x" * 100_000
        assert stat.S_ISFIFO(os.lstat(fifo).st_mode) and os.listdir(tmp_path) == ["fifo"]


def _by_name(output: Output) -> None:
    with output.file() as made:
        made.write_bytes(b"x" * 100_000)


@needs_posix
def test_devices_are_written_to(tmp_path: Path) -> None:
    """The nodes themselves must stay: as root the old code put plain files in their place."""
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    for null in (Path("/dev/null"), link):
        Output.at(null).write(b"gone")
        Output.at(null, force=True).write(b"gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and link.is_symlink()
    if Path("/dev/full").exists():
        with pytest.raises(UserError, match=r"cannot write /dev/full \(No space left on device\)"):
            Output.at(Path("/dev/full")).write(b"x")
        assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


@needs_posix
@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="no /dev/stdout")
def test_standard_output_is_written_to_wherever_it_leads(tmp_path: Path) -> None:
    """Behind what was printed before it; a file that it was sent to is not replaced."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom tinylora.system.outputs import Output\n"
        "print('first')\nOutput.at(Path(sys.argv[1])).write(b'second\\n')\nprint('third')"
    )
    command = [sys.executable, "-c", code, "/dev/stdout"]
    with (tmp_path / "log").open("wb") as log:
        subprocess.run(command, stdout=log, check=True, timeout=60)
    assert (tmp_path / "log").read_text() == "first\nsecond\nthird\n"
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60)
    assert done.stdout == b"first\nsecond\nthird\n"


@needs_posix
def test_all_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket")
        for force in (False, True):
            with pytest.raises(UserError, match="is a socket, and no file"):
                Output.at(Path("socket"), force=force)
    for folder in (tmp_path, Path(".."), Path("/")):
        with pytest.raises(UserError, match="is a folder; give a file"):
            Output.at(folder, force=True)


@needs_posix
def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_text("mine")
    link.symlink_to(victim)
    with pytest.raises(UserError, match=r"link exists \(a link to .*victim\)"):
        Output.at(link)
    Output.at(link, force=True).write(b"new")
    assert victim.read_text() == "mine" and not link.is_symlink() and link.read_bytes() == b"new"
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match="dangling exists"):
        Output.at(dangling)
    Output.at(dangling, force=True).write(b"new")
    assert not (tmp_path / "nothing").exists()


@needs_posix
def test_a_run_s_own_file_is_replaced_but_no_fifo_is_waited_for(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("old")
    Output.own(page).write(b"new")
    assert page.read_bytes() == b"new"
    page.unlink()
    os.mkfifo(page)
    with pytest.raises(UserError, match="is a FIFO"):
        Output.own(page)


@needs_posix
def test_a_reader_that_goes_away_is_one_sentence(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    code = "import sys; open(sys.argv[1], 'rb').read(1)"
    reader = subprocess.Popen([sys.executable, "-c", code, str(fifo)])
    with pytest.raises(UserError, match=r"cannot write .*fifo \(Broken pipe\)"):
        Output.at(fifo).write(json.dumps("x" * 1_000_000).encode())
    reader.wait(timeout=60)
