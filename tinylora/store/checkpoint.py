"""One checkpoint file: tensors as they are, everything else as JSON in the header, a SHA-256 over both."""

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FORMAT = "tinylora-checkpoint-1"

CHECKPOINT_NAME = re.compile(r"state-(\d{8})\.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `RunFolder.load_checkpoint` found."""

    state: dict[str, Any]
    """As given to save_checkpoint: tensors (on the CPU) bit for bit, other values through JSON."""
    log_bytes: dict[str, int]
    """Length of each JSONL file at that moment."""
    path: Path
    warning: str
    """Why this is not the newest checkpoint; empty if it is."""


def number_of(path: Path) -> int:
    """The number in a checkpoint's name; later ones have higher numbers."""
    match = CHECKPOINT_NAME.fullmatch(path.name)
    assert match
    return int(match[1])


class Corrupt(Exception):
    """A checkpoint file that is not what was written; the message says in what."""


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # whoever has a tensor has imported torch
    return torch is not None and isinstance(value, torch.Tensor)


def _is_json(value: Any) -> bool:
    """Whether JSON gives it back unchanged: no tuples (lists afterwards), no keys but text."""
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(type(k) is str and _is_json(v) for k, v in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _digest(values: str, tensors: Mapping[str, Any]) -> str:
    import torch

    digest = hashlib.sha256(values.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def pack(state: Mapping[str, Any], log_bytes: Mapping[str, int]) -> bytes:
    """The bytes of a checkpoint. Raises: TypeError for a value that JSON does not give back as it is."""
    from safetensors.torch import save

    # contiguous().clone(): two names may share memory, which safetensors refuses
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items() if _is_tensor(v)}
    rest = {k: v for k, v in state.items() if k not in tensors}
    for name, value in rest.items():
        if not _is_json(value):
            raise TypeError(f"checkpoint state {name!r} must be a tensor or JSON (no tuples), got {value!r}")
    values = json.dumps({"state": rest, "log_bytes": dict(log_bytes), "order": list(state)})
    return save(tensors, {"format": _FORMAT, "values": values, "sha256": _digest(values, tensors)})


def unpack(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """State and lengths of the logs, as they were given to `pack`. Raises: Corrupt."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = path.read_bytes()
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header["__metadata__"]
        values, stored, kind = metadata["values"], metadata["sha256"], metadata["format"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(str(error) or type(error).__name__) from error
    if kind != _FORMAT:
        raise Corrupt(f"its format is {kind!r}, this version reads {_FORMAT!r}")
    if _digest(values, tensors) != stored:
        raise Corrupt("its checksum does not match")
    fields = json.loads(values)
    state = {name: tensors[name] if name in tensors else fields["state"][name] for name in fields["order"]}
    return state, fields["log_bytes"]
