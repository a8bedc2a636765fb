"""Which of a model's weights a method adapts, and what all others are: experts, embeddings, head, convolutions, norms.

Only linear maps (nn.Linear and Conv1D) are adapted. Experts of a mixture are no such maps in transformers 5 but one
three-dimensional weight a layer, and are most of such a model, so that what is left out has to be said.
"""

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from tinylora.adapter.attach import linear_maps, output_head_path
from tinylora.adapter.layer import AdaptedLinear
from tinylora.adapter.quantised import quantisation, weight_shape

EXPERTS, EMBEDDINGS, HEAD, TIED = "experts", "embeddings", "output head", "embeddings and output head"
LINEAR, CONVOLUTIONS, SMALL, OTHER = "linear maps", "convolutions", "norms and biases", "other weights"


@dataclass(frozen=True, kw_only=True, slots=True)
class NotAdapted:
    """Weights of one kind and name that a method leaves as they are."""

    kind: str
    name: str
    """Their path, with * for the number of a layer or an expert."""
    count: int
    """Tensors."""
    weights: int
    share: float
    """Of all weights of the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """What a method adapts of a model, in numbers of weights; tied ones count once."""

    adapted_share: float
    not_adapted: tuple[NotAdapted, ...]
    """The largest first."""

    def in_words(self) -> str:
        """One line: the share that is adapted, and the kinds of all else, the largest first."""
        kinds: dict[str, list[NotAdapted]] = {}
        for one in self.not_adapted:
            kinds.setdefault(one.kind, []).append(one)
        shares = {kind: sum(one.share for one in found) for kind, found in kinds.items()}
        parts = [
            f"{kind} {percent(share)}"
            + ("" if kind in (EMBEDDINGS, HEAD, TIED, SMALL) else f" ({_names(kinds[kind])})")
            for kind, share in sorted(shares.items(), key=lambda pair: -pair[1])
        ]
        rest = f"; not adapted: {', '.join(parts)}" if parts else ""
        return f"adapted are maps with {percent(self.adapted_share)} of the weights{rest}"


def percent(share: float) -> str:
    """71.4 %, 0.02 %."""
    return f"{100 * share:.1f} %" if share >= 0.001 or not share else f"{100 * share:.1g} %"


def _names(found: list[NotAdapted]) -> str:
    return ", ".join(one.name for one in found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def reach(model: nn.Module, adapted: Collection[str]) -> Reach:
    """What is adapted of a model where `adapted` are the paths of its adapted maps."""
    adapted, total, inside = set(adapted), 0, 0
    counts: dict[tuple[str, str], list[int]] = {}
    for path, kind, weights in _weights(model):
        total += weights
        if kind == LINEAR and path.rpartition(".")[0] in adapted:
            inside += weights
            continue
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", path)
        counts.setdefault((kind, name), []).append(weights)
    rest = [
        NotAdapted(kind=kind, name=name, count=len(found), weights=sum(found), share=sum(found) / max(1, total))
        for (kind, name), found in counts.items()
    ]
    return Reach(
        adapted_share=inside / max(1, total),
        not_adapted=tuple(sorted(rest, key=lambda one: (-one.weights, one.name))),
    )


def _weights(model: nn.Module) -> Iterator[tuple[str, str, int]]:
    """Path in the bare model, kind and count of every weight: tied ones once, packed ones as what they stand for."""
    maps, head = linear_maps(model), output_head_path(model)
    seen: set[int] = set()
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    headed = {id(maps[head].weight)} if head in maps else set()
    for path, module in model.named_modules():
        bare = path.removesuffix(".base") if path.removesuffix(".base") in maps else path
        if isinstance(module, AdaptedLinear):
            continue  # its own numbers are no weights of the base
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not bare:
                continue
            seen.add(id(parameter))
            packed = quantisation(module) and name == "weight"
            weights = math.prod(weight_shape(module)) if packed else parameter.numel()
            full = f"{bare}.{name}"
            if id(parameter) in embedded & headed:
                kind = TIED
            elif id(parameter) in embedded:
                kind = EMBEDDINGS
            elif id(parameter) in headed:
                kind = HEAD
            elif bare in maps and name == "weight":
                kind = LINEAR
            else:
                kind = _kind(module, full, parameter.dim())
            yield full, kind, weights


def _is_expert(path: str) -> bool:
    return ".experts." in f".{path}."


def _kind(module: nn.Module, path: str, dimensions: int) -> str:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return CONVOLUTIONS
    if dimensions >= 3 or _is_expert(path):
        return EXPERTS if _is_expert(path) else OTHER
    return SMALL if dimensions <= 1 else OTHER
