"""One supervised step: the mean negative log-probability of all tokens of some replies, at temperature 1."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylora.config.run import RunConfig
from tinylora.learner.learner import Learner, Row, micro_batches
from tinylora.learner.memory import FALLBACK_MICRO_BATCH_TOKENS
from tinylora.training.update import descend


@dataclass(frozen=True, slots=True)
class SupervisedStep:
    """What a step was made of."""

    loss: float
    """Mean over tokens; NaN without a reply."""
    grad_norm: float
    replies: int
    tokens: int

    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl."""
        counts = {"tokens_trained": float(self.tokens), "tokens_computed": float(self.tokens)}
        loss = {} if math.isnan(self.loss) else {"loss": self.loss}
        return {**loss, "grad_norm": self.grad_norm, "replies_trained": float(self.replies), **counts}


def supervised_step(
    learner: Learner, rows: Sequence[Row], v: Tensor, optimizer: torch.optim.Optimizer, config: RunConfig, step: int
) -> SupervisedStep:
    """Update v in place once on the mean loss of all tokens; without a row nothing moves.

    Raises: UserError if the loss or the gradient is not finite; v is then as it was.
    """
    total = sum(len(row.token_ids) for row in rows)
    size = config.train.micro_batch_tokens or FALLBACK_MICRO_BATCH_TOKENS

    def losses() -> Iterator[Tensor]:
        for batch in micro_batches(rows, size, shared_prompts=learner.shared_prompts, padded=learner.padded):
            logprobs, mask = learner.logprobs([rows[i] for i in batch], v)
            yield -logprobs[mask].sum() / total

    found, norm = descend(v, optimizer, config, step, losses())
    if not found:
        return SupervisedStep(math.nan, 0.0, 0, 0)
    return SupervisedStep(sum(found), norm, len(rows), total)
