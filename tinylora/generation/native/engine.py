"""Rollouts by our own forward pass: continuous batching, shared prompts, a paged cache, nothing padded.

A step decodes one token of every running sequence and computes prompts of those that come next, in one flat batch. A
place that is free is taken at once. The model's modules are only read; an adapter is applied beside its frozen maps
and never merged.
Covers what `tinylora.models.architecture.describe` knows; callers fall back to `TransformersEngine` for the rest.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tinylora.adapter.trained import Trained
from tinylora.errors import UserError
from tinylora.generation.native.graphs import DecodeGraphs, Recorder, record_cuda
from tinylora.generation.native.kernels.build import NoKernels
from tinylora.generation.native.kernels.native import NativeKernels
from tinylora.generation.native.kernels.plan import Plan, Run, make_plan, next_plan
from tinylora.generation.native.kernels.reference import TorchKernels
from tinylora.generation.native.kv_cache import BLOCK, BlockPool, block_bytes, blocks_for
from tinylora.generation.native.runner import Around, Kernels, Runner, can_prepack
from tinylora.generation.native.scheduler import Fill, Prefix, Row, Scheduler
from tinylora.generation.requests import check_requests
from tinylora.generation.sampler import draw_tokens
from tinylora.generation.sequences import Sequence, collect, make_sequences
from tinylora.generation.types import Completion, Request
from tinylora.models.architecture import describe
from tinylora.system.memory import device_memory

KV_BUDGET_BYTES = 2 * 2**30
PREFILL_TOKENS = 2048


class NativeEngine:
    """generate(requests) -> completions, by continuous batching."""

    name = "native"

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        context_length: int,
        pad_token_id: int = 0,
        adapter: Trained | None = None,
        max_batch_rows: int = 128,
        kv_budget_bytes: int = KV_BUDGET_BYTES,
        prefill_tokens: int = PREFILL_TOKENS,
        use_c: bool = True,
        cuda_graphs: bool = True,
        recorder: Recorder | None = None,
    ) -> None:
        """Prepare the weights: on CPUs a packed copy of them. With adapter None an attached one is ignored.

        cuda_graphs: on a GPU, record decode steps and replay them (graphs.py). recorder: another way to record them, on
        any device.

        kv_budget_bytes bounds the memory for keys and values: sequences wait where it is full. `note` says what makes
        the engine slower than it could be: no C kernels though `use_c`, or no memory for the packed weights.

        Raises: Unsupported for a model that is not covered; UserError for a batch, budget or stretch below its least.
        """
        if max_batch_rows < 1:
            raise UserError(f"generation.max_batch_rows must be at least 1, got {max_batch_rows}")
        if prefill_tokens < 1:
            raise UserError(f"prefill_tokens must be at least 1, got {prefill_tokens}")
        self.model = model
        self.architecture = describe(model)
        self.block_bytes = block_bytes(self.architecture)
        if kv_budget_bytes < self.block_bytes:
            raise UserError(
                f"a KV budget of {kv_budget_bytes} bytes does not hold {BLOCK} tokens of this model, which take "
                f"{self.block_bytes} bytes; raise generation.kv_budget_gib"
            )
        self.context_length = context_length
        self.pad_token_id = pad_token_id
        self.adapter = adapter
        self.max_batch_rows = max_batch_rows
        self.kv_budget_bytes = kv_budget_bytes
        self.prefill_tokens = prefill_tokens
        self.note = ""
        self.kernels: Kernels = TorchKernels(self.architecture)
        if use_c and self.architecture.device.type == "cpu":
            try:
                self.kernels = NativeKernels(self.architecture)
            except NoKernels as reason:
                self.note = f"the rollout engine runs without its C kernels, and slower: {reason}"
        prepack = self._has_room_to_prepack()
        self.arithmetic = f"{self.kernels.name} kernels and weights {'packed' if prepack else 'as they are'}"
        self._runner = Runner(self.architecture, self.kernels, adapter, context_length, prepack=prepack)
        self._graphs: DecodeGraphs | None = None
        if recorder is not None or (cuda_graphs and self.architecture.device.type == "cuda"):
            # Recordings point into the cache, so it stays; the last block is for rows that pad.
            cache = self.kernels.new_cache(kv_budget_bytes // self.block_bytes + 1)
            self._graphs = DecodeGraphs(self._runner, cache, recorder or record_cuda)

    def _has_room_to_prepack(self) -> bool:
        """Whether the packed copy of the weights fits into the memory that is free, with as much again left over."""
        if not can_prepack(self.architecture):
            return False
        needed = sum(p.numel() for p in self.model.parameters()) * self.architecture.dtype.itemsize
        free = device_memory(torch.device("cpu")).available
        if 2 * needed > free:
            text = (
                "the rollout engine does not pack the weights, so it is slower and has other last digits: the copy "
                f"takes {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
            )
            self.note = "; ".join(filter(None, [self.note, text]))
            return False
        return True

    def read_factors(self) -> None:
        """Take the adapter's factors A and B as its modules have them now; by itself an engine reads them once.

        Not while CUDA graphs are on: their recordings point at the factors that they were made with.
        """
        assert self._graphs is None
        self._runner.read_factors()

    def put_around(self, around: Mapping[nn.Module, Around]) -> None:
        """From now on compute something before or behind maps (by their plain modules), whatever vector a request has.

        Not while CUDA graphs are on. Raises: Unsupported as `Product.put_around` does.
        """
        assert self._graphs is None
        self._runner.put_around(around)

    def room_for_reply(self, prompt_length: int) -> int:
        """New tokens that the KV budget holds behind a prompt of this length, with nothing beside it."""
        return max(0, self.kv_budget_bytes // self.block_bytes - blocks_for(prompt_length)) * BLOCK

    def generate(self, requests: Seq[Request]) -> list[Completion]:
        """Completions of all requests, ordered by (request, sample).

        Raises: UserError, before anything is sampled, for a request that cannot be run (see `check_requests`) or that
        the KV budget cannot hold even alone; GenerationError, with the completions of all other requests, for one whose
        logits are not finite.
        """
        requests = list(requests)
        check_requests(
            requests,
            vocabulary_size=self.architecture.vocab_size,
            context_length=self.context_length,
            adapter=self.adapter,
        )
        sequences = make_sequences(requests)
        vectors, owners = _distinct_vectors(requests)
        keys = [((s.request.prompt_ids, owners[s.request_index]), owners[s.request_index]) for s in sequences]
        pool = BlockPool(self.kv_budget_bytes // self.block_bytes)
        scheduler = Scheduler(
            sequences, keys, pool, context_length=self.context_length, max_rows=self.max_batch_rows,
            prefill_tokens=self.prefill_tokens,
        )  # fmt: skip
        self._check_budget(scheduler)
        with torch.inference_mode():
            _Generation(self._runner, self.kernels, scheduler, vectors, self.context_length, self._graphs).run()
        return collect(sequences)

    def _check_budget(self, scheduler: Scheduler) -> None:
        for row in scheduler.waiting:
            needed = scheduler.most_blocks(row)
            if needed > scheduler.pool.num_blocks:
                held = scheduler.pool.num_blocks * BLOCK
                budget = row.sequence.token_budget(self.context_length)
                raise UserError(
                    f"request {row.sequence.request_index} may need {needed * BLOCK} tokens of cache (a prompt of "
                    f"{len(row.prompt.token_ids)}, {budget} new ones, in blocks of {BLOCK}) and the KV budget holds "
                    f"{held}; raise generation.kv_budget_gib or lower max_new_tokens"
                )


def _distinct_vectors(requests: Seq[Request]) -> tuple[list[Tensor | None], list[int]]:
    """The vectors that differ, and for each request the number of its own."""
    vectors: list[Tensor | None] = []
    by_value: dict[bytes | None, int] = {}
    by_identity: dict[int, int] = {}
    owners = []
    for request in requests:
        v = request.v
        if id(v) not in by_identity:
            value = None if v is None or not bool(v.any()) else v.detach().cpu().double().numpy().tobytes()
            if value not in by_value:
                by_value[value] = len(vectors)
                vectors.append(None if value is None else v)
            by_identity[id(v)] = by_value[value]
        owners.append(by_identity[id(v)])
    return vectors, owners


class _Generation:
    """One call of generate."""

    def __init__(
        self, runner: Runner, kernels: Kernels, scheduler: Scheduler, vectors: Seq[Tensor | None], context_length: int,
        graphs: DecodeGraphs | None,
    ) -> None:  # fmt: skip
        self.runner = runner
        self.kernels = kernels
        self.scheduler = scheduler
        self.context_length = context_length
        self.R = runner.matrices(vectors)
        self.graphs = graphs
        if graphs is None:
            most = sum(scheduler.most_blocks(row) for row in scheduler.waiting)
            # find_prefixes takes blocks besides, never more than the pool has.
            self.cache = kernels.new_cache(min(scheduler.pool.num_blocks, 2 * most))
        else:
            self.cache = graphs.cache
            graphs.begin(self.R)
        self.device = runner.architecture.device
        self.plan: Plan | None = None
        """Of the running sequences' next token, where nothing but time has passed since it was made."""
        self.owner = torch.zeros(0, dtype=torch.long)

    def run(self) -> None:
        self.kernels.prepare()
        scheduler = self.scheduler
        scheduler.find_prefixes()
        for prefix in scheduler.prefixes:
            self._compute_prefix(prefix)
        while not scheduler.is_done:
            self._step()

    def _forward(self, token_ids: Seq[int], plan: Plan, owner: Tensor, keep: Tensor) -> Tensor:
        ids = torch.tensor(token_ids, dtype=torch.long, device=self.device)
        return self.runner.forward(ids, plan, self.cache, self.R, owner, keep)

    def _compute_prefix(self, prefix: Prefix) -> None:
        nothing = torch.zeros(0, dtype=torch.long, device=self.device)
        length, step = len(prefix.token_ids), self.scheduler.prefill_tokens
        for start in range(0, length, step):
            positions = range(start, min(start + step, length))
            run = Run(positions, prefix.table, length, [()] * len(positions))
            owner = torch.full((len(positions),), prefix.owner, device=self.device)
            plan = make_plan([run], BLOCK).to(self.device)
            self._forward(prefix.token_ids[start : positions.stop], plan, owner, nothing)

    def _step(self) -> None:
        scheduler = self.scheduler
        ready, copies = scheduler.admit()
        for source, target in copies:
            self.cache.copy_block(source, target)
        fills = scheduler.next_fills()
        running = scheduler.running
        logits: list[Tensor] = []
        rows: list[Row] = []
        new: list[Row] = []
        if running or fills:
            found = self._compute(fills)
            logits.append(found[: len(running)])
            rows.extend(running)
            complete = scheduler.filled(fills)
            places = {id(fill.prompt): len(running) + i for i, fill in enumerate(fills)}
            for prompt, waiting in complete:
                at = places[id(prompt)]
                prompt.logits = found[at : at + 1]
                logits.append(prompt.logits.expand(len(waiting), -1))
                new.extend(waiting)
        for row in ready:
            assert row.prompt.logits is not None
            logits.append(row.prompt.logits)
            new.append(row)
        rows.extend(new)
        if not rows:
            return
        all_logits = logits[0] if len(logits) == 1 else torch.cat(logits)
        self._draw(rows, all_logits)
        for prompt in {id(row.prompt): row.prompt for row in new}.values():
            if prompt.num_waiting == 0:
                prompt.logits = None
            elif prompt.logits is not None and prompt.logits.untyped_storage().nbytes() > prompt.logits.nbytes:
                prompt.logits = prompt.logits.clone()  # not the whole batch's
        finished = [row for row in rows if row.sequence.is_finished]
        if new:
            scheduler.start(new)
        if finished:
            scheduler.retire(finished)
        if new or finished or fills:
            self.plan = None

    def _draw(self, rows: Seq[Row], logits: Tensor) -> None:
        sequences: list[Sequence] = [row.sequence for row in rows]
        drawn = draw_tokens(logits, sequences, self.kernels.block_sums)
        for i, sequence in enumerate(sequences):
            if drawn.finite[i]:
                sequence.append(drawn.token_ids[i], drawn.logprobs[i], drawn.sampling_logprobs[i], self.context_length)

    def _compute(self, fills: Seq[Fill]) -> Tensor:
        """Logits of the running sequences' last token, then of the last token of each fill."""
        scheduler = self.scheduler
        running = scheduler.running
        token_ids = [row.sequence.token_ids[-1] for row in running]
        if self.plan is not None:
            self.plan = next_plan(self.plan, BLOCK)
            plan = self.plan
        else:
            runs = scheduler.decode_runs()
            owners = [row.prompt.owner for row in running]
            for fill in fills:
                runs.append(fill.run)
                token_ids.extend(fill.token_ids)
                owners.extend([fill.prompt.owner] * len(fill.token_ids))
            plan = make_plan(runs, BLOCK).to(self.device)
            self.owner = torch.tensor(owners, device=self.device)
            self.plan = None if fills else plan
        ends = list(range(len(running)))
        for fill in fills:
            ends.append((ends[-1] if ends else -1) + len(fill.token_ids))
        if self.graphs is not None and not fills:
            return self.graphs.step(torch.tensor(token_ids, device=self.device), plan, self.owner)
        keep = torch.tensor(ends, device=self.device)
        return self._forward(token_ids, plan, self.owner, keep)
