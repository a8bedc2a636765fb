"""The `bench` workflow: how fast a model generates here, in tokens and milliseconds, memory, and share of the roofline.

Random prompts, no stop tokens, temperature 1: the same work whatever the model would say. Every row has a prompt of its
own, so nothing is shared. Leaves out: training, adapters, and prompts or answers of mixed lengths
(bench/speed/rollout.py).
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import torch

from tinylora.errors import UserError
from tinylora.generation.transformers_backend import TransformersEngine
from tinylora.generation.types import Completion, Request, SamplingParams
from tinylora.models.architecture import Unsupported
from tinylora.models.base import BaseModel
from tinylora.models.load import load_base_model
from tinylora.planning.roofline import Machine, decode_bound, kv_bytes, measure_machine
from tinylora.system.busy import warn_if_busy
from tinylora.system.cores import default_threads
from tinylora.system.memory import peak_memory, reset_peak_memory
from tinylora.talk import Say

Backend = Literal["native", "transformers"]

PARTLY_FILLED = 256
"""Tokens of cache a row may hold more than it uses: blocks that are not full."""
WARM_UP = 3
"""New tokens of the pass before the measured one, with prompts of at most WARM_UP_PROMPT tokens."""
WARM_UP_PROMPT = 16


class Engine(Protocol):
    """What is timed."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions of all requests."""
        ...


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What to measure.

    Raises: UserError for a count out of range.
    """

    batches: tuple[int, ...] = (1, 8, 64)
    """Rows at once, one measurement each."""
    prompt: int = 128
    """Tokens of each row's prompt."""
    new: int = 64
    """Tokens generated on each row."""
    threads: int = 0
    """torch's threads; 0 takes the cores really available."""
    device: str = "auto"
    dtype: str = "auto"
    backend: Backend = "native"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            given = ",".join(map(str, self.batches))
            raise UserError(
                f"--batch must be numbers of at least 1, separated by commas, such as 1,8,64, got {given!r}"
            )
        if self.prompt < 1:
            raise UserError(f"--prompt must be at least 1 token, got {self.prompt}")
        if self.new < 2:
            raise UserError(f"--new must be at least 2 tokens, so that there is a step to time, got {self.new}")
        if self.threads < 0:
            raise UserError(f"--threads must be at least 1, or 0 for the cores available, got {self.threads}")
        if self.backend not in get_args(Backend):
            raise UserError(f"--backend must be one of {', '.join(get_args(Backend))}, got {self.backend!r}")


@dataclass(frozen=True, kw_only=True)
class BatchSpeed:
    """One batch size."""

    batch: int
    new_tokens: int
    """batch times the new tokens of a row."""
    seconds: float
    """Of the whole pass, prompts included."""
    tokens_per_second: float
    """new_tokens / seconds."""
    prefill_tokens_per_second: float
    """Prompt tokens, by the time until every row has its first new token."""
    step_ms: float
    """Mean time of a decode step while all rows are running."""
    bound_ms: float
    """The roofline's."""
    roofline_share: float
    """bound_ms / step_ms."""
    peak_memory_bytes: int
    """Of the process, weights included; on a GPU, what torch holds there."""


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Everything that `tinylora bench` prints."""

    model: str
    num_parameters: int
    backend: str
    prompt: int
    new: int
    machine: Machine
    other_processes_cores: float | None
    """Cores that other processes took when we began; None where that is not known."""
    batches: tuple[BatchSpeed, ...]


def run_bench(name: str, settings: BenchSettings, say: Say, base: BaseModel | None = None) -> BenchResult:
    """Load a model, measure the machine and then every batch size.

    Raises: UserError for a model that cannot be loaded, or a prompt and answer longer than its context.
    """
    threads = settings.threads or default_threads()
    torch.set_num_threads(threads)
    others = warn_if_busy(threads, say)
    if base is None:
        base = load_base_model(name, device=settings.device, dtype=settings.dtype)
    if settings.prompt + settings.new > base.context_length:
        raise UserError(
            f"--prompt {settings.prompt} and --new {settings.new} make {settings.prompt + settings.new} tokens, and "
            f"the context of {name} is {base.context_length}; make one of them smaller"
        )
    settings, engine = open_engine(base, settings, say)
    say(f"measuring this machine with {threads} {'thread' if threads == 1 else 'threads'} ...")
    machine = measure_machine(base.model, settings.batches)
    speeds = []
    for batch in settings.batches:
        say(f"batch {batch} ...")
        speeds.append(measure_batch(engine, base, settings, batch, machine))
    return BenchResult(
        model=name,
        num_parameters=sum(parameter.numel() for parameter in base.model.parameters()),
        backend=settings.backend,
        prompt=settings.prompt,
        new=settings.new,
        machine=machine,
        other_processes_cores=others,
        batches=tuple(speeds),
    )


def open_engine(base: BaseModel, settings: BenchSettings, say: Say) -> tuple[BenchSettings, Engine]:
    """The engine asked for, with room for the largest batch; for a model that native does not cover, transformers."""
    rows = max(settings.batches)
    if settings.backend == "native":
        from tinylora.generation.native.engine import KV_BUDGET_BYTES, NativeEngine

        room = rows * kv_bytes(base.model, [settings.prompt + settings.new + PARTLY_FILLED])
        try:
            engine = NativeEngine(
                base.model,
                context_length=base.context_length,
                pad_token_id=base.pad_token_id,
                max_batch_rows=rows,
                kv_budget_bytes=max(KV_BUDGET_BYTES, math.ceil(room)),
            )
            if engine.note:
                say(engine.note)
            return settings, engine
        except Unsupported as reason:
            say(f"the native backend does not cover this model ({reason}); measuring the transformers backend")
            settings = replace(settings, backend="transformers")
    return settings, TransformersEngine(
        base.model, context_length=base.context_length, pad_token_id=base.pad_token_id, max_batch_rows=rows
    )


def measure_batch(engine: Engine, base: BaseModel, settings: BenchSettings, batch: int, machine: Machine) -> BatchSpeed:
    """One batch size: a short pass to warm up, then one measured pass."""
    warm = replace(settings, prompt=min(settings.prompt, WARM_UP_PROMPT), new=min(settings.new, WARM_UP))
    engine.generate(random_requests(base, warm, StepClock(batch)))
    gc.collect()
    reset_peak_memory(base.device)
    clock = StepClock(batch)
    requests = random_requests(base, settings, clock)
    start = time.perf_counter()
    done = engine.generate(requests)
    seconds = time.perf_counter() - start
    new_tokens = sum(len(completion.token_ids) for completion in done)
    step = clock.step_seconds()
    mean_length = settings.prompt + settings.new / 2  # what a row attends to, averaged over the steps
    bound = decode_bound(base.model, machine, batch, [mean_length] * batch)
    return BatchSpeed(
        batch=batch,
        new_tokens=new_tokens,
        seconds=seconds,
        tokens_per_second=new_tokens / seconds,
        prefill_tokens_per_second=batch * settings.prompt / (clock.all_started() - start),
        step_ms=1e3 * step,
        bound_ms=1e3 * bound,
        roofline_share=bound / step,
        peak_memory_bytes=peak_memory(base.device),
    )


class StepClock:
    """When each row got each of its tokens, noted by the engine's calls of `should_stop`."""

    def __init__(self, rows: int) -> None:
        self.times: list[list[float]] = [[] for _ in range(rows)]

    def watch(self, row: int) -> Callable[[list[int]], bool]:
        """A `should_stop` for one row, which never stops it."""
        times = self.times[row]

        def note(token_ids: list[int]) -> bool:
            times.append(time.perf_counter())
            return False

        return note

    def all_started(self) -> float:
        """When the last row got its first token."""
        return max(times[0] for times in self.times)

    def step_seconds(self) -> float:
        """Mean time of a step while all rows were running; where they never did, from the last row's start to its end.

        An engine may begin to decode some rows while it still computes the prompts of others.
        """
        last = max(self.times, key=lambda times: times[0])
        first_end = min(times[-1] for times in self.times)
        steps = [moment for moment in last if moment <= first_end] if first_end > last[0] else last
        if len(steps) < 2:  # the others ended within the last row's first step
            steps = last
        return (steps[-1] - steps[0]) / (len(steps) - 1)


def random_requests(base: BaseModel, settings: BenchSettings, clock: StepClock) -> list[Request]:
    """One request with a random prompt for each row of the clock."""
    generator = torch.Generator().manual_seed(settings.seed)
    vocabulary = int(base.model.get_input_embeddings().weight.shape[0])
    prompts = torch.randint(vocabulary, (len(clock.times), settings.prompt), generator=generator).tolist()
    params = SamplingParams(max_new_tokens=settings.new, seed=settings.seed)
    return [
        Request(prompt_ids=tuple(prompt), params=params, key=row, should_stop=clock.watch(row))
        for row, prompt in enumerate(prompts)
    ]


# --- for people ---


def format_bench(result: BenchResult) -> str:
    """Lines for people: what was measured on what, then a row for each batch size."""
    machine = result.machine
    rates = ", ".join(f"{rate / 1e9:,.0f} at {rows}" for rows, rate in machine.rates.items())
    lines = [
        f"{result.model}: {result.num_parameters:,} parameters in {machine.dtype}, {result.backend} backend on "
        f"{machine.device}, {machine.threads} {'thread' if machine.threads == 1 else 'threads'}",
        f"prompts of {result.prompt} tokens, {result.new} new tokens a row",
        f"this machine: reads {machine.bandwidth / 1e9:,.1f} GB/s; products in GFLOP/s by rows: {rates}",
        "",
        f"{'batch':>5}  {'tokens/s':>9}  {'ms a step':>9}  {'at least':>9}  {'roofline':>8}  {'prefill tok/s':>13}  "
        f"{'peak memory':>11}",
    ]
    lines += [
        f"{b.batch:>5}  {b.tokens_per_second:>9,.1f}  {b.step_ms:>9,.1f}  {b.bound_ms:>9,.1f}  "
        f"{b.roofline_share:>8.0%}  {b.prefill_tokens_per_second:>13,.0f}  {b.peak_memory_bytes / 2**20:>7,.0f} MiB"
        for b in result.batches
    ]
    return "\n".join(lines)
