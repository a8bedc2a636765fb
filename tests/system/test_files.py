"""Atomic writes: whole or not at all, under a name that nobody planted, with the mode that the umask gives."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tinylora.errors import UserError
from tinylora.system import files
from tinylora.system.files import open_to_append, replace_file, write_atomically
from tinylora.system.jsonl import JsonlWriter, read_jsonl

needs_posix = pytest.mark.skipif(os.name == "nt", reason="links and modes are POSIX")


def _replace(path: Path, data: bytes) -> None:
    replace_file(path, lambda scratch: scratch.write_bytes(data))


WRITES = pytest.mark.parametrize("write", [write_atomically, _replace])


@needs_posix
@WRITES
def test_planted_names_are_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, bytes], None]
) -> None:
    """Even a name that was guessed right: it exists, so it is not opened."""
    victim, target = tmp_path / "victim", tmp_path / "numbers.csv"
    victim.write_text("mine")
    guessed = iter(["0" * 12, "1" * 12])
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: next(guessed))
    planted = [tmp_path / name for name in ("numbers.csv.tmp", ".numbers.csv.tmp", f".numbers.csv.{'0' * 12}.tmp")]
    for path in planted:
        path.symlink_to(victim)
    write(target, b"new")
    assert victim.read_text() == "mine" and target.read_bytes() == b"new"
    assert all(path.is_symlink() for path in planted)


@needs_posix
@WRITES
def test_a_target_that_is_a_link_is_replaced(tmp_path: Path, write: Callable[[Path, bytes], None]) -> None:
    victim, target = tmp_path / "victim", tmp_path / "x"
    victim.write_text("mine")
    target.symlink_to(victim)
    write(target, b"new")
    assert victim.read_text() == "mine" and target.read_bytes() == b"new" and not target.is_symlink()


@needs_posix
@WRITES
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_are_as_the_umask_says(
    tmp_path: Path, write: Callable[[Path, bytes], None], mask: int, mode: int
) -> None:
    before = os.umask(mask)
    try:
        write(tmp_path / "x", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode


@needs_posix
@WRITES
def test_what_is_no_file_is_not_replaced(tmp_path: Path, write: Callable[[Path, bytes], None]) -> None:
    """As root, the old code put a plain file in the place of a device."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, Path("/dev/null")):
        kind = stat.S_IFMT(os.lstat(path).st_mode)
        with pytest.raises(UserError, match="which no file takes the place of"):
            write(path, b"x")
        assert stat.S_IFMT(os.lstat(path).st_mode) == kind
    assert os.listdir(tmp_path) == ["fifo"]


@WRITES
def test_a_long_name_and_a_failure_leave_nothing_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, bytes], None]
) -> None:
    long = tmp_path / ("x" * 250)
    write(long, b"one")
    assert long.read_bytes() == b"one"

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write(long, b"two")
    assert long.read_bytes() == b"one" and len(os.listdir(tmp_path)) == 1


@needs_posix
def test_logs_follow_no_link_and_wait_for_no_fifo(tmp_path: Path) -> None:
    victim, log, fifo = tmp_path / "victim", tmp_path / "metrics.jsonl", tmp_path / "fifo"
    victim.write_text("mine")
    log.symlink_to(victim)
    os.mkfifo(fifo)
    with pytest.raises(UserError, match=r"metrics\.jsonl is a link, and what is written here follows none"):
        JsonlWriter(log)
    with pytest.raises(OSError, match="symbolic links"):
        open_to_append(log)
    with pytest.raises(UserError, match="fifo is a FIFO"):
        JsonlWriter(fifo)
    with pytest.raises(UserError, match=r"fifo: it is a pipe, not a file"):
        read_jsonl(fifo)
    assert victim.read_text() == "mine"
