"""Where the cache lies, as people set it."""

import os
from pathlib import Path

import pytest

from tinylora.system.paths import cache_dir, data_dir, real


@pytest.mark.skipif(os.name == "nt", reason="links")
@pytest.mark.parametrize("name", ["TINYLORA_CACHE", "XDG_CACHE_HOME"])
def test_a_loop_of_links_is_met_where_the_folder_is_used(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`TINYLORA_CACHE=loop tinylora cache` was a traceback, as Path.resolve raised RuntimeError before Python 3.13."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    monkeypatch.delenv("TINYLORA_CACHE", raising=False)
    monkeypatch.setenv(name, str(tmp_path / "a"))
    with pytest.raises(OSError, match="symbolic links"):
        (cache_dir() / "x").mkdir(parents=True)


def test_links_and_the_home_folder_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert real(tmp_path / "link" / "x") == (tmp_path / "real" / "x").resolve()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TINYLORA_DATA", "~/link/data")
    assert data_dir() == (tmp_path / "real" / "data").resolve()
    monkeypatch.setenv("TINYLORA_CACHE", "~no-such-user/x")
    assert cache_dir() == (Path.cwd() / "~no-such-user" / "x").resolve()
