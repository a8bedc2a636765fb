"""The trained numbers of a run on disk: a safetensors file with v and the settings that give it meaning."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tinylora.adapter.finite import all_finite
from tinylora.config.recipe import parse_recipe
from tinylora.config.run import RunConfig
from tinylora.config.schema import dump_config
from tinylora.errors import UserError
from tinylora.system.files import write_atomically

BEST, LAST, PORTABLE = "adapter.safetensors", "last.safetensors", "adapter.tinylora"


def save_vector(path: Path, v: Tensor, config: RunConfig, facts: Mapping[str, object] | None = None) -> None:
    """Write v (groups, u) float32 and the run's settings, atomically."""
    metadata = {"format": "tinylora-vector-1", "config": dump_config(config), "facts": json.dumps(dict(facts or {}))}
    write_atomically(path, save({"v": v.detach().to("cpu", torch.float32).contiguous()}, metadata))


def load_facts(path: Path) -> dict[str, object]:
    """What `save_vector` was told beside v and settings, from an adapter file; empty if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as handle:
            facts = json.loads((handle.metadata() or {}).get("facts", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def load_vector(path: Path) -> tuple[Tensor, RunConfig]:
    """v and the settings, from an adapter file or a run folder.

    Raises: UserError if there is none, or the file is damaged or of another kind.
    """
    file = path / BEST if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} holds no adapter (looked for {file.name}); train one with: tinylora train demo")
    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            if metadata.get("format") != "tinylora-vector-1":
                raise UserError(f"{file} is no tinylora adapter (format {metadata.get('format')!r})")
            v = handle.get_tensor("v")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}); restore it, or resume the run that wrote it") from error
    if v.dtype != torch.float32 or v.dim() != 2 or not v.numel() or not all_finite(v):
        raise UserError(
            f"{file} is inconsistent: v must be finite float32 numbers (groups, u), got {tuple(v.shape)} in {v.dtype}"
        )
    if "config" not in metadata:
        raise UserError(f"{file} is inconsistent: it holds no settings; restore it, or resume the run that wrote it")
    config = parse_recipe(metadata["config"], str(file))
    _check_shape(v, config, file)
    return v, config


def _check_shape(v: Tensor, config: RunConfig, file: Path) -> None:
    """Raises: UserError for settings that are those of another v; before anything is made by them."""
    name, rank = config.method.name, config.method.rank
    wanted = {"tinylora": config.adapter.u, "lora-xs": rank * rank}.get(name)
    if wanted is not None and v.shape[1] != wanted:
        key, value = ("adapter.u", wanted) if name == "tinylora" else ("method.rank", rank)
        raise UserError(
            f"{file} is inconsistent: its v has {v.shape[1]:,} numbers a tie group, and its settings ({key} = "
            f"{value:,}) make {wanted:,}; restore it, or resume the run that wrote it"
        )
