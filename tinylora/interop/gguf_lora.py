"""An adapter as a GGUF LoRA, for llama.cpp and what builds on it.

Tensors `<name>.lora_a` (rank, in) and `<name>.lora_b` (out, rank) under the names that llama.cpp gives the weights. It
stores q and k of the llama architecture with their rows in another order (for its rotation), and so are the rows of B.
Leaves out: architectures whose linear maps llama.cpp changes in other ways; they are refused by name.
"""

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from tinylora.adapter.attach import AttachedAdapter, output_head_path
from tinylora.errors import UserError
from tinylora.interop.lora import LoraFactors, cast, lora_factors
from tinylora.system.outputs import Output


@dataclass(frozen=True, slots=True)
class _Kind:
    arch: gguf.MODEL_ARCH
    permutes: bool
    """Whether q and k have their rows in another order."""


KINDS = {
    "LlamaForCausalLM": _Kind(gguf.MODEL_ARCH.LLAMA, True),
    "MistralForCausalLM": _Kind(gguf.MODEL_ARCH.LLAMA, True),
    "Qwen2ForCausalLM": _Kind(gguf.MODEL_ARCH.QWEN2, False),
    "Qwen3ForCausalLM": _Kind(gguf.MODEL_ARCH.QWEN3, False),
    "Gemma3ForCausalLM": _Kind(gguf.MODEL_ARCH.GEMMA3, False),
}
DTYPES = {torch.float32: np.float32, torch.float16: np.float16}


def write_gguf(
    path: Path | Output,
    attached: AttachedAdapter,
    *,
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
) -> LoraFactors:
    """Write the adapter, with the current v, as a GGUF file, at a path or an output that was looked at.

    Raises: UserError for an architecture, a quantised base or a dtype that is not covered, or a file that is there.
    """
    attached.refuse_quantised("a GGUF file of that model holds other weights")
    architecture = type(attached.model).__name__
    kind = KINDS.get(architecture)
    if kind is None:
        raise UserError(
            f"GGUF export covers {', '.join(KINDS)}; this is a {architecture}; export to lora or merged instead"
        )
    if dtype not in DTYPES:
        raise UserError(f"GGUF export writes float32 or float16, not {str(dtype).removeprefix('torch.')}")
    output = path if isinstance(path, Output) else Output.at(path)
    config: Any = attached.model.config
    head = output_head_path(attached.model)
    if head in attached.paths and config.tie_word_embeddings:
        raise UserError(
            f"this base ties its output head ({head}) to the embeddings, for which a GGUF has one tensor; export to "
            "lora or merged instead"
        )
    names = gguf.get_tensor_name_map(kind.arch, int(config.num_hidden_layers))
    factors = lora_factors(attached, rank)
    with output.file() as made:
        _write(made, kind, attached, factors, dtype, names)
    return factors


def _write(
    path: Path, kind: _Kind, attached: AttachedAdapter, factors: LoraFactors, dtype: torch.dtype, names: Any
) -> None:
    config: Any = attached.model.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind.arch])
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(factors.rank))
        for module in attached.paths:
            name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
            if name is None:
                raise UserError(f"llama.cpp has no name for {module}; export to lora or merged instead")
            B = factors.B[module]
            if kind.permutes and module.endswith(("q_proj", "k_proj")):
                B = _permuted(
                    B, int(config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads)
                )
            for suffix, values in (("lora_a", factors.A[module]), ("lora_b", B)):
                writer.add_tensor(f"{name}.{suffix}", cast(values, dtype, module).numpy().astype(DTYPES[dtype]))
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        except OSError as error:
            if error.errno is None:  # numpy's word for a full disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            raise
    finally:
        with suppress(OSError):  # of a full disk, once more
            writer.close()


def _permuted(rows: Tensor, num_heads: int) -> Tensor:
    """(out, r): within each head, rows 0, 1, ... of the two halves by turns."""
    return rows.reshape(num_heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape).contiguous()
