"""Where a gain comes from: does the model stop in time, keep the asked-for format, or find the right value?

A reply is strictly right if it stops (s), then can be read (f), then is right (r), so the strict share is the product
P(s) P(f | s) P(r | s, f). The difference of two such products is shared out among the three factors by Shapley's rule:
the mean, over the six orders in which the factors could change one after the other, of what each change adds. The parts
add up to the difference, and none depends on an order that somebody chose.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Protocol

from tinylora.errors import UserError


class Reply(Protocol):
    """What is read of a result."""

    @property
    def strict(self) -> float:
        """1 is right."""
        ...

    @property
    def stopped(self) -> bool:
        """Whether it ended before the token budget did."""
        ...

    @property
    def answered(self) -> bool:
        """Whether an answer in the asked-for format could be read."""
        ...


@dataclass(frozen=True, slots=True)
class Factors:
    """Shares of one side. None where nothing is left to take a share of."""

    stops: float
    """P(stops in time)."""
    format: float | None
    """P(readable in the asked-for format | stops)."""
    value: float | None
    """P(right | stops, readable)."""


@dataclass(frozen=True, slots=True)
class GainSplit:
    """Parts of the difference of the strict shares; stops + format + value = total."""

    total: float
    stops: float
    format: float
    value: float


def factors(replies: Sequence[Reply]) -> Factors:
    """The three shares. A right reply counts as readable, whatever the parser says.

    Raises: UserError for no replies.
    """
    if not replies:
        raise UserError("a gain needs at least one item to be split over, got none")
    stopped = [reply for reply in replies if reply.stopped]
    readable = [reply for reply in stopped if reply.answered or reply.strict >= 1]
    right = sum(reply.strict >= 1 for reply in readable)
    return Factors(
        stops=len(stopped) / len(replies),
        format=len(readable) / len(stopped) if stopped else None,
        value=right / len(readable) if readable else None,
    )


def split_gain(base: Sequence[Reply], tuned: Sequence[Reply]) -> GainSplit:
    """Split tuned - base. A factor that one side leaves undefined is taken as unchanged, as nothing speaks against it.

    Raises: UserError for no replies on a side.
    """
    sides = [factors(base), factors(tuned)]
    names = ("stops", "format", "value")
    shares: list[list[float]] = []
    for name in names:
        before, after = (getattr(side, name) for side in sides)
        known = [share for share in (before, after) if share is not None]
        fill = known[0] if known else 1.0
        shares.append([fill if before is None else before, fill if after is None else after])
    parts = [0.0, 0.0, 0.0]
    orders = list(permutations(range(3)))
    for order in orders:
        now = [before for before, _ in shares]
        for factor in order:
            product = now[0] * now[1] * now[2]
            now[factor] = shares[factor][1]
            parts[factor] += (now[0] * now[1] * now[2] - product) / len(orders)
    return GainSplit(total=sum(parts), stops=parts[0], format=parts[1], value=parts[2])
