"""Who runs next: plain bookkeeping, no tensors.

Sequences wait in order until a place in the batch and blocks for their longest possible completion are free, so that a
sequence that has begun never lacks memory. Samples of one prompt (requests with equal prompts and vectors included)
share its keys and values; prompts that begin alike share those of the beginning. Prompts are computed beside the
sequences that are decoded already, at most `prefill_tokens` tokens a step.
"""

from collections import deque
from collections.abc import Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from torch import Tensor

from tinylora.generation.native.kernels.plan import Run
from tinylora.generation.native.kv_cache import BLOCK, BlockPool, blocks_for
from tinylora.generation.sequences import Sequence
from tinylora.models.prefill import common_prefix_length

MIN_PREFIX = 32
"""Tokens that prompts must have in common for a pass of their own to be worth it."""


@dataclass(eq=False, slots=True)
class Prefix:
    """What several prompts of one vector begin with."""

    token_ids: tuple[int, ...]
    owner: int
    table: list[int]


@dataclass(eq=False, slots=True)
class Prompt:
    """A distinct pair of prompt and vector."""

    token_ids: tuple[int, ...]
    owner: int
    order: int
    num_rows: int = 0
    """Sequences that have not finished."""
    num_waiting: int = 0
    """Sequences that have no place yet."""
    prefix: Prefix | None = None
    table: list[int] = field(default_factory=list)
    """Blocks of its keys and values, apart from those of the completions, however many these are: so the blocks that a
    token sees, and the order in which it sums over them, do not depend on what else is in the batch."""
    num_borrowed: int = 0
    """Blocks at the table's beginning that are the prefix's."""
    num_computed: int = 0
    is_resident: bool = False
    logits: Tensor | None = None
    """Of the last position, (1, vocabulary), as long as sequences without a place may need them."""

    @property
    def is_computed(self) -> bool:
        """Whether all its tokens are in the cache."""
        return self.num_computed == len(self.token_ids)


@dataclass(eq=False, slots=True)
class Row:
    """A sequence with a place in the batch, or waiting for one."""

    sequence: Sequence
    prompt: Prompt
    own: list[int] = field(default_factory=list)
    """Blocks of the completion."""


@dataclass(eq=False, slots=True)
class Fill:
    """A stretch of a prompt to compute in this step."""

    prompt: Prompt
    run: Run
    token_ids: tuple[int, ...]


class Scheduler:
    """Hands out places, blocks and prompt stretches."""

    def __init__(
        self,
        sequences: Seq[Sequence],
        keys: Seq[tuple[Hashable, int]],
        pool: BlockPool,
        *,
        context_length: int,
        max_rows: int,
        prefill_tokens: int,
    ) -> None:
        """`keys` gives for each sequence what makes its prompt distinct, and the number of its vector."""
        self.pool = pool
        self.context_length = context_length
        self.max_rows = max_rows
        self.prefill_tokens = prefill_tokens
        self.prompts: dict[Hashable, Prompt] = {}
        rows = []
        for sequence, (key, owner) in zip(sequences, keys, strict=True):
            prompt = self.prompts.setdefault(key, Prompt(sequence.request.prompt_ids, owner, len(self.prompts)))
            prompt.num_rows += 1
            prompt.num_waiting += 1
            rows.append(Row(sequence, prompt))
        self.waiting = deque(sorted(rows, key=lambda row: row.prompt.order))
        self.running: list[Row] = []
        self.filling: list[tuple[Prompt, list[Row]]] = []
        """Prompts being computed, and the sequences that wait for them with a place already taken."""
        self.prefixes: list[Prefix] = []

    def find_prefixes(self) -> None:
        """Give blocks to what the prompts of each vector begin with, where that is long enough and leaves room."""
        by_owner: dict[int, list[Prompt]] = {}
        for prompt in self.prompts.values():
            by_owner.setdefault(prompt.owner, []).append(prompt)
        room = self.pool.num_blocks - max((self.most_blocks(row) for row in self.waiting), default=0)
        for owner, prompts in by_owner.items():
            length = common_prefix_length([p.token_ids for p in prompts]) if len(prompts) > 1 else 0
            # Half the room at most: the rest is for sequences.
            if length < MIN_PREFIX or 2 * blocks_for(length) > room:
                continue
            room -= 2 * blocks_for(length)
            prefix = Prefix(prompts[0].token_ids[:length], owner, self.pool.take(blocks_for(length)))
            self.prefixes.append(prefix)
            for prompt in prompts:
                prompt.prefix = prefix
                prompt.num_computed = length

    def most_blocks(self, row: Row) -> int:
        """Blocks that a sequence alone needs at most, nothing shared."""
        return blocks_for(len(row.prompt.token_ids)) + self._own_blocks(row)

    def _own_blocks(self, row: Row) -> int:
        return blocks_for(row.sequence.token_budget(self.context_length))

    def admit(self) -> tuple[list[Row], list[tuple[int, int]]]:
        """Give places to waiting sequences, in order, as far as places and blocks reach.

        Returns those whose prompt is computed already, and the blocks to copy (source, target) before anything else.
        """
        ready, copies = [], []
        places = self.max_rows - len(self.running) - sum(len(rows) for _, rows in self.filling)
        while self.waiting and places > 0:
            row = self.waiting[0]
            prompt = row.prompt
            own = self._own_blocks(row)
            borrowed = len(prompt.prefix.token_ids) // BLOCK if prompt.prefix else 0
            needs_table = not prompt.is_resident
            fresh = blocks_for(len(prompt.token_ids)) - borrowed if needs_table else 0
            if own + fresh > self.pool.num_free:
                break
            self.waiting.popleft()
            places -= 1
            prompt.num_waiting -= 1
            row.own = self.pool.take(own)
            if needs_table:
                prompt.table = self.pool.take(fresh)
                if prompt.prefix:
                    if len(prompt.prefix.token_ids) % BLOCK:
                        copies.append((prompt.prefix.table[borrowed], prompt.table[0]))
                    prompt.table = prompt.prefix.table[:borrowed] + prompt.table
                    prompt.num_borrowed = borrowed
            if prompt.is_computed:
                ready.append(row)
            elif prompt.is_resident:
                next(rows for p, rows in self.filling if p is prompt).append(row)
            else:
                self.filling.append((prompt, [row]))
            prompt.is_resident = True
        return ready, copies

    def next_fills(self) -> list[Fill]:
        """Stretches of prompts for this step, first come first served."""
        fills, budget = [], self.prefill_tokens
        for prompt, _ in self.filling:
            start = prompt.num_computed
            count = min(budget, len(prompt.token_ids) - start)
            if count == 0:
                break
            budget -= count
            positions = range(start, start + count)
            run = Run(positions, prompt.table, len(prompt.token_ids), [()] * count)
            fills.append(Fill(prompt, run, prompt.token_ids[start : start + count]))
        return fills

    def filled(self, fills: Seq[Fill]) -> list[tuple[Prompt, list[Row]]]:
        """Note that these stretches are computed; returns the prompts that are complete now, with their sequences."""
        for fill in fills:
            fill.prompt.num_computed += len(fill.token_ids)
        complete = [(prompt, rows) for prompt, rows in self.filling if prompt.is_computed]
        self.filling = [(prompt, rows) for prompt, rows in self.filling if not prompt.is_computed]
        return complete

    def start(self, rows: Seq[Row]) -> None:
        """These sequences have their first token and are decoded from now on; those of one prompt stand together."""
        self.running.extend(rows)
        self.running.sort(key=lambda row: (row.prompt.order, row.sequence.request_index, row.sequence.sample_index))

    def retire(self, rows: Seq[Row]) -> None:
        """These sequences have finished: their blocks and places are free."""
        for row in rows:
            self.pool.give_back(row.own)
            row.own = []
            prompt = row.prompt
            prompt.num_rows -= 1
            if prompt.num_rows == 0:
                self.pool.give_back(prompt.table[prompt.num_borrowed :])
                prompt.table = []
        gone = set(map(id, rows))
        self.running = [row for row in self.running if id(row) not in gone]

    def decode_runs(self) -> list[Run]:
        """The running sequences, those that share keys in one run."""
        runs: list[Run] = []
        last: Prompt | None = None
        for row in self.running:
            position = row.sequence.num_tokens - 1
            if row.prompt is last:
                runs[-1].positions.append(position)  # type: ignore[attr-defined]
                runs[-1].own.append(row.own)  # type: ignore[attr-defined]
            else:
                runs.append(Run([position], row.prompt.table, len(row.prompt.token_ids), [row.own]))
                last = row.prompt
        return runs

    @property
    def is_done(self) -> bool:
        """Whether nothing waits or runs."""
        return not (self.waiting or self.running or self.filling)
