"""Which keys each token of a forward pass sees, as the kernels want it: plain arrays, made on the CPU."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ITEM_TOKENS = 8
"""Tokens a work item holds at most: enough to share what is read of the cache, few enough to keep all cores busy."""


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens side by side in the batch that share the blocks `shared`, which hold `shared_length` keys.

    Token i stands at `positions[i]` and sees all the keys up to itself: the shared ones first, then those of its own
    blocks `own[i]` (none where that is empty: then it stands among the shared keys itself).
    """

    positions: Sequence[int]
    shared: Sequence[int]
    shared_length: int
    own: Sequence[Sequence[int]]


@dataclass(eq=False, slots=True)
class Plan:
    """The arrays of one forward pass. Tokens are numbered as they lie in the batch."""

    positions: Tensor
    slots: Tensor
    """Where each token's key and value go: block * block size + offset, (n,) int64."""
    item_first: Tensor
    item_count: Tensor
    shared_table: Tensor
    """Blocks of each item's shared keys, (items, width) int32."""
    shared_high: Tensor
    own_table: Tensor
    """Blocks of each token's own keys, (n, width) int32."""
    own_high: Tensor
    shared_length: Tensor
    """Shared keys that each token could see, (n,) int64: where its own ones begin."""
    lows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """First shared and first own key that is seen, by window (0: all)."""

    def low(self, window: int) -> tuple[Tensor, Tensor]:
        """First shared and first own key that each token sees when it sees `window` positions, its own included."""
        if window not in self.lows:
            first = (self.positions + 1 - window).clamp_min(0) if window else torch.zeros_like(self.positions)
            self.lows[window] = (first, (first - self.shared_length).clamp_min(0))
        return self.lows[window]

    def to(self, device: torch.device) -> "Plan":
        """The same plan with its arrays on a device."""
        if device.type == "cpu":
            return self
        names = [f.name for f in fields(self) if f.name != "lows"]
        return Plan(**{name: getattr(self, name).to(device) for name in names})

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch."""
        return len(self.positions)

    @property
    def num_items(self) -> int:
        """Work items."""
        return len(self.item_first)


def _table(rows: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    width = max((len(row) for row in rows), default=0)
    table = np.zeros((len(rows), width), dtype=np.int32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table


def make_plan(runs: Sequence[Run], block: int) -> Plan:
    """The plan of a batch that holds these runs one after another."""
    positions = np.array([p for run in runs for p in run.positions], dtype=np.int64)
    lengths = np.array([run.shared_length for run in runs for _ in run.positions], dtype=np.int64)
    own_rows = [row for run in runs for row in run.own]
    own_table = _table(own_rows)
    has_own = np.array([bool(len(row)) for row in own_rows])
    items: list[tuple[int, int, Sequence[int]]] = []
    first = 0
    for run in runs:
        for start in range(0, len(run.positions), ITEM_TOKENS):
            items.append((first + start, min(ITEM_TOKENS, len(run.positions) - start), run.shared))
        first += len(run.positions)
    shared_table = _table([table for _, _, table in items])
    shared_high = np.where(has_own, lengths, np.minimum(positions + 1, lengths))
    own_at = positions - lengths
    own_high = np.where(has_own, own_at + 1, 0)
    item_of = np.repeat(np.arange(len(items)), [count for _, count, _ in items])
    at = np.where(has_own, own_at, positions)
    rows = np.arange(len(positions))
    blocks = np.zeros(len(positions), dtype=np.int64)
    if own_table.shape[1]:
        blocks[has_own] = own_table[rows[has_own], at[has_own] // block]
    if shared_table.shape[1]:
        blocks[~has_own] = shared_table[item_of[~has_own], at[~has_own] // block]
    return Plan(
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(blocks * block + at % block),
        item_first=torch.tensor([first for first, _, _ in items], dtype=torch.int64),
        item_count=torch.tensor([count for _, count, _ in items], dtype=torch.int64),
        shared_table=torch.from_numpy(shared_table),
        shared_high=torch.from_numpy(shared_high),
        own_table=torch.from_numpy(own_table),
        own_high=torch.from_numpy(own_high),
        shared_length=torch.from_numpy(lengths),
    )


def next_plan(plan: Plan, block: int) -> Plan:
    """The plan of the same rows one token later; every token must have blocks of its own, with room."""
    positions, own_high = plan.positions + 1, plan.own_high + 1
    at = own_high - 1
    blocks = plan.own_table[torch.arange(len(at), device=at.device), at // block].long()
    return Plan(
        positions=positions,
        slots=blocks * block + at % block,
        item_first=plan.item_first,
        item_count=plan.item_count,
        shared_table=plan.shared_table,
        shared_high=plan.shared_high,
        own_table=plan.own_table,
        own_high=own_high,
        shared_length=plan.shared_length,
    )
