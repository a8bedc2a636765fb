"""What the cache folder holds, how large it is, and how to empty it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from tinylora.system.paths import cache_dir

# Only these are ever deleted: TINYLORA_CACHE may point at a folder that holds other things too.
KINDS = {
    "models": "embedded models, as fetched",
    "converted": "GGUF models unpacked to bf16",
    "basis": "singular vectors of the base models' weights",
    "kernels": "compiled kernels of the rollout engine",
    "bases": "base models seen here, by fingerprint",
    "digests": "remembered checksums",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheEntry:
    """One kind of cached files."""

    kind: str
    about: str
    path: Path
    num_files: int
    total_bytes: int


def cache_report() -> list[CacheEntry]:
    """One entry for each kind of cached files that is there, in a fixed order."""
    entries = []
    for kind, about in KINDS.items():
        folder = cache_dir() / kind
        if not folder.is_dir():
            continue
        sizes = [file.lstat().st_size for file in folder.rglob("*") if file.is_file()]
        entries.append(CacheEntry(kind=kind, about=about, path=folder, num_files=len(sizes), total_bytes=sum(sizes)))
    return entries


def clear_cache() -> int:
    """Delete all cached files and return the bytes freed; everything comes back by itself when it is needed again."""
    entries = cache_report()
    for entry in entries:
        if entry.path.is_symlink():  # moved to another disk by hand: it stays where it is, and is emptied
            for inside in entry.path.iterdir():
                shutil.rmtree(inside) if inside.is_dir() and not inside.is_symlink() else inside.unlink()
        else:
            shutil.rmtree(entry.path)
    return sum(entry.total_bytes for entry in entries)
