"""Places, blocks and prompt stretches, without a model: random loads, and what must hold at every step of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylora.generation.native.kernels.plan import ITEM_TOKENS, Plan, Run, make_plan, next_plan
from tinylora.generation.native.kv_cache import BLOCK, BlockPool, blocks_for
from tinylora.generation.native.scheduler import MIN_PREFIX, Fill, Row, Scheduler
from tinylora.generation.sequences import make_sequences
from tinylora.generation.types import Request, SamplingParams

CONTEXT = 300

# Blocks


def test_blocks_for() -> None:
    assert [blocks_for(n) for n in (0, 1, 63, 64, 65, 128, 129)] == [0, 1, 1, 1, 2, 2, 3]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=40))
def test_the_pool_hands_out_the_lowest_free_blocks(actions: list[tuple[bool, int]]) -> None:
    pool, free, taken = BlockPool(10), set(range(10)), []
    for is_take, count in actions:
        if is_take:
            count = min(count, pool.num_free)
            found = pool.take(count)
            assert found == sorted(free)[:count]
            free -= set(found)
            taken += found
        else:
            back, taken = taken[:count], taken[count:]
            pool.give_back(back)
            free |= set(back)
        assert pool.num_free == len(free)


def test_more_blocks_than_are_free_is_a_bug_of_ours() -> None:
    with pytest.raises(AssertionError, match="more blocks than are free"):
        BlockPool(3).take(4)


# The scheduler, driven as the engine drives it


@dataclass
class Memory:
    """What each place of the cache holds: (vector, the tokens up to and with this one)."""

    held: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = field(default_factory=dict)

    def write(self, table: list[int], at: int, what: tuple[int, tuple[int, ...]]) -> None:
        self.held[table[at // BLOCK], at % BLOCK] = what

    def copy(self, source: int, target: int) -> None:
        for (block, at), what in list(self.held.items()):
            if block == source:
                self.held[target, at] = what

    def check(self, run: Run, i: int, owner: int, tokens: tuple[int, ...]) -> None:
        """Token i of the run sees exactly the keys of `tokens`."""
        end = run.positions[i] + 1
        assert end == len(tokens)
        shared = min(run.shared_length, end)
        for at in range(end):
            table, place = (run.shared, at) if at < shared else (run.own[i], at - shared)
            assert self.held[table[place // BLOCK], place % BLOCK] == (owner, tokens[: at + 1])


class Drive:
    """The engine without its model: the token at a position is that position's number."""

    def __init__(self, requests: list[Request], owners: list[int], num_blocks: int, places: int, stretch: int) -> None:
        sequences = make_sequences(requests)
        keys = [((s.request.prompt_ids, owners[s.request_index]), owners[s.request_index]) for s in sequences]
        self.sequences, self.num_blocks = sequences, num_blocks
        self.scheduler = Scheduler(
            sequences, keys, BlockPool(num_blocks), context_length=CONTEXT, max_rows=places, prefill_tokens=stretch
        )
        self.memory = Memory()
        self.started: list[Row] = []
        self.computed = 0
        self.steps = 0

    def compute(self, run: Run, owner: int, texts: list[tuple[int, ...]]) -> None:
        for i, tokens in enumerate(texts):
            shared = run.shared_length if run.own[i] else CONTEXT
            at = len(tokens) - 1
            table, place = (run.shared, at) if at < shared else (run.own[i], at - shared)
            self.memory.write(list(table), place, (owner, tokens))
        for i, tokens in enumerate(texts):
            self.memory.check(run, i, owner, tokens)
        self.computed += len(texts)

    def blocks_are_nobody_elses(self, ready: Sequence[Row] = ()) -> None:
        """Own blocks, tables of prompts (less what is borrowed) and prefixes are disjoint, and the rest is free."""
        scheduler = self.scheduler
        rows = [*ready, *scheduler.running, *[row for _, rows in scheduler.filling for row in rows]]
        used = [block for row in rows for block in row.own]
        for prompt in scheduler.prompts.values():
            used += prompt.table[prompt.num_borrowed :]
        for prefix in scheduler.prefixes:
            used += prefix.table
        assert len(used) == len(set(used))
        assert scheduler.pool.num_free == self.num_blocks - len(used)

    def step(self) -> None:
        scheduler = self.scheduler
        waiting = list(scheduler.waiting)
        ready, copies = scheduler.admit()
        for source, target in copies:
            self.memory.copy(source, target)
        self.blocks_are_nobody_elses(ready)
        admitted = waiting[: len(waiting) - len(scheduler.waiting)]
        assert waiting == [*admitted, *scheduler.waiting]  # in order
        filling = [row for _, rows in scheduler.filling for row in rows]
        assert len(scheduler.running) + len(filling) + len(ready) <= scheduler.max_rows
        if scheduler.waiting:  # nobody waits beside a free place but for want of blocks
            row = scheduler.waiting[0]
            full = len(scheduler.running) + len(filling) + len(ready) == scheduler.max_rows
            table = 0 if row.prompt.is_resident else blocks_for(len(row.prompt.token_ids))
            own = blocks_for(row.sequence.token_budget(CONTEXT))
            assert full or scheduler.pool.num_free < own + table
        fills = scheduler.next_fills()
        assert sum(len(fill.token_ids) for fill in fills) <= scheduler.prefill_tokens
        left = sum(len(p.token_ids) - p.num_computed for p, _ in scheduler.filling)
        assert sum(len(fill.token_ids) for fill in fills) == min(left, scheduler.prefill_tokens)
        running = list(scheduler.running)
        assert running or fills or ready or scheduler.is_done, "nothing moves"
        self._decode(running)
        for fill in fills:
            self._fill(fill)
        complete = scheduler.filled(fills)
        new = [row for _, rows in complete for row in rows] + ready
        for row in [*running, *new]:
            row.sequence.append(row.sequence.num_tokens, 0.0, 0.0, CONTEXT)
        self.started += new
        scheduler.start(new)
        scheduler.retire([row for row in [*running, *new] if row.sequence.is_finished])
        self.steps += 1

    def _decode(self, running: list[Row]) -> None:
        runs = self.scheduler.decode_runs()
        assert [position for run in runs for position in run.positions] == [r.sequence.num_tokens - 1 for r in running]
        at = 0
        for run in runs:
            rows = running[at : at + len(run.positions)]
            at += len(run.positions)
            texts = [(*row.prompt.token_ids, *row.sequence.token_ids) for row in rows]
            assert len({row.prompt.owner for row in rows}) == 1 or not run.shared
            for i, (row, tokens) in enumerate(zip(rows, texts, strict=True)):
                single = Run([run.positions[i]], run.shared, run.shared_length, [run.own[i]])
                self.compute(single, row.prompt.owner, [tokens])

    def _fill(self, fill: Fill) -> None:
        prompt, start = fill.prompt, fill.prompt.num_computed
        assert list(fill.run.positions) == list(range(start, start + len(fill.token_ids)))
        assert fill.token_ids == prompt.token_ids[start : start + len(fill.token_ids)]
        self.compute(fill.run, prompt.owner, [prompt.token_ids[: p + 1] for p in fill.run.positions])

    def run(self) -> None:
        scheduler = self.scheduler
        assert all(scheduler.most_blocks(row) <= self.num_blocks for row in scheduler.waiting)
        order = list(scheduler.waiting)
        scheduler.find_prefixes()
        self.blocks_are_nobody_elses()
        for prefix in scheduler.prefixes:
            run = Run(range(len(prefix.token_ids)), prefix.table, len(prefix.token_ids), [()] * len(prefix.token_ids))
            self.compute(run, prefix.owner, [prefix.token_ids[: i + 1] for i in range(len(prefix.token_ids))])
        while not scheduler.is_done:
            self.step()
            assert self.steps < 20_000
        assert all(s.finish_reason == "length" for s in self.sequences)
        assert {id(row) for row in self.started} == {id(row) for row in order}
        assert len(self.started) == len(self.sequences)
        assert scheduler.pool.num_free == self.num_blocks - sum(len(prefix.table) for prefix in scheduler.prefixes)


@st.composite
def loads(draw: st.DrawFn) -> tuple[list[Request], list[int], int, int, int]:
    """Requests with shared beginnings, equal prompts and several vectors; a budget that holds each alone, or more."""
    base = draw(st.sampled_from([0, 5, 31, 32, 33, 63, 64, 65, 100, 128]))
    num_owners = draw(st.integers(1, 3))
    requests, owners = [], []
    for _ in range(draw(st.integers(1, 8))):
        tail = draw(st.sampled_from([1, 2, 31, 63, 64, 65, 90]))
        mark = draw(st.integers(0, 2))
        prompt = (*range(base), *[1000 + mark * 100 + i for i in range(tail)])
        budget = draw(st.sampled_from([1, 2, 3, 10, 64, 65, 400]))
        params = SamplingParams(max_new_tokens=budget)
        requests.append(Request(prompt_ids=prompt, params=params, num_samples=draw(st.integers(1, 4))))
        owners.append(draw(st.integers(0, num_owners - 1)))
    most = 0
    for request in requests:
        length = len(request.prompt_ids)
        most = max(most, blocks_for(length) + blocks_for(min(request.params.max_new_tokens, CONTEXT - length)))
    num_blocks = most + draw(st.sampled_from([0, 1, 2, 5, 50]))
    return requests, owners, num_blocks, draw(st.integers(1, 9)), draw(st.sampled_from([1, 3, 64, 100, 2048]))


@settings(max_examples=60, deadline=None)
@given(loads())
def test_any_load_runs_to_its_end(load: tuple[list[Request], list[int], int, int, int]) -> None:
    Drive(*load).run()


def plain(*lengths: int, prompt: int = 3) -> list[Request]:
    return [
        Request(prompt_ids=tuple(100 * i + j for j in range(prompt)), params=SamplingParams(max_new_tokens=n))
        for i, n in enumerate(lengths)
    ]


def test_places_are_taken_at_once() -> None:
    lengths = [9, 2, 5, 1, 7, 3, 3, 8, 1, 6]
    drive = Drive(plain(*lengths), [0] * 10, 100, 3, 2048)
    drive.run()
    places = [0, 0, 0]
    for n in lengths:
        places[places.index(min(places))] += n
    assert drive.steps == max(places)


def test_a_prompt_is_computed_once_for_all_its_samples() -> None:
    request = plain(4, prompt=70)[0]
    requests = [Request(prompt_ids=request.prompt_ids, params=request.params, num_samples=n) for n in (3, 2)]
    drive = Drive(requests, [0, 0], 20, 2, 2048)
    drive.run()
    assert drive.computed == 70 + 5 * 3
    drive = Drive(requests, [0, 1], 20, 2, 2048)  # another vector, another prompt
    drive.run()
    assert drive.computed == 2 * 70 + 5 * 3


@pytest.mark.parametrize("length", [MIN_PREFIX - 1, MIN_PREFIX, 63, 64, 65, 130])
@pytest.mark.parametrize("num_samples", [1, 2])
def test_a_common_beginning_is_computed_once_for_each_vector(length: int, num_samples: int) -> None:
    prompts = [(*range(length), 500 + i, 7) for i in range(4)]
    requests = [
        Request(prompt_ids=p, params=SamplingParams(max_new_tokens=3), num_samples=num_samples) for p in prompts
    ]
    drive = Drive(requests, [0, 1, 0, 1], 100, 9, 2048)
    drive.run()
    shared = length if length >= MIN_PREFIX else 0
    assert [len(prefix.token_ids) for prefix in drive.scheduler.prefixes] == ([length] * 2 if shared else [])
    assert drive.computed == 4 * (length + 2) - 2 * shared + 4 * num_samples * 2


def test_a_beginning_is_not_kept_where_it_would_take_the_room_of_sequences() -> None:
    requests = [Request(prompt_ids=(*range(64), 500 + i), params=SamplingParams(max_new_tokens=63)) for i in range(3)]
    for num_blocks, kept in ((3, 0), (4, 0), (5, 1), (6, 1)):
        drive = Drive(requests, [0] * 3, num_blocks, 3, 2048)
        drive.run()
        assert len(drive.scheduler.prefixes) == kept


def test_the_prefill_budget_is_spent_in_order() -> None:
    drive = Drive(plain(2, 2, 2, prompt=5), [0] * 3, 10, 3, 7)
    scheduler = drive.scheduler
    scheduler.admit()
    assert [(fill.prompt.order, len(fill.token_ids)) for fill in scheduler.next_fills()] == [(0, 5), (1, 2)]
    scheduler.filled(scheduler.next_fills())
    assert [(fill.prompt.order, len(fill.token_ids)) for fill in scheduler.next_fills()] == [(1, 3), (2, 4)]


# Plans


def naive(runs: list[Run], window: int) -> list[tuple[int, list[int]]]:
    """For each token, where its key goes and where those lie that it sees, one by one."""
    found = []
    for run in runs:
        for position, own in zip(run.positions, run.own, strict=True):
            places = []
            for at in range(position + 1):
                inside = at < run.shared_length or not own
                table, place = (run.shared, at) if inside else (own, at - run.shared_length)
                places.append(table[place // BLOCK] * BLOCK + place % BLOCK)
            found.append((places[-1], places[-window:] if window else places))
    return found


def read(plan: Plan, window: int) -> list[tuple[int, list[int]]]:
    """The same, read off a plan."""
    shared_low, own_low = plan.low(window)
    found: list[tuple[int, list[int]]] = []
    for item in range(plan.num_items):
        first, count = int(plan.item_first[item]), int(plan.item_count[item])
        assert 1 <= count <= ITEM_TOKENS
        assert first == len(found)
        for token in range(first, first + count):
            places = []
            for table, low, high in (
                (plan.shared_table[item], shared_low[token], plan.shared_high[token]),
                (plan.own_table[token], own_low[token], plan.own_high[token]),
            ):
                places += [int(table[at // BLOCK]) * BLOCK + at % BLOCK for at in range(int(low), int(high))]
            found.append((int(plan.slots[token]), places))
    assert len(found) == plan.num_tokens == len(plan.positions)
    return found


@st.composite
def some_runs(draw: st.DrawFn, *, decode: bool = False) -> list[Run]:
    blocks = iter(np.random.default_rng(draw(st.integers(0, 9))).permutation(4000).tolist())
    runs = []
    for _ in range(draw(st.integers(1, 4))):
        shared_length = draw(st.sampled_from([0, 1, 63, 64, 65, 130]))
        count = draw(st.integers(1, 19))
        if decode or draw(st.booleans()) or not shared_length:
            positions = [shared_length + draw(st.sampled_from([0, 1, 62, 63, 64, 100])) for _ in range(count)]
            own = [[next(blocks) for _ in range(blocks_for(p + 2 - shared_length))] for p in positions]
        else:
            count = min(count, shared_length)
            start = draw(st.integers(0, shared_length - count))
            positions, own = list(range(start, start + count)), [[]] * count
        shared = [next(blocks) for _ in range(blocks_for(shared_length))]
        runs.append(Run(positions, shared, shared_length, own))
    return runs


@settings(deadline=None)
@given(some_runs(), st.sampled_from([0, 1, 8, 64, 100]))
def test_a_plan_says_what_each_token_sees(runs: list[Run], window: int) -> None:
    assert read(make_plan(runs, BLOCK), window) == naive(runs, window)


@settings(deadline=None)
@given(some_runs(decode=True), st.sampled_from([0, 1, 8, 64, 100]))
def test_the_next_plan_is_that_of_the_next_token(runs: list[Run], window: int) -> None:
    later = [Run([p + 1 for p in run.positions], run.shared, run.shared_length, run.own) for run in runs]
    plan = make_plan(runs, BLOCK)
    plan.low(window)  # what was kept of the first step must not be taken for the second
    assert read(next_plan(plan, BLOCK), window) == naive(later, window)
