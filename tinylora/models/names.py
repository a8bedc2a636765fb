"""What a model's name stands for: an embedded model, a GGUF file, a folder, or a hub id. Decided without network."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinylora.errors import UserError
from tinylora.models.embedded import EMBEDDED

Kind = Literal["embedded", "gguf", "folder", "hub"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
GGUF_MAGIC = b"GGUF"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a base model comes from; `path` is set for a GGUF file and a folder."""

    name: str
    kind: Kind
    path: Path | None = None


def resolve_name(name: str) -> Source:
    """Decide what a model's name means: a path that exists wins, then an embedded model, then org/name on the hub.

    Raises: UserError for a path that does not exist or holds no model, and for a name that is none of these.
    """
    if not name.strip():
        raise UserError(f"model.name is empty; give {_choices()}")
    path = Path(os.path.expanduser(name))  # leaves a ~somebody who is not there as it is
    if path.is_dir():
        return Source(name=name, kind="folder", path=_check_folder(path))
    if path.exists():
        return Source(name=name, kind="gguf", path=_check_gguf(path))
    if name in EMBEDDED:
        return Source(name=name, kind="embedded")
    if _looks_like_a_path(name):
        raise UserError(f"there is no model file or folder at {name}; give {_choices()}")
    if HUB_ID.fullmatch(name):
        return Source(name=name, kind="hub")
    raise UserError(f"no model is named {name!r}; give {_choices()}")


def refuse_adapter(folder: Path, name: str, advice: str) -> None:
    """Raises: UserError if a model's folder holds a PEFT adapter, too: transformers would apply it and say nothing."""
    if (file := folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"beside the model {name} lies a PEFT adapter ({file}), which transformers would apply unasked; {advice}"
        )


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors of a model's folder, or its pickled weights if there are none; never those of an adapter."""
    for pattern in ("*.safetensors", "*.bin"):
        if files := [file for file in sorted(folder.glob(pattern)) if not file.name.startswith("adapter_model")]:
            return tuple(files)
    return ()


def _choices() -> str:
    return f"{' or '.join(EMBEDDED)} (embedded), a folder, a .gguf file, or a hub id such as org/name"


def _looks_like_a_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or "\\" in name or name.count("/") > 1 or name.endswith(".gguf")


def _check_folder(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    if (path / ADAPTER_CONFIG).is_file():
        raise UserError(f"{path} holds an adapter, not a model; give the model that the adapter was trained on")
    if files := sorted(path.glob("*.gguf")):
        raise UserError(f"{path} has no config.json; to load a GGUF file, give its path, such as {files[0]}")
    raise UserError(f"{path} has no config.json, so it is no model folder; give {_choices()}")


def _check_gguf(path: Path) -> Path:
    try:
        with path.open("rb") as handle:
            magic = handle.read(len(GGUF_MAGIC))
    except OSError as error:
        raise UserError(f"cannot read the model file {path}: {error}") from error
    if magic != GGUF_MAGIC:
        raise UserError(f"{path} is not a GGUF file (it begins with {magic!r}); give a .gguf file or a model folder")
    return path
