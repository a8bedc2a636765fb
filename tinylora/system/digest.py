"""SHA-256 of large files, remembered by path, size and time of change so that an untouched file is read once."""

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


def remembered_sha256(path: Path) -> str:
    """The hex SHA-256 of a file; computed again only if its size or time of change differ from the last time."""
    path = path.resolve()
    memo = _memo_file(path)
    stat = path.stat()
    key = {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
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
