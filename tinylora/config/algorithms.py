"""What each training algorithm is, for those who plan, announce, report and draw it: a plain table, below all of them.

How it learns stands in `tinylora.training`, one file an algorithm.
"""

from dataclasses import dataclass
from typing import Literal

AlgorithmName = Literal["grpo", "npg", "sft", "rft"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AlgorithmFacts:
    """One algorithm, from the outside."""

    in_words: str
    """As a report names it."""
    short: str
    """As a figure names it."""
    announced: str = ""
    """What a run says that it is; empty for reinforcement learning, which is what one expects here."""
    is_reinforcement: bool = False
    """Whether it learns from rewards, so that a control reward means something."""
    has_rate: bool = True
    """Whether optim.lr decides how far a step goes."""
    samples: bool = True
    """Whether a step draws replies; otherwise it takes as many reference replies."""
    shortened_by: str = ""
    """What makes a step shorter than it may be, to end a sentence."""


ALGORITHMS: dict[AlgorithmName, AlgorithmFacts] = {
    "grpo": AlgorithmFacts(
        in_words="GRPO",
        short="RL (grpo)",
        is_reinforcement=True,
        shortened_by=" and half of the groups agree in their rewards",
    ),
    "npg": AlgorithmFacts(
        in_words="NPG (natural gradient)",
        short="RL (npg)",
        is_reinforcement=True,
        has_rate=False,
        shortened_by=" and half of the groups agree in their rewards",
    ),
    "sft": AlgorithmFacts(
        in_words="SFT on reference solutions",
        short="SFT",
        announced="supervised learning on reference solutions (sft)",
        samples=False,
    ),
    "rft": AlgorithmFacts(
        in_words="RFT on its own right replies",
        short="RFT",
        announced="supervised learning on the untrained model's own right replies (rft)",
        shortened_by=" and half of them are right",
    ),
}
