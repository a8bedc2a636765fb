"""Whatever the operating system refuses: one sentence, by one mechanism, wherever something is written."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinylora.errors import UserError
from tinylora.system.failures import writing
from tinylora.system.files import write_atomically
from tinylora.system.folders import check_folder, write_folder
from tinylora.system.jsonl import JsonlWriter
from tinylora.system.outputs import Output

NAMES = (
    "EACCES", "EDQUOT", "EFBIG", "EIO", "EISDIR", "ELOOP", "EMFILE", "ENAMETOOLONG", "ENOENT", "ENOSPC", "ENOTDIR",
    "EPERM", "EROFS", "ESTALE",
)  # fmt: skip
WAYS: dict[str, Callable[[Path], object]] = {
    "atomic": lambda path: write_atomically(path, b"x"),
    "output": lambda path: Output.at(path).write(b"x"),
    "folder": lambda path: write_folder(path, {"a": "x"}),
    "log": lambda path: JsonlWriter(path).append({"a": 1}),
}


def _refusing(call: Callable[..., Any], number: int) -> Callable[..., Any]:
    """A system call that is refused three times: what tidies up afterwards calls it, too."""
    left = 3

    def refuse(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            return call(*args, **options)
        raise OSError(number, os.strerror(number), str(args[0]))

    return refuse


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_every_refusal_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, name: str) -> None:
    number = getattr(errno, name)

    for call in ("open", "mkdir", "write"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, _refusing(getattr(os, call), number))
            try:
                WAYS[way](tmp_path / call)
            except UserError as error:
                said = str(error)
            else:
                continue  # this way does without that call
        assert os.strerror(number) in said and str(tmp_path) in said and "\n" not in said
        assert "; " in said  # and what to do next


def test_real_refusals(tmp_path: Path) -> None:
    """As any user, root included: a name that is too long, links in a circle, a file that is no folder."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    for path, word in (
        (tmp_path / ("x" * 300), "too long"),
        (tmp_path / "loop" / "x", "symbolic links|File exists"),
        (tmp_path / "file" / "x", "directory|File exists"),
    ):
        for write in (*WAYS.values(), check_folder, lambda path: Output.at(path, force=True)):
            with pytest.raises(UserError, match=word):
                write(path)


def test_a_full_disk_says_what_is_intact(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"no room to write in .*saved before is intact: free some space, then go"),
        writing(tmp_path / "x", again="go on"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
