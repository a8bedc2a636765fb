"""Files that people bring. A device has no end and a pipe waits for ever: each test of them has a limit."""

import gzip
import os
import subprocess
import sys
import threading

import pytest

from tinylora.errors import UserError
from tinylora.system import reading
from tinylora.system.reading import read_lines, read_text

LIMIT_SECONDS = 60
READ = """
import sys
from pathlib import Path
from tinylora.errors import UserError
from tinylora.system.reading import read_lines, read_text
try:
    read_text(Path(sys.argv[1]), "name a file") if sys.argv[2] == "text" else list(read_lines(Path(sys.argv[1]), "go"))
except UserError as error:
    print(error)
"""


def told(path, how):
    """What is said of a file, by a process of its own that may take LIMIT_SECONDS."""
    command = [sys.executable, "-c", READ, str(path), how]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=True).stdout


@pytest.mark.skipif(os.name == "nt", reason="devices and pipes of Unix")
@pytest.mark.parametrize("how", ["text", "lines"])
def test_no_device_pipe_or_folder_is_read(tmp_path, how):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path, kind in [("/dev/zero", "a device"), (tmp_path / "zero", "a device"), (tmp_path / "pipe", "a pipe"),
                       (tmp_path, "a folder")]:  # fmt: skip
        assert f"cannot read {path}: it is {kind}, not a file" in told(path, how)


def test_files_beyond_bounds(tmp_path, monkeypatch):
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(10**12)  # a hole, which takes no room
    with pytest.raises(UserError, match=r"huge has more than 4\.3 GB"):
        list(read_lines(huge, "name another"))
    with pytest.raises(UserError, match=r"huge has more than 16\.8 MB.*; name another"):
        read_text(huge, "name another")
    monkeypatch.setattr(reading, "MOST_LINE_BYTES", 1000)
    (tmp_path / "line").write_bytes(b"short\n" + b"x" * 1001)
    lines = read_lines(tmp_path / "line", "go")
    assert next(lines)[1] == b"short"
    with pytest.raises(UserError, match="line 2 has more than 1.0 kB"):
        next(lines)


def test_a_bomb_is_not_unpacked(tmp_path):
    bomb = tmp_path / "bomb.gz"
    bomb.write_bytes(gzip.compress(b"0" * (20 * 2**20)))
    with pytest.raises(UserError, match="has more than 16.8 MB"):
        read_text(bomb, "name another")


def test_marks_gzip_and_line_ends(tmp_path):
    for name, data in [("plain", b"a\n\n  \nb\r\n"), ("mark", b"\xef\xbb\xbfa\n\n  \nb\r\n")]:
        for packed in (False, True):
            path = tmp_path / name
            path.write_bytes(gzip.compress(data) if packed else data)
            assert list(read_lines(path, "go")) == [(f"{path}, line 1", b"a"), (f"{path}, line 4", b"b\r")]
            assert read_text(path, "go") == "a\n\n  \nb\r\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"a": 1}'.encode("utf-16"), "is UTF-16 text.*iconv -f UTF-16 -t UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "is UTF-16 text"),
        ('{"a": 1}'.encode("utf-16-be"), "is UTF-16 text"),
        (b"PK\x03\x04" + bytes(30), "is a zip archive"),
        (b"PAR1" + bytes(30), "is a Parquet file"),
        (b"ok\ncaf\xe9\n", "line 2: not UTF-8 text"),
        (gzip.compress(b"a" * 1000, mtime=0)[:-12], "is a damaged gzip file"),
        (b"\x1f\x8bnothing of gzip", "is a damaged gzip file"),
    ],
)
def test_other_encodings_and_packed_files(tmp_path, data, message):
    path = tmp_path / "my file"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_text(path, "go")


def test_names_that_are_none(tmp_path):
    with pytest.raises(UserError, match="there is no file .*; give one"):
        read_text(tmp_path / "none", "give one")
    for name in ("a\0b", "\ud800", "x" * 5000):
        with pytest.raises(UserError, match="give one"):
            read_text(tmp_path / name, "give one")


@pytest.mark.skipif(os.name == "nt", reason="pipes of Unix")
def test_a_pipe_with_a_writer_is_told_too(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: os.close(os.open(tmp_path / "pipe", os.O_RDWR)), daemon=True)
    writer.start()
    with pytest.raises(UserError, match="it is a pipe"):
        read_text(tmp_path / "pipe", "go")
    writer.join(LIMIT_SECONDS)
