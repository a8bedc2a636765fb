"""What each method costs: trained numbers, bytes of its file, memory, seconds a step; and what was said before.

A step of demo-tiled (12 prompts x 8 completions of SmolLM2-135M) with every method, at its own settings otherwise.
Each measurement is a process of its own (peak memory is a process's), methods in turn, several rounds; the first step
of each is not counted. `said` is what `tinylora train --dry-run` says, taken on the same machine at the same load. Its
time is an upper bound: replies that fill their budget, and every group worth learning from. The measured speed that it
rests on is held against what happened by the tokens that were really sampled and learned from.

    python -m bench.speed.methods [--rounds 2] [--steps 3] [--threads 2] [--dtype auto] [--only "lora;full"] [--save]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.common import ROOT, finish

CASES: dict[str, list[str]] = {
    "tinylora, 13 numbers": [],
    "lora-xs, rank 8": ["method.name=lora-xs", "method.rank=8"],
    "lora, rank 1": ["method.name=lora", "method.rank=1"],
    "lora, rank 32": ["method.name=lora", "method.rank=32"],
    "vera, rank 64": ["method.name=vera", "method.rank=64"],
    "dora, rank 8": ["method.name=dora", "method.rank=8"],
    "ia3": ["method.name=ia3"],
    "adapter layers, width 16": ["method.name=adapter", "method.rank=16"],
    "full": ["method.name=full"],
}


def settings(case: str, threads: int, dtype: str) -> list[str]:
    return [*CASES[case], f"train.num_threads={threads}", f"model.dtype={dtype}", "optim.lr=0.0001"]


def measure(case: str, threads: int, dtype: str, steps: int) -> dict[str, Any]:
    """In this process: some steps after one that is not counted, and the file that they leave."""
    from tinylora.config.recipe import load_recipe
    from tinylora.learner.learner import Learner
    from tinylora.rollouts.groups import sample_step
    from tinylora.rollouts.order import DataOrder
    from tinylora.rollouts.runtime import open_runtime
    from tinylora.store.adapter_file import save_vector
    from tinylora.system.memory import peak_memory
    from tinylora.training.grpo import grpo_step
    from tinylora.training.update import make_optimizer

    runtime = open_runtime(load_recipe("demo-tiled", settings(case, threads, dtype)), say=lambda text: None)
    config = runtime.config
    v = runtime.adapter.zeros().requires_grad_()
    optimizer = make_optimizer(v, config)
    learner = Learner(runtime.base.model, runtime.adapter, temperature=config.generation.temperature,
                      pad_token_id=runtime.base.pad_token_id)  # fmt: skip
    order = DataOrder(runtime.task.items("train"), 0)
    sampling, whole, lengths, prompts, learned = [], [], [], [], []
    for step in range(steps + 1):
        started = time.perf_counter()
        rollouts = sample_step(runtime, order, v.detach().clone())
        sampled = time.perf_counter()
        metrics = grpo_step(learner, rollouts.groups, v, optimizer, config, step)
        if step:
            uneven = [g for g in rollouts.groups if g.has_variance]
            prompts.append(together([g.prompt_ids for g in rollouts.sampled]))
            learned.append(metrics["tokens_computed"] + together([g.prompt_ids for g in uneven]))
            sampling.append(sampled - started)
            whole.append(time.perf_counter() - started)
            lengths.append(rollouts.tokens_sampled / (config.grpo.prompts_per_step * config.grpo.group_size))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        save_vector(file, v.detach(), config, {})
        num_bytes = file.stat().st_size
    return {
        "trained_numbers": runtime.adapter.num_trained,
        "file_bytes": num_bytes,
        "peak_memory_bytes": peak_memory(runtime.base.device),
        "seconds_a_step": whole,
        "sampling_seconds": sampling,
        "length": statistics.mean(lengths),
        "prompt_tokens": statistics.mean(prompts),
        "sampled_tokens": statistics.mean(lengths) * config.grpo.prompts_per_step * config.grpo.group_size,
        "learned_tokens": statistics.mean(learned),
        "engine": runtime.engine.name,
        "dtype": config.model.dtype,
        "micro_batch_tokens": config.train.micro_batch_tokens,
    }


def together(prompts: list[tuple[int, ...]]) -> int:
    """Tokens of prompts computed in one batch, what they all begin with once."""
    from tinylora.models.prefill import common_prefix_length

    shared = common_prefix_length(prompts) if len(prompts) > 1 else 0
    return shared + sum(len(prompt) - shared for prompt in prompts)


def say_before(case: str, threads: int, dtype: str, prompt: float, sampled: float, learned: float) -> dict[str, Any]:
    """In this process: what --dry-run says, and what its speeds make of the given tokens of a step."""
    from tinylora.config.recipe import load_recipe
    from tinylora.planning.inspection import inspect_shapes

    found, speed, plan = inspect_shapes(load_recipe("demo-tiled", settings(case, threads, dtype)), lambda text: None)
    reading = prompt / speed.forward_tokens_per_second
    learning = learned / speed.learner_tokens_per_second
    return {
        "trained_numbers": found.num_trained,
        "file_bytes": found.file_bytes,
        "memory_bytes": found.memory.total,
        "seconds_a_step": plan.step_seconds,
        "seconds_a_step_at_half": plan.step_seconds_at_half,
        "seconds_of_those_tokens": reading + sampled / speed.decode_tokens_per_second + learning + speed.vector_seconds,
    }


def child(*words: str, threads: int) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench.speed.methods", *words, "--threads", str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--only", default="", help="cases that begin so, separated by semicolons")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    parser.add_argument("--say", nargs=4, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.threads, args.dtype, args.steps)))
        return
    if args.say:
        print(json.dumps(say_before(args.say[0], args.threads, args.dtype, *map(float, args.say[1:]))))
        return
    cases = [case for case in CASES if not args.only or case.startswith(tuple(args.only.split(";")))]
    rounds: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    common = ["--steps", str(args.steps), "--dtype", args.dtype]
    for _ in range(args.rounds):
        for case in cases:
            rounds[case].append(child("--measure", case, *common, threads=args.threads))
            print(case, rounds[case][-1], file=sys.stderr, flush=True)
    table = {}
    for case, found in rounds.items():
        mean = {key: statistics.mean(one[key] for one in found)
                for key in ("length", "prompt_tokens", "sampled_tokens", "learned_tokens")}  # fmt: skip
        tokens = [str(value) for key, value in mean.items() if key != "length"]
        said = child("--say", case, *tokens, *common, threads=args.threads)
        took = statistics.median(second for one in found for second in one["seconds_a_step"])
        peak = max(one["peak_memory_bytes"] for one in found)
        table[case] = {
            **{
                key: found[0][key] for key in ("trained_numbers", "file_bytes", "engine", "dtype", "micro_batch_tokens")
            },
            "peak_memory_mib": round(peak / 2**20),
            "seconds_a_step": round(took, 2),
            "sampling_seconds": round(statistics.median(s for one in found for s in one["sampling_seconds"]), 2),
            **{key: round(value, 2) for key, value in mean.items()},
            "said": said,
            "memory_said_over_seen": round(said["memory_bytes"] / peak, 2),
            "seconds_said_over_seen": round(said["seconds_of_those_tokens"] / took, 2),
            "at_most_over_seen": round(said["seconds_a_step"] / took, 2),
            "at_half_over_seen": round(said["seconds_a_step_at_half"] / took, 2),
        }
        print(case, table[case], file=sys.stderr, flush=True)
    finish("speed/methods", {"rounds": args.rounds, "steps": args.steps, "methods": table}, args.save)


if __name__ == "__main__":
    main()
