"""Decode steps of fixed shapes, recorded once and replayed: on a GPU, launching small kernels takes longer than they.

A step's rows and tables are padded to a few sizes. For each, the forward pass is recorded once with its inputs in
buffers that stay where they are; a replay copies the new numbers into them. A row that pads writes its key and value
into a block of its own and sees nothing else. Buffers, recordings and the cache they point into live as long as the
engine.
Leaves out: steps that compute prompts too, whose shapes never come again.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylora.errors import UserError
from tinylora.generation.native.kernels.plan import Plan
from tinylora.generation.native.kv_cache import BLOCK, KVCache
from tinylora.generation.native.runner import Runner

Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Takes a function of no arguments; gives what runs it again, and the tensor in which its result then lies."""
WARM_UPS = 2


def record_cuda(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record on a CUDA device, after runs on a side stream that let libraries choose and allocate."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


def padded_size(count: int) -> int:
    """The size that a count is padded to: powers of two, and in steps of 16 above 16."""
    return 1 << (count - 1).bit_length() if count <= 16 else -(-count // 16) * 16


@dataclass(eq=False, slots=True)
class _Shape:
    """The buffers of one size, and its recording."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    shared_table: Tensor
    shared_high: Tensor
    own_table: Tensor
    own_high: Tensor
    shared_length: Tensor
    owner: Tensor
    rows: Tensor
    ones: Tensor
    replay: Callable[[], None] | None = None
    logits: Tensor | None = None

    def plan(self) -> Plan:
        """Made anew for every run, so that nothing derived from old numbers is kept in it."""
        return Plan(
            positions=self.positions, slots=self.slots, item_first=self.rows, item_count=self.ones,
            shared_table=self.shared_table, shared_high=self.shared_high, own_table=self.own_table,
            own_high=self.own_high, shared_length=self.shared_length,
        )  # fmt: skip


class DecodeGraphs:
    """Recorded decode steps of one engine, over one cache whose last block is for rows that pad."""

    def __init__(self, runner: Runner, cache: KVCache, recorder: Recorder = record_cuda) -> None:
        self.runner = runner
        self.cache = cache
        self.recorder = recorder
        self._shapes: dict[tuple[int, ...], _Shape] = {}
        self._matrices: dict[int, Tensor] = {}
        self._R: Tensor | None = None

    def begin(self, R: Tensor | None) -> None:
        """The matrices of the vectors of a call of generate, which recordings read from a place of their own."""
        self._R = None
        if R is not None:
            count = padded_size(len(R))
            if count not in self._matrices:
                self._matrices[count] = R.new_zeros(count, *R.shape[1:])
            self._R = self._matrices[count]
            self._R[: len(R)].copy_(R)

    def step(self, token_ids: Tensor, plan: Plan, owner: Tensor) -> Tensor:
        """Logits of a decode step, (rows, vocabulary), valid until the next one; token_ids, owner (rows,) int64."""
        rows = len(token_ids)
        shape = self._shape(rows, plan)
        self._fill(shape, token_ids, plan, owner, rows)
        if shape.replay is None:
            try:
                shape.replay, shape.logits = self.recorder(lambda: self._run(shape))
            except RuntimeError as error:
                text = " ".join(str(error).split())[:200]
                raise UserError(
                    f"a decode step could not be recorded on this GPU ({text}); go on with --set "
                    "generation.cuda_graphs=false"
                ) from error
        shape.replay()
        assert shape.logits is not None
        return shape.logits[:rows]

    def _run(self, shape: _Shape) -> Tensor:
        return self.runner.forward(shape.token_ids, shape.plan(), self.cache, self._R, shape.owner, shape.rows)

    def _shape(self, rows: int, plan: Plan) -> _Shape:
        count = padded_size(rows)
        shared, own = (padded_size(t.shape[1]) if t.shape[1] else 0 for t in (plan.shared_table, plan.own_table))
        key = (count, shared, own, 0 if self._R is None else len(self._R))
        if key not in self._shapes:
            device = plan.positions.device
            long = lambda fill=0: torch.full((count,), fill, dtype=torch.long, device=device)  # noqa: E731
            table = lambda width: torch.zeros((count, width), dtype=torch.int32, device=device)  # noqa: E731
            self._shapes[key] = _Shape(
                token_ids=long(), positions=long(), slots=long(), shared_table=table(shared), shared_high=long(),
                own_table=table(own), own_high=long(), shared_length=long(), owner=long(),
                rows=torch.arange(count, device=device), ones=long(1),
            )  # fmt: skip
        return self._shapes[key]

    def _fill(self, shape: _Shape, token_ids: Tensor, plan: Plan, owner: Tensor, rows: int) -> None:
        last = self.cache.num_blocks - 1
        tables = plan.shared_table
        if plan.num_items != rows:  # samples of one prompt stand in one item
            tables = torch.repeat_interleave(tables, plan.item_count, dim=0, output_size=rows)
        for buffer, values, filling in (
            (shape.token_ids, token_ids, 0), (shape.positions, plan.positions, 0),
            (shape.slots, plan.slots, last * BLOCK), (shape.shared_high, plan.shared_high, 0),
            (shape.own_high, plan.own_high, 1), (shape.shared_length, plan.shared_length, 0), (shape.owner, owner, 0),
        ):  # fmt: skip
            buffer[:rows].copy_(values)
            buffer[rows:] = filling
        for buffer, table in ((shape.shared_table, tables), (shape.own_table, plan.own_table)):
            buffer[:rows, : table.shape[1]].copy_(table)
            buffer[:rows, table.shape[1] :] = last
            buffer[rows:] = last
