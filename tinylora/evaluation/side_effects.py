"""What an adapter changes where nothing was trained: neutral text, word by word, under both models.

KL and perplexity are measured on a text that comes along (neutral.txt, everyday prose written for this purpose, so no
model was trained on it before its publication here), or on one of the user's.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from tinylora.errors import UserError
from tinylora.evaluation.logprobs import completion_logprobs, divergence, in_parts, total
from tinylora.rollouts.runtime import Runtime
from tinylora.system import reading

MOST_TOKENS = 4096
"""Tokens of a text that are looked at; more would only take longer."""
MOST_TEXT_BYTES = 64 * 2**20
_WINDOW = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEffect:
    """Both models on one text, every token given all tokens before it in its paragraph."""

    kl_per_token: float
    """Mean KL(base || adapted) over the whole vocabulary, nats."""
    base_perplexity: float
    tuned_perplexity: float
    num_tokens: int


def neutral_text() -> str:
    """The text that comes along."""
    return (files("tinylora.evaluation") / "neutral.txt").read_text(encoding="utf-8")


def read_text(path: str) -> str:
    """A text of the user's. Raises: UserError if there is none."""
    text = reading.read_text(Path(os.path.expanduser(path)), "give a text file in UTF-8", MOST_TEXT_BYTES)
    if not text.strip():
        raise UserError(f"the text {path!r} is empty; give one with at least a paragraph")
    return text


def text_effect(runtime: Runtime, v: Tensor, text: str) -> TextEffect:
    """KL and perplexity of `text`, paragraph by paragraph (what blank lines divide), its first MOST_TOKENS tokens.

    The first token of a paragraph is context only. Raises: UserError for a text without two tokens in one paragraph.
    """
    pairs = _windows(runtime, text)
    if not pairs:
        raise UserError("the text has no paragraph of at least two tokens; give a longer one")
    kl, base_total, tuned_total, tokens = 0.0, 0.0, 0.0, 0
    with torch.inference_mode():
        for part in in_parts(pairs, runtime.base.model.config.get_text_config().vocab_size):
            targets = torch.tensor([t for _, completion in part for t in completion], device=runtime.base.device)
            base = completion_logprobs(runtime.base.model, runtime.adapter, part, None)
            tuned = completion_logprobs(runtime.base.model, runtime.adapter, part, v)
            kl += divergence(base, tuned)
            base_total += total(base.gather(1, targets.unsqueeze(1)))
            tuned_total += total(tuned.gather(1, targets.unsqueeze(1)))
            tokens += len(targets)
    return TextEffect(
        kl_per_token=kl / tokens,
        base_perplexity=math.exp(-base_total / tokens),
        tuned_perplexity=math.exp(-tuned_total / tokens),
        num_tokens=tokens,
    )


def _windows(runtime: Runtime, text: str) -> list[tuple[Sequence[int], Sequence[int]]]:
    """(context, tokens to predict), one a paragraph, long ones cut."""
    pairs: list[tuple[Sequence[int], Sequence[int]]] = []
    left = MOST_TOKENS
    size = min(_WINDOW, runtime.base.context_length)
    for paragraph in text.split("\n\n"):
        ids = runtime.base.tokenizer(paragraph.strip(), add_special_tokens=True)["input_ids"]
        for start in range(0, len(ids), size):
            window = ids[start : start + min(size, left)]
            if len(window) > 1:
                pairs.append((window[:1], window[1:]))
                left -= len(window)
            if left < 2:
                return pairs
    return pairs
