"""Every completion's own gradient: d/dv of the sum of its tokens' log-probs, one row of numbers a completion.

Two ways, equal but for rounding. `apart`: each completion and its prompt go by a copy of v of their own, and one
backward pass gives every copy its gradient; prompts are computed once a completion. `tangents`: what completions share
goes forward with one tangent a number of v (tangents.py), completions go backward as before. The cheaper one is the one
with fewer tokens.
Source: a sum's gradient split by its terms; the score of a policy is that of REINFORCE (Williams 1992).
Leaves out: what scores are for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tinylora.errors import UserError
from tinylora.learner.layout import lay_out_in_two, shared_prefix
from tinylora.learner.learner import Learner, Row
from tinylora.learner.packed import PackedForward
from tinylora.learner.tangents import forward_with_tangents

Way = Literal["apart", "tangents"]


@dataclass(frozen=True, eq=False, slots=True)
class Scores:
    """What `reply_scores` found, in the order of the rows."""

    logprobs: list[Tensor]
    """Of each row its tokens' log-probs at the learner's temperature, float32."""
    scores: Tensor
    """(rows, groups, u), float32: the gradient of each row's sum of log-probs."""


def reply_scores(learner: Learner, rows: Sequence[Row], v: Tensor, way: Way | None = None) -> Scores:
    """Log-probs of all rows under v (groups, u), and each row's own gradient in v, in one pass over all of them.

    `way` None takes the cheaper one; `score_batches` cuts rows so that a pass fits the memory.
    Raises: UserError for a model or method that has no v a row, and for a score that is not finite.
    """
    v = v.detach()
    packed = learner.packed
    way = way or cheaper_way(rows, v.numel(), packed is not None)
    if way == "tangents" and packed is not None:
        with learner.adapter.using(v):
            found = _by_tangents(packed, rows, v.to(learner.adapter.zeros()), learner.temperature)
    else:
        each = v.expand(len(rows), *v.shape).clone().requires_grad_(True)
        logprobs, mask = learner.logprobs(rows, each)
        (scores,) = torch.autograd.grad(logprobs.sum(), each)
        found = Scores([one[real].detach() for one, real in zip(logprobs, mask, strict=True)], scores)
    if not bool(torch.isfinite(found.scores).all()):
        raise UserError("the gradient of a reply is not finite; v is kept as it was. Try model.dtype = float32")
    return found


def _by_tangents(packed: PackedForward, rows: Sequence[Row], v: Tensor, temperature: float) -> Scores:
    prompts, completions = [row.prompt_ids for row in rows], [row.token_ids for row in rows]
    above, below = lay_out_in_two(prompts, completions)
    shared = forward_with_tangents(packed, above, v)
    shift = torch.zeros(len(rows), *v.shape, dtype=v.dtype, device=v.device).requires_grad_(True)
    flat = shift.flatten(1)
    places = torch.tensor([place for one in above.scored for place in one], device=v.device)
    value, tangents = shared.hidden[0, places], shared.hidden[1:, places]
    first = value + torch.einsum("rn,nrw->rw", flat, tangents.to(flat.dtype)).to(value.dtype)
    if below.token_ids:
        x = packed.hidden_states(below, v + shift, shared.keys, flat)
        order: list[Tensor] = []
        for row, others in enumerate(below.scored):
            order += [first[row : row + 1], x[others]]
        first = torch.cat(order)
    logprobs = packed.pick(first, completions, temperature)
    (scores,) = torch.autograd.grad(torch.cat(logprobs).sum(), shift)
    return Scores([one.detach() for one in logprobs], scores)


def _tokens(rows: Sequence[Row]) -> tuple[int, int, int]:
    """Prompt tokens with each prompt counted for every row, prompt tokens where shared, completion tokens."""
    distinct = list({row.prompt_ids for row in rows})
    prefix = shared_prefix(distinct)
    shared = prefix + sum(len(prompt) - prefix for prompt in distinct)
    return sum(len(row.prompt_ids) for row in rows), shared, sum(len(row.token_ids) for row in rows)


def cost(rows: Sequence[Row], numbers: int, way: Way) -> int:
    """Tokens that go through the model forward: one forward and one backward pass count as three."""
    prompts, shared, completions = _tokens(rows)
    return 3 * (prompts + completions) if way == "apart" else (1 + numbers) * shared + 3 * completions


def cheaper_way(rows: Sequence[Row], numbers: int, packed: bool) -> Way:
    """The way of fewer tokens; without a packed forward there is one way only."""
    return "tangents" if packed and cost(rows, numbers, "tangents") < cost(rows, numbers, "apart") else "apart"


def score_batches(rows: Sequence[Row], numbers: int, max_tokens: int) -> Iterator[list[int]]:
    """Indices of rows, a batch at a time, groups together where they fit, so that its tokens stay within max_tokens.

    Tokens are those that a batch holds at once, by the way that holds fewer. One row that is longer is a batch of its
    own.
    """
    prefix = shared_prefix(list({row.prompt_ids for row in rows}))
    batch: list[int] = []
    distinct: set[tuple[int, ...]] = set()
    apart = shared = completions = 0
    for index in sorted(range(len(rows)), key=lambda i: (rows[i].group, i)):
        row = rows[index]
        new = 0 if row.prompt_ids in distinct else len(row.prompt_ids) - prefix
        held = min(apart + len(row.prompt_ids), (1 + numbers) * (prefix + shared + new))
        if batch and completions + len(row.token_ids) + held > max_tokens:
            yield batch
            batch, distinct = [], set()
            apart = shared = completions = 0
            new = len(row.prompt_ids) - prefix
        batch.append(index)
        distinct.add(row.prompt_ids)
        apart, shared, completions = apart + len(row.prompt_ids), shared + new, completions + len(row.token_ids)
    if batch:
        yield batch
