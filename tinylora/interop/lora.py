"""An adapter as plain LoRA: what PEFT, vLLM, SGLang and most servers load. Exact: dW = B A with rank r or more.

A is V^T (r, in) and B is U diag(S) R (out, r); lora_alpha = r, so that no scale is left over. File names, keys and
config fields are those of PEFT; vLLM and SGLang read the same folder.
Leaves out: embeddings and output heads, which servers restrict or drop.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from tinylora.adapter.attach import AttachedAdapter, linear_maps, output_head_path
from tinylora.errors import UserError
from tinylora.system.folders import write_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


MOST_RANK = 4096
"""More than any server takes."""


@dataclass(frozen=True, eq=False, slots=True)
class LoraFactors:
    """Plain LoRA of every module: dW = B A."""

    rank: int
    A: Mapping[str, Tensor]
    """(rank, in) float64, by module path."""
    B: Mapping[str, Tensor]
    """(out, rank) float64."""
    kept: float
    """Share of the squared update that is left, over all modules: 1 unless the rank was cut."""


def lora_factors(attached: AttachedAdapter, rank: int = 0) -> LoraFactors:
    """The update of every module under the current v, as LoRA of a rank (0: the adapter's own).

    A larger rank is filled up with zeros; a smaller one keeps the best approximation of each module's update, by the
    singular values of dW.
    Raises: UserError for a rank below 0 or above MOST_RANK.
    """
    own = attached.config.rank
    rank = rank or own
    if not 1 <= rank <= MOST_RANK:
        raise UserError(f"the LoRA rank must be from 1 to {MOST_RANK}, or 0 for the adapter's own {own}, got {rank}")
    As, Bs, kept, total = {}, {}, 0.0, 0.0
    for path in attached.paths:
        left, right = attached.delta_factors(path)
        total += _squared(left, right)
        if rank < own:
            left, right = _truncate(left, right, rank)
            kept += _squared(left, right)
        pad = rank - left.shape[1]
        As[path] = torch.nn.functional.pad(right, (0, 0, 0, pad))
        Bs[path] = torch.nn.functional.pad(left, (0, pad))
    return LoraFactors(rank, As, Bs, kept / total if rank < own and total else 1.0)


def _squared(left: Tensor, right: Tensor) -> float:
    return float(((left.T @ left) * (right @ right.T)).sum())


def _truncate(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    Ql, Rl = torch.linalg.qr(left)
    Qr, Rr = torch.linalg.qr(right.T)
    U, S, Vh = torch.linalg.svd(Rl @ Rr.T)
    return Ql @ (U[:, :rank] * S[:rank]), Vh[:rank] @ Qr.T


def write_lora(
    folder: Path,
    attached: AttachedAdapter,
    *,
    base_name: str,
    revision: str = "",
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
) -> LoraFactors:
    """Write the folder that PEFT, vLLM and SGLang load. Raises: UserError for a folder in use, or an output head."""
    head = output_head_path(attached.model)
    if head in attached.paths:
        raise UserError(f"LoRA servers do not take an adapter on the output head ({head}); train one without it")
    factors = lora_factors(attached, rank)
    tensors = {}
    for path in attached.paths:
        for name, values in (("lora_A", factors.A[path]), ("lora_B", factors.B[path])):
            tensors[f"base_model.model.{path}.{name}.weight"] = cast(values, dtype, path).contiguous()
    write_folder(
        folder,
        {
            CONFIG: json.dumps(lora_config(attached, factors.rank, base_name, revision), indent=2) + "\n",
            WEIGHTS: save(tensors, {"format": "pt"}),
        },
    )
    return factors


def cast(values: Tensor, dtype: torch.dtype, path: str) -> Tensor:
    """The values in another dtype. Raises: UserError if one does not fit into it."""
    narrow = values.to(dtype)
    if not torch.isfinite(narrow).all():
        raise UserError(
            f"a factor of {path} is too large for {str(dtype).removeprefix('torch.')}; take --dtype float32"
        )
    return narrow


def lora_config(attached: AttachedAdapter, rank: int, base_name: str, revision: str) -> dict[str, Any]:
    """adapter_config.json, with the fields that readers ask for."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": has_conv1d(attached),
        "target_modules": target_names(attached),
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def has_conv1d(attached: AttachedAdapter) -> bool:
    """Whether adapted maps store their weight as (in, out)."""
    return any(isinstance(attached.layers[path].base, Conv1D) for path in attached.paths)


def target_names(attached: AttachedAdapter) -> list[str]:
    """Types (q_proj) where every map of these types is adapted, else full paths: nothing else may be touched."""
    types = {path.rsplit(".", 1)[-1] for path in attached.paths}
    of_types = {path for path in linear_maps(attached.model) if path.rsplit(".", 1)[-1] in types}
    return sorted(types if of_types == set(attached.paths) else attached.paths)
