"""A base model that is open: weights, tokenizer, and what both say of themselves."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tinylora.models.names import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A frozen model and what must be known of it."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    name: str
    """As the user gave it."""
    kind: Kind
    files: tuple[Path, ...]
    """The weight files that were read; of a GGUF file, its unpacked copy."""
    revision: str
    """The commit on the hub; empty for local models."""
    sha256: str
    """Of the GGUF file; empty for others."""
    device: torch.device
    dtype: torch.dtype
    context_length: int
    """Tokens of prompt and answer together."""
    stop_token_ids: tuple[int, ...]
    """Any of them ends an answer; the tokenizer's eos comes first."""
    pad_token_id: int
    """May equal a stop token, so padding is found by position or attention mask, never by this id."""
    has_chat_template: bool
    quantization: str = "none"
    """As in model.quantization."""
