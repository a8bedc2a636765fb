"""Sizes that a model's own description states, held against bounds before anything is made of them.

A config.json of a few hundred bytes can ask for a thousand million layers, or for embeddings of terabytes; transformers
makes the lists and fills the memory before it notices that no weights are there for them.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tinylora.errors import UserError
from tinylora.models.gguf_header import GgufHeader, ListOf
from tinylora.models.names import weight_files
from tinylora.models.quiet import quiet

BOUNDS = (
    (re.compile(r"(^|_)n(um)?_?(\w+_)?layers?$|^block_count$|(encoder|decoder)_layers$"), 4096, "layers"),
    (re.compile(r"expert_count|experts?$"), 2**16, "experts"),
    (re.compile(r"vocab_size$"), 2**24, "tokens"),
    (re.compile(r"heads?(_count(_kv)?)?$"), 2**16, "heads"),
    (re.compile(r"hidden_size$|n_embd$|d_model$|^embedding_length$"), 2**20, "numbers"),
    (re.compile(r"_size$|_dim$|^n_inner$|^d_\w+$|_length$|rank$"), 2**28, "numbers"),
    (re.compile(r"n_positions$|position_embeddings$"), 2**40, "positions"),
)
"""Names of settings and the most that is allowed: far beyond the largest models that there are."""
MOST_MODULES = 2**19
"""Layers times experts; the largest published mixtures have some 25,000."""


def check_sizes(name: str, config: Mapping[str, Any]) -> None:
    """Raises: UserError for a config (as in config.json, nested ones included) that states an impossible size."""
    found: dict[str, int] = {"layers": 1, "experts": 1}
    for key, value in _numbers(config):
        for pattern, most, what in BOUNDS:
            if not pattern.search(key):
                continue
            if not -most <= value <= most:
                raise UserError(
                    f"the model {name} states {key} = {value:,}, and at most {most:,} {what} are allowed; its "
                    "description is damaged or was made to fill the memory: get it from its publisher"
                )
            found[what] = max(found.get(what, 0), value)
            break
    if (modules := found["layers"] * found["experts"]) > MOST_MODULES:
        raise UserError(
            f"the model {name} states {found['layers']:,} layers of {found['experts']:,} experts, {modules:,} in all, "
            f"and at most {MOST_MODULES:,} are allowed; get it from its publisher"
        )


def _numbers(config: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and depth < 4:
            yield from _numbers(value, depth + 1)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, float) and one == one and abs(one) != math.inf and one == int(one):
                yield str(key), int(one)  # 1e9, as JSON may write it
            elif isinstance(one, int) and not isinstance(one, bool):
                yield str(key), one


def check_header(name: str, header: GgufHeader) -> None:
    """`check_sizes` for the settings of a GGUF file, and its lists, which stand for a number a layer."""
    sizes: dict[str, Any] = {}
    for key, value in header.values.items():
        prefix, _, rest = key.partition(".")
        if prefix == header.architecture:
            sizes[rest.rpartition(".")[2]] = value.length if isinstance(value, ListOf) else value
    check_sizes(name, sizes)


def larger_than_files(config: Any, file_bits: int) -> str:
    """Why a config asks for more weights than its files can hold at one bit each; empty where it does not.

    transformers makes the whole model before it looks for what is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(config)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted <= file_bits:
        return ""
    return (
        f"has {wanted:,} weights by its description, and its files have room for {file_bits:,} at one bit each; fetch "
        "it again, whole"
    )


def bits_of(folder: Path) -> int:
    """Of all weight files of a folder."""
    return 8 * sum(file.stat().st_size for file in weight_files(folder))
