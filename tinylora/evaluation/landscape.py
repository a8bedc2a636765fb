"""What random vectors do to a model: accuracy and KL to the base against their norm. To look at before training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinylora.errors import UserError
from tinylora.evaluation.logprobs import completion_logprobs, divergence, in_parts
from tinylora.talk import Say

if TYPE_CHECKING:
    from tinylora.rollouts.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class LandscapeRow:
    """One random vector (norm 0: the untrained model): shares right, and the mean KL to the base in nats a token."""

    norm: float
    vector: int
    strict: float
    value_only: float
    stopped: float
    kl: float
    num_items: int


def random_vector(groups: int, u: int, norm: float, seed: int) -> Tensor:
    """A vector (groups, u) of the given Euclidean norm in a direction drawn uniformly."""
    direction = torch.randn(groups, u, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (direction * (norm / direction.norm())).to(torch.float32)


def landscape(
    runtime: "Runtime", norms: Sequence[float], num_vectors: int, num_items: int, seed: int, say: Say
) -> list[LandscapeRow]:
    """Greedy accuracy and KL to the base under random vectors, on validation items; the first row is norm 0.

    KL(base || adapted) is over the whole vocabulary at temperature 1, at every position of the base's own greedy
    completions (stop token included), and is averaged over all their tokens.
    Raises: UserError for a norm that is not above 0, no vector, or no item.
    """
    from tinylora.rollouts.replies import mean

    if not norms or any(not (0 < norm < math.inf) for norm in norms):
        raise UserError(f"--norms must be finite numbers above 0, separated by commas, got {list(norms)}")
    if num_vectors < 1 or num_items < 1:
        raise UserError(f"--vectors and --items must be at least 1, got {num_vectors} and {num_items}")
    items = runtime.task.items("validation")[:num_items]
    groups, u = runtime.adapter.shape
    cases: list[tuple[float, int, Tensor | None]] = [(0.0, 0, None)]
    cases += [
        # The same directions at every norm: what changes down a column is the norm alone.
        (norm, k, random_vector(groups, u, norm, seed * 1_000_003 + k))
        for norm in norms
        for k in range(num_vectors)
    ]
    divergence = _base_divergence(runtime, items, [v for _, _, v in cases[1:]])
    rows = []
    for (norm, k, v), kl in zip(cases, [0.0, *divergence], strict=True):
        results = runtime.answer(items, v, who=f"norm {norm:g}, vector {k}")
        shares = {name: mean(results, name) for name in ("strict", "value_only", "stopped")}
        rows.append(LandscapeRow(norm=norm, vector=k, kl=kl, num_items=len(items), **shares))
        say(f"norm {norm:g}, vector {k}: strict {shares['strict']:.3f}, KL {kl:.2e}")
    return rows


def _base_divergence(runtime: "Runtime", items: Sequence[Any], vectors: Sequence[Tensor | None]) -> list[float]:
    """Mean KL(base || adapted) a token, for each vector, on the base's greedy completions."""
    from tinylora.generation.types import Request

    prompts = [runtime.encode(runtime.task.prompt(item)) for item in items]
    params = runtime.sampling()
    completions = runtime.engine.generate([Request(prompt_ids=ids, params=params) for ids in prompts])
    pairs = [(prompts[c.request_index], c.token_ids) for c in completions]
    totals, tokens = [0.0] * len(vectors), 0
    with torch.inference_mode():
        for part in in_parts(pairs, runtime.base.model.config.get_text_config().vocab_size):
            base = completion_logprobs(runtime.base.model, runtime.adapter, part, None)
            tokens += base.shape[0]
            for i, v in enumerate(vectors):
                other = completion_logprobs(runtime.base.model, runtime.adapter, part, v)
                totals[i] += divergence(base, other)
    return [total / tokens for total in totals]


def format_landscape(rows: Sequence[LandscapeRow]) -> str:
    """A table for people."""
    lines = [
        f"greedy on {rows[0].num_items} validation items; KL(base || adapted) in nats a token, on the base's answers",
        f"{'norm':>6} {'vector':>6} {'strict':>8} {'value only':>11} {'stopped':>8} {'KL':>10}",
    ]
    lines += [
        f"{r.norm:>6g} {'base' if r.norm == 0 else r.vector:>6} {100 * r.strict:>6.1f} % {100 * r.value_only:>9.1f} % "
        f"{100 * r.stopped:>6.1f} % {r.kl:>10.2e}"
        for r in rows
    ]
    return "\n".join(lines)
