"""SHA-256 of large files, remembered by path and state so that an untouched file is read once.

The state is the size, the time of the last write, the time of the last change of any kind, and the inode. A program can
set the second as it likes, so that a changed file looks untouched; it cannot set the third.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from tinylora.system.files import replace_file
from tinylora.system.paths import cache_dir

CHUNK_BYTES = 8 * 1024 * 1024


def sha256_of(path: Path) -> str:
    """The hex SHA-256 of a file, always computed."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def file_state(path: Path) -> list[int]:
    """What tells that a file has changed, without reading it."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def remembered_sha256(path: Path) -> str:
    """The hex SHA-256 of a file; computed again only if its state differs from the last time."""
    path = path.resolve()
    memo = _memo_file(path)
    key = {"path": str(path), "state": file_state(path)}
    try:
        known = json.loads(memo.read_text())
        if {name: known[name] for name in key} == key:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no memo, or a damaged one: it is only a saving, so compute
    digest = sha256_of(path)
    save_memo(memo, json.dumps({**key, "sha256": digest}))
    return digest


def save_memo(path: Path, text: str) -> None:
    """Write what only saves time; a cache that cannot be written to costs time, and nothing else."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda scratch: scratch.write_text(text))


def _memo_file(path: Path) -> Path:
    return cache_dir() / "digests" / f"{hashlib.sha256(str(path).encode()).hexdigest()}.json"
