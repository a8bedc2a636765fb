"""Where the index of a model in several files may point: to files of the model's own folder, and nowhere else.

transformers joins folder and name, so that `../` or an absolute path would load a file from anywhere as weights, and no
fingerprint's memory would know of it.
"""

import json
from pathlib import Path

from tinylora.errors import UserError


def check_shards(name: str, folder: Path) -> None:
    """Raises: UserError for an index that names files outside of its folder, by a path or through a link.

    Links into the hub's cache are as the hub's library makes them.
    """
    for index in sorted(folder.glob("*.index.json")):
        try:
            named = set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # damaged: told when it is loaded
        for shard in sorted(named):
            if "\\" in shard or "\0" in shard or shard in ("", ".", "..") or shard != Path(shard).name:
                raise UserError(
                    f"{index.name} of the model {name} names {shard[:120]!r}, which is no file of its folder; nothing "
                    "outside of it is followed: put all files into one folder, or fetch the model again"
                )
            file = folder / shard
            if file.is_symlink() and not _is_inside(file.resolve(), folder.resolve()):
                raise UserError(
                    f"{shard} of the model {name} is a link to {file.resolve()}, outside of its folder; put the file "
                    "itself there, or give the folder that it lies in"
                )


def _is_inside(target: Path, folder: Path) -> bool:
    blob = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return blob or target.is_relative_to(folder)
