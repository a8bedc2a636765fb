"""Folders whose files are run: of this user, and closed to others."""

import os
import stat
from pathlib import Path

import pytest

from tinylora.system.private import NotPrivate, is_private, make_private

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="owners and modes are those of Unix")


def of_another_user(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root gives it away; anybody else becomes another."""
    if os.geteuid() == 0:
        os.chown(path, 54321, 54321)
    else:
        mine = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_is_made_for_one_user_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_private(tmp_path / "a" / "kernels")
    finally:
        os.umask(before)
    assert mode(tmp_path / "a" / "kernels") == 0o700


def test_ones_own_folder_is_closed_to_others(tmp_path: Path) -> None:
    """As a umask of 002 leaves it."""
    (tmp_path / "k").mkdir()
    for opened in (0o777, 0o775, 0o1777):
        (tmp_path / "k").chmod(opened)
        make_private(tmp_path / "k")
        assert mode(tmp_path / "k") == 0o700
    (tmp_path / "k").chmod(0o755)  # others may read it, as before
    make_private(tmp_path / "k")
    assert mode(tmp_path / "k") == 0o755


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "k").mkdir()
    of_another_user(tmp_path / "k", monkeypatch)
    with pytest.raises(NotPrivate, match=r"belongs to another user .*TINYLORA_CACHE"):
        make_private(tmp_path / "k")
    (tmp_path / "link").symlink_to(tmp_path / "k")
    with pytest.raises(NotPrivate, match="belongs to another user"):
        make_private(tmp_path / "link")


def test_a_folder_that_anyone_can_swap_is_refused_and_a_sticky_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(NotPrivate, match="everyone may write in .*open.*chmod o-w"):
        make_private(tmp_path / "open" / "k")
    (tmp_path / "open").chmod(0o1777)
    make_private(tmp_path / "open" / "k")


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.so"
    file.touch(0o700)
    assert is_private(file)
    (tmp_path / "link.so").symlink_to(file)
    assert not is_private(tmp_path / "link.so") and not is_private(tmp_path)
    for opened in (0o770, 0o702):
        file.chmod(opened)
        assert not is_private(file)
    file.chmod(0o755)
    assert is_private(file)
    of_another_user(file, monkeypatch)
    assert not is_private(file)
