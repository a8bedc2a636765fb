"""How many times faster are our rollouts than transformers' `generate`, and how near to what the machine can do?

GSM8K-like rollouts: groups of 8 samples, random prompts of 100 to 150 tokens, forced lengths that are the same for both
sides, bf16, the same threads, in turn (8x8 and chat: ours, generate, ours). Kept tokens are the forced lengths; what a
side computes beyond a row's length does not count. Cells, for each model:

    8x8     8 prompts x 8 samples, lengths drawn uniformly from 32 to 256 (the headline, `speedup_vs_generate`)
    32x8    32 prompts x 8 samples, lengths alike: ours refills places; generate takes batches of --peer-rows rows (by
            default 128, or as many as it has memory for: its prefill copies the vocabulary matrix once a row, and where
            that fails it goes on some 20 times slower), of which the first --peer-batches are timed (they are alike; 0
            times all of them)
    equal   8 x 8, all 144 tokens long; gives the roofline share too
    chat    1 prompt of 100 tokens, 64 new tokens
    adapter ours alone: a decode step with one v for all rows and with one v a row against the base (64 rows and 1 row,
            prompts of 8 tokens, so that attention hides nothing), and the time that a change of v costs
    batches not in a default run, meant for a GPU (--device cuda): 1, 64 and 256 rows with prompts of their own, 128 new
            tokens each, against generate and transformers' continuous batching, and the share of the bound
    peer    not in a default run: other settings of generate (below)

`generate`: left padding, sampling at temperature 1 with top_k 0 and top_p 1, no eos, rows ended by a StoppingCriteria
that answers for each row, inference mode, sdpa attention, dynamic cache. Ours: one request a sample, with the prompt of
its group, no stop tokens, and the engine's own defaults for rows and memory.

The roofline of a decode step of 64 rows (tinylora/planning/roofline.py):

    seconds >= sum over linear maps of max(2 rows in out / rate(rows), bytes of the weight / bandwidth)
               + bytes of keys and values / bandwidth

with the rate of the fastest product at 64 rows and the bandwidth, both measured in this run around the steps (the best
reading counts), and a prompt's keys and values counted once for the samples that share it. `roofline_share` is that
bound over the mean step of `equal`.

Settings of generate that were tried (`--only peer`, SmolLM2-135M, bf16, one thread of an AMD EPYC whose two cores were
busy with other work, so leads only; decode steps after prompts of 32 tokens), in tokens a second: 64 rows with the
settings above 109, 128 rows 160, 256 rows 61; at 64 rows a static cache 63, eager attention 51. transformers' own
continuous batching (`generate_batch`) fails for every request under inference mode; under no_grad it took 90 seconds
for 8 rows of 8 tokens, and generate 21. So: sdpa, a dynamic cache, and 128 rows at once where there are as many.

    python -m bench.speed.rollout [MODEL ...] [--only 8x8,chat] [--quick] [--save]
"""

import argparse
import itertools
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging as transformers_logging

from bench.common import finish
from tinylora.adapter.attach import AttachedAdapter, attach
from tinylora.adapter.config import AdapterConfig
from tinylora.generation.transformers_backend import TransformersEngine
from tinylora.generation.types import Request, SamplingParams
from tinylora.models.base import BaseModel
from tinylora.models.load import load_base_model
from tinylora.planning.generation_speed import StepClock
from tinylora.planning.roofline import decode_bound, measure_machine
from tinylora.system.busy import busy_cores, warn_if_busy
from tinylora.system.cores import available_threads
from tinylora.system.paths import cache_dir

CELLS = ("8x8", "32x8", "equal", "chat", "adapter")
MODELS = ("smollm2-135m-instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct")
OTHER_CELLS = ("batches", "peer")
GROUP = 8


@dataclass(frozen=True)
class Sizes:
    """How large the cells are; --quick makes all of them small, for a look at whether everything runs."""

    prompts: int = 8
    many_prompts: int = 32
    prompt_lengths: tuple[int, int] = (100, 150)
    lengths: tuple[int, int] = (32, 256)
    equal: int = 144
    chat_prompt: int = 100
    chat_new: int = 64
    chat_rounds: int = 5
    adapter_rows: int = 64
    adapter_new: int = 24
    adapter_rounds: int = 8
    changes: int = 40


QUICK = Sizes(2, 4, (10, 15), (3, 8), 6, 10, 8, 2, 4, 6, 2, 5)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Rollouts:
    """Rows to generate: a prompt and a forced length each, samples of a prompt side by side."""

    prompts: list[tuple[int, ...]]
    lengths: list[int]

    @property
    def kept(self) -> int:
        return sum(self.lengths)

    def __getitem__(self, rows: slice) -> "Rollouts":
        return Rollouts(self.prompts[rows], self.lengths[rows])


def draw_rollouts(
    base: BaseModel, prompts: int, samples: int, widths: tuple[int, int], lengths: tuple[int, int], seed: int
) -> Rollouts:
    draw = random.Random(seed)
    vocabulary = int(base.model.get_input_embeddings().weight.shape[0])
    drawn = [tuple(draw.randrange(vocabulary) for _ in range(draw.randint(*widths))) for _ in range(prompts)]
    rows = [prompt for prompt in drawn for _ in range(samples)]
    return Rollouts(rows, [draw.randint(*lengths) for _ in rows])


# --- ours ---


def requests(
    rollouts: Rollouts, vectors: Sequence[Tensor | None] | None = None, clock: StepClock | None = None
) -> list[Request]:
    """One request a row."""
    return [
        Request(
            prompt_ids=prompt,
            params=SamplingParams(max_new_tokens=length, seed=1),
            key=key,
            v=vectors[key] if vectors else None,
            should_stop=clock.watch(key) if clock else None,
        )
        for key, (prompt, length) in enumerate(zip(rollouts.prompts, rollouts.lengths, strict=True))
    ]


def time_ours(engine: Any, rollouts: Rollouts) -> float:
    todo = requests(rollouts)
    start = time.perf_counter()
    done = engine.generate(todo)
    seconds = time.perf_counter() - start
    assert [len(completion.token_ids) for completion in done] == rollouts.lengths
    return seconds


def step_seconds(engine: Any, rollouts: Rollouts, vectors: Sequence[Tensor | None] | None = None) -> float:
    """Mean time of a decode step while all rows are running."""
    clock = StepClock(len(rollouts.lengths))
    engine.generate(requests(rollouts, vectors, clock))
    return clock.step_seconds()


def make_engine(kind: str, base: BaseModel, adapter: AttachedAdapter | None = None, **options: Any) -> Any:
    """The engine as a user gets it, with its own defaults for rows and memory."""
    common: dict[str, Any] = {"context_length": base.context_length, "pad_token_id": base.pad_token_id}
    if kind == "transformers":
        return TransformersEngine(base.model, adapter=adapter, **common, **options)
    from tinylora.generation.native.engine import NativeEngine

    engine = NativeEngine(base.model, adapter=adapter, **common, **options)
    if engine.note:
        say(engine.note)
    return engine


# --- the peer ---


class OwnLength(StoppingCriteria):
    """Each row ends at its own length."""

    def __init__(self, width: int, lengths: Sequence[int], times: list[float] | None = None) -> None:
        self.width = width
        self.times = times
        self.lengths = torch.tensor(lengths)
        """On the CPU; moved to where the tokens are when it is asked."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if self.times is not None:
            self.times.append(time.perf_counter())
        return (input_ids.shape[1] - self.width) >= self.lengths.to(input_ids.device)


def generate(base: BaseModel, rollouts: Rollouts, times: list[float] | None = None, **options: Any) -> float:
    """Seconds of one call of transformers' generate for all rows at once; `times` gets the time of every step's end."""
    width = max(map(len, rollouts.prompts))
    pad = base.pad_token_id
    device = base.device
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in rollouts.prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in rollouts.prompts], device=device)
    # What is None in a call's config is filled from the model's own, so eos has to be taken from that one.
    base.model.generation_config = GenerationConfig(pad_token_id=pad)
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max(rollouts.lengths),
        pad_token_id=pad,
        **options,
    )
    start = time.perf_counter()
    with torch.inference_mode():
        out = base.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([OwnLength(width, rollouts.lengths, times)]),
        )
    seconds = time.perf_counter() - start
    assert out.shape == (len(rollouts.lengths), width + max(rollouts.lengths)), out.shape
    return seconds


def most_peer_rows(base: BaseModel) -> int:
    """128 rows, or half as often as it takes for generate's copies of the vocabulary matrix to fit into memory."""
    weight: Any = base.model.get_output_embeddings().weight
    rows, free = 128, psutil.virtual_memory().available
    while rows > 1 and 1.1 * rows * weight.nbytes > free:
        rows //= 2
    return rows


def generate_in_batches(base: BaseModel, rollouts: Rollouts, rows: int, limit: int = 0) -> tuple[float, int]:
    """Seconds and kept tokens of the first `limit` batches (0: of all).

    Prompts of like length go side by side, as a user would have them; how long an answer gets, nobody knows before.
    """
    order = sorted(range(len(rollouts.lengths)), key=lambda i: len(rollouts.prompts[i]))
    rollouts = Rollouts([rollouts.prompts[i] for i in order], [rollouts.lengths[i] for i in order])
    batches = [rollouts[slice(i, i + rows)] for i in range(0, len(rollouts.lengths), rows)]
    batches = batches[:limit] if limit else batches
    return sum(generate(base, batch) for batch in batches), sum(batch.kept for batch in batches)


# --- cells ---


def compare(
    engine: Any,
    base: BaseModel,
    rollouts: Rollouts,
    *,
    rounds: int = 1,
    ours_after: bool = True,
    peer_rows: int = 0,
    limit: int = 0,
) -> dict[str, Any]:
    """Kept tokens a second of both sides, in turn: ours, generate, ours, ... ."""
    ours: list[float] = []
    peer: list[float] = []
    for _ in range(rounds):
        ours.append(time_ours(engine, rollouts))
        seconds, kept = generate_in_batches(base, rollouts, peer_rows or len(rollouts.lengths), limit)
        peer.append(seconds)
    if ours_after:
        ours.append(time_ours(engine, rollouts))
    ours_rate = rollouts.kept / statistics.median(ours)
    peer_rate = kept / statistics.median(peer)
    return {
        "rows": len(rollouts.lengths),
        "kept_tokens": rollouts.kept,
        "generate_kept_tokens": kept,
        "speedup": round(ours_rate / peer_rate, 2),
        "ours_tokens_per_second": round(ours_rate, 1),
        "generate_tokens_per_second": round(peer_rate, 1),
        "ours_seconds": [round(t, 2) for t in ours],
        "generate_seconds": [round(t, 2) for t in peer],
    }


def roofline(engine: Any, base: BaseModel, rollouts: Rollouts) -> dict[str, Any]:
    """Decode steps of the equal cell against the bound.

    The machine is measured before, between and after them, and the best of it counts: one reading in a moment when
    something else had the processor would give a bound that is none.
    """
    rows, length = len(rollouts.lengths), rollouts.lengths[0]
    machines, steps = [measure_machine(base.model, [rows])], []
    for _ in range(2):
        steps.append(step_seconds(engine, rollouts))
        machines.append(measure_machine(base.model, [rows]))
    rates, bandwidths = [m.rates[rows] for m in machines], [m.bandwidth for m in machines]
    machine = replace(machines[0], rates={rows: max(rates)}, bandwidth=max(bandwidths))
    step = statistics.mean(steps)
    shared = [len(prompt) for prompt in dict.fromkeys(rollouts.prompts)]
    bound = decode_bound(base.model, machine, rows, shared + [length / 2] * rows)
    return {
        "threads": machine.threads,
        "gflops": [round(rate / 1e9, 1) for rate in rates],
        "bandwidth_gb_s": [round(one / 1e9, 2) for one in bandwidths],
        "step_ms": [round(1e3 * one, 2) for one in steps],
        "bound_ms": round(1e3 * bound, 3),
        "share": round(bound / step, 3),
    }


def profile(engine: Any, base: BaseModel, rollouts: Rollouts) -> dict[str, float]:
    """Milliseconds of a step of the equal cell by what is called, mean over all of its steps; the calls are wrapped."""
    spent: Counter[str] = Counter()

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **more: Any) -> Any:
            start = time.perf_counter()
            found = call(*args, **more)
            spent[name] += time.perf_counter() - start
            return found

        return run

    runner, kernels = engine._runner, engine.kernels
    products = [p for layer in runner.layers for p in (layer.qkv, layer.o, layer.gate_up, layer.down)] + [runner.head]
    before = [product.compute for product in products]
    for product in products:
        name = f"product {product.out_features} x {product.in_features}"
        product.compute = timed(name, product.compute)
    calls = ("add_norm", "store_qkv", "attend", "act_mul", "block_sums")
    for name in calls:
        setattr(kernels, name, timed(name, getattr(kernels, name)))
    try:
        seconds = time_ours(engine, rollouts)
    finally:
        for product, compute in zip(products, before, strict=True):
            product.compute = compute
        for name in calls:
            delattr(kernels, name)
    steps = rollouts.lengths[0]
    rest = seconds - sum(spent.values())
    return {name: round(1e3 * t / steps, 2) for name, t in [*spent.most_common(), ("rest", rest)]}


def adapter_overhead(kind: str, base: BaseModel, sizes: Sizes, seed: int) -> dict[str, Any]:
    """Decode steps under one v, and under one v a row, against an engine that was made before there was an adapter."""
    plain = make_engine(kind, base)
    adapter = attach(base.model, AdapterConfig(num_groups=13), cache_dir=cache_dir(), source=list(base.files) or None)
    try:
        engine = make_engine(kind, base, adapter)
        if kind == "transformers":  # that one runs the model itself, adapter and all
            plain = engine
        generator = torch.Generator().manual_seed(seed)
        shape = (sizes.adapter_rows, adapter.num_groups, adapter.config.u)
        vectors = list((0.05 * torch.randn(shape, generator=generator)).unbind(0))
        result: dict[str, Any] = {"numbers": adapter.num_trained}
        for rows in (sizes.adapter_rows, 1):
            new = (sizes.adapter_new,) * 2
            rollouts = draw_rollouts(base, rows, 1, (8, 8), new, seed)
            ways: dict[str, Callable[[], float]] = {
                "base": lambda r=rollouts: step_seconds(plain, r),
                "one_v": lambda r=rollouts: step_seconds(engine, r, [vectors[0]] * len(r.lengths)),
            }
            if rows > 1:
                ways["v_per_row"] = lambda r=rollouts: step_seconds(engine, r, vectors)
            result[f"batch_{rows}"] = _in_turn(ways, sizes.adapter_rounds * (1 if rows > 1 else 4))
        return result | change_of_v(engine, base, vectors, sizes.changes)
    finally:
        adapter.detach()


def _in_turn(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Median of each way's step, and its overhead over base: the median of the ratios within a round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            seconds = ways[name]()
            if number:  # the first round warms up
                times[name].append(seconds)
    result: dict[str, Any] = {f"{name}_step_ms": round(1e3 * statistics.median(t), 3) for name, t in times.items()}
    for name, taken in times.items():
        if name != "base":
            ratios = [t / b for t, b in zip(taken, times["base"], strict=True)]
            result[f"{name}_overhead_percent"] = round(100 * (statistics.median(ratios) - 1), 1)
    return result


def change_of_v(engine: Any, base: BaseModel, vectors: Sequence[Tensor], changes: int) -> dict[str, float]:
    """Medians in ms: what the engine computes from a v it has not seen (its r x r matrices), and how much longer a call
    with a new v takes than the same call once more."""
    rollouts = draw_rollouts(base, 1, 1, (4, 4), (2, 2), 0)
    # Of the native engine that is one function, inside of a call; the other engine writes v into the model.
    take = engine._runner.matrices if hasattr(engine, "_runner") else lambda v: engine.adapter.write(v[0])
    taken, differences = [], []
    for number in range(changes):
        v = vectors[0] + 0.001 * (number + 1)  # numbers never seen before
        start = time.perf_counter()
        with torch.inference_mode():
            take([v])
        taken.append(time.perf_counter() - start)
        v = vectors[1] + 0.001 * (number + 1)
        new, again = (_call_seconds(engine, requests(rollouts, [v])) for _ in range(2))
        differences.append(new - again)
    return {
        "change_of_v_ms": round(1e3 * statistics.median(taken), 3),
        "call_with_new_v_minus_same_v_ms": round(1e3 * statistics.median(differences), 3),
    }


def _call_seconds(engine: Any, todo: list[Request]) -> float:
    start = time.perf_counter()
    engine.generate(todo)
    return time.perf_counter() - start


def peer_settings(base: BaseModel, seed: int) -> dict[str, Any]:
    """Other ways to call the peer: the fastest of 8 steps after prompts of 32 tokens, and its tokens a second.

    Short prompts, because the prefill is the same for all of them and would take most of the time."""
    model: Any = base.model

    def sample(rows: int, new: int) -> Rollouts:
        return draw_rollouts(base, max(1, rows // GROUP), min(rows, GROUP), (32, 32), (new, new), seed)

    def measured(rows: int, **options: Any) -> dict[str, float]:
        generate(base, sample(min(rows, GROUP), 2), **options)  # warms up
        times: list[float] = []
        generate(base, sample(rows, 9), times, **options)
        step = min(b - a for a, b in itertools.pairwise(times))
        found = {"step_ms": round(1e3 * step, 1), "tokens_per_second": round(rows / step, 1)}
        say(f"  {rows} rows {options or ''} {model.config._attn_implementation}: {found}")
        return found

    before = model.config._attn_implementation
    result: dict[str, Any] = {f"{rows} rows": measured(rows) for rows in (1, 64, 128, 256)}
    result["64 rows, static cache"] = measured(64, cache_implementation="static", disable_compile=True)
    try:
        model.set_attn_implementation("eager")
        result["64 rows, eager attention"] = measured(64)
        model.set_attn_implementation(before)
        try:
            result["8 rows, continuous batching"] = continuous_batching(base, sample(8, 8))
        except Exception as error:  # whatever it says is the finding
            text = " ".join(str(error).split())[:200]
            result["8 rows, continuous batching"] = f"fails: {type(error).__name__}: {text}"
    finally:
        model.set_attn_implementation(before)
    return result


def continuous_batching(base: BaseModel, rollouts: Rollouts, *, plain: bool = True) -> dict[str, float]:
    """transformers' own scheduler with a paged cache; what it needs beside `generate` is its own business."""
    model: Any = base.model
    model.generation_config = GenerationConfig(pad_token_id=base.pad_token_id)
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=rollouts.lengths[0],
        pad_token_id=base.pad_token_id,
    )
    seconds = []
    for _ in range(2):  # the first pass warms up
        start = time.perf_counter()
        with torch.no_grad():  # under inference mode every request fails: its thread writes to tensors made in here
            out = model.generate_batch([list(prompt) for prompt in rollouts.prompts], generation_config=config)
        seconds.append(time.perf_counter() - start)
        made = sum(len(one.generated_tokens) for one in out.values())
        if made != rollouts.kept:
            raise RuntimeError(f"{made} of {rollouts.kept} tokens came back")
    found = {"seconds": round(seconds[-1], 2)}
    return {**found, "generate_seconds": round(generate(base, rollouts), 2)} if plain else found


def batches(engine: Any, base: BaseModel, sizes: Sequence[int], seed: int) -> dict[str, Any]:
    """Tokens a second by rows, of both sides and of transformers' continuous batching, and the share of the bound."""
    result: dict[str, Any] = {}
    for rows in sizes:
        rollouts = draw_rollouts(base, rows, 1, (128, 128), (128, 128), seed)
        time_ours(engine, rollouts)  # records what a GPU replays
        found = compare(engine, base, rollouts, ours_after=False)
        try:
            continuous = continuous_batching(base, rollouts, plain=False)
            found["continuous_tokens_per_second"] = round(rollouts.kept / continuous["seconds"], 1)
        except Exception as error:  # whatever it says is the finding
            found["continuous_tokens_per_second"] = (
                f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            )
        found["roofline"] = roofline(engine, base, rollouts)
        result[str(rows)] = found
        say(f"  {rows} rows: {found}")
    return result


# --- a model ---


def run_model(name: str, arguments: argparse.Namespace, sizes: Sizes, cells: Sequence[str]) -> dict[str, Any]:
    base = load_base_model(name, device=arguments.device, dtype="bfloat16")
    transformers_logging.set_verbosity_error()
    seed, widths = arguments.seed, sizes.prompt_lengths
    result: dict[str, Any] = {"busy_cores": {}}

    def begin(cell: str) -> None:
        others = busy_cores()
        result["busy_cores"][cell] = None if others is None else round(others, 2)
        say(f"{name}: {cell} (others take {'?' if others is None else f'{others:.2f}'} cores)")

    def done(cell: str, found: dict[str, Any]) -> None:
        result[cell] = found
        say(f"  {found}")

    if "batches" in cells:
        begin("batches")
        done("batches", batches(make_engine(arguments.engine, base), base, (1, 64, 256), seed))
    if "peer" in cells:
        begin("peer")
        done("peer", peer_settings(base, seed))
    if any(cell in cells for cell in ("8x8", "32x8", "equal", "chat")):
        engine = make_engine(arguments.engine, base)
        warm = draw_rollouts(base, sizes.prompts, GROUP, widths, (3, 3), seed + 1)
        time_ours(engine, warm)
        generate(base, warm[:GROUP])
        if "8x8" in cells:
            begin("8x8")
            rollouts = draw_rollouts(base, sizes.prompts, GROUP, widths, sizes.lengths, seed)
            done("8x8", compare(engine, base, rollouts, rounds=arguments.rounds))
        if "equal" in cells:
            begin("equal")
            rollouts = draw_rollouts(base, sizes.prompts, GROUP, widths, (sizes.equal, sizes.equal), seed)
            done("equal", compare(engine, base, rollouts, rounds=arguments.rounds, ours_after=False))
            done("roofline", roofline(engine, base, rollouts))
            if arguments.engine == "native":
                done("profile", profile(engine, base, rollouts))
        if "chat" in cells:
            begin("chat")
            rollouts = draw_rollouts(base, 1, 1, (sizes.chat_prompt,) * 2, (sizes.chat_new,) * 2, seed)
            done("chat", compare(engine, base, rollouts, rounds=sizes.chat_rounds))
        if "32x8" in cells:
            begin("32x8")
            rollouts = draw_rollouts(base, sizes.many_prompts, GROUP, widths, sizes.lengths, seed)
            found = compare(
                engine,
                base,
                rollouts,
                ours_after=False,
                peer_rows=arguments.peer_rows or most_peer_rows(base),
                limit=arguments.peer_batches,
            )
            done("32x8", found)
        del engine
    if "adapter" in cells:
        begin("adapter")
        done("adapter", adapter_overhead(arguments.engine, base, sizes, seed))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help="names, folders, .gguf files or hub ids")
    parser.add_argument("--only", default=",".join(CELLS), help=f"cells, of {', '.join((*CELLS, *OTHER_CELLS))}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0 takes the cores really available")
    parser.add_argument("--rounds", type=int, default=1, help="passes of generate in 8x8 and equal")
    parser.add_argument("--peer-rows", type=int, default=0, help="rows that generate takes at once in 32x8")
    parser.add_argument(
        "--peer-batches", type=int, default=1, help="of 32x8, batches that generate is timed on; 0: all"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("native", "transformers"), default="native", help="ours")
    parser.add_argument("--quick", action="store_true", help="small cells, for a look at whether everything runs")
    parser.add_argument(
        "--save",
        action="store_true",
        help="keep the result in bench/results/speed/rollout.json; with --only peer, in rollout_peer.json; on a GPU, "
        "in rollout_cuda.json",
    )
    arguments = parser.parse_args()
    if arguments.quick and arguments.save:
        parser.error("--quick is for a look, its figures are no result; leave --save out")
    cells = [cell.strip() for cell in arguments.only.split(",") if cell.strip()]
    if unknown := [cell for cell in cells if cell not in (*CELLS, *OTHER_CELLS)]:
        parser.error(f"--only knows {', '.join((*CELLS, *OTHER_CELLS))}, not {', '.join(unknown)}")
    threads = arguments.threads or available_threads()
    torch.set_num_threads(threads)
    warn_if_busy(threads, say)

    sizes = QUICK if arguments.quick else Sizes()
    start = time.perf_counter()
    models = {Path(name).stem: run_model(name, arguments, sizes, cells) for name in arguments.models}

    def each(cell: str, key: str) -> dict[str, Any]:
        return {name: found[cell][key] for name, found in models.items() if cell in found}

    result = {
        "speedup_vs_generate": each("8x8", "speedup"),
        "roofline_share": each("roofline", "share"),
        "speedup_refilled": each("32x8", "speedup"),
        "speedup_equal_lengths": each("equal", "speedup"),
        "speedup_batch_1": each("chat", "speedup"),
        "adapter": {name: found["adapter"] for name, found in models.items() if "adapter" in found},
        "batches": {name: found["batches"] for name, found in models.items() if "batches" in found},
        "models": models,
        "settings": {**vars(arguments), "models": list(models), "cells": cells, "sizes": asdict(sizes)},
        "seconds": round(time.perf_counter() - start),
    }
    name = "speed/rollout_peer" if cells == ["peer"] else "speed/rollout"
    finish(name if arguments.device == "cpu" else f"{name}_{arguments.device}", result, arguments.save)


if __name__ == "__main__":
    main()
