"""How much faster is a whole GRPO step than TRL's, and in how much less memory?

A step is everything between two updates of the 13 numbers: rollout, log-probs, loss, gradient, Adam. The peer is TRL's
GRPOTrainer with PEFT's TinyLoRA, at the best settings found (peers/README.md lists those tried), in peers/trl_step.py.
Each side runs in a process of its own, one at a time, ours and the peer in turn; a process loads the model, does one
step that is not counted (with it whatever is computed once: caches, packed weights) and then those that are. Threads,
dtype, prompts, group size and temperature are equal, and so are the completions' lengths: they are drawn once with a
seed, and both sides end every completion at its length. The rewards are random, so every group has variance and every
row is trained on.

    chain_sum   8 prompts of the demo's recipe x 8 completions; lengths uniform in 8..38, mean 23 tokens
                (--lengths natural: median 17, mean 23, a tail up to 64)
    gsm8k       4 prompts of 100 to 150 random tokens x 8 completions; lengths uniform in 128..350, mean 239

memory_ratio is ours to the peer's peak resident memory during the counted steps (loaded libraries included). The
fastest settings are not the leanest: memory_ratio_as_it_comes compares with the library's own (gradient checkpointing).
cpu_seconds_ratio is the peer's CPU time to ours: less moved by other processes than the speed-up, which is wall time.

    python -m bench.speed.grpo_step --model FILE_OR_FOLDER [--rounds 3] [--steps 1] [--task gsm8k] [--quick] [--save]
"""

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import ROOT, finish, load, unscored_group
from bench.peers import PeakMemory
from tinylora.adapter.config import AdapterConfig
from tinylora.config.recipe import load_recipe
from tinylora.config.run import GenerationConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from tinylora.generation.types import Completion, Request, SamplingParams
from tinylora.learner.learner import Learner
from tinylora.models.load import encode_prompt, load_base_model
from tinylora.rollouts.groups import Group
from tinylora.rollouts.runtime import open_runtime
from tinylora.system.cores import available_threads
from tinylora.tasks.build import build_task
from tinylora.training.grpo import grpo_step
from tinylora.training.update import make_optimizer

PACKAGES = ("torch", "numpy", "transformers", "peft", "trl", "accelerate")
NUMBERS = 13
PEER_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""glibc keeps freed memory instead of giving it back and faulting it in again: a sixth off the peer's step."""
TEMPERATURE = 1.0
LR = 0.004


def draw_lengths(kind: str, prompts: int, group_size: int) -> list[list[int]]:
    """Tokens of every completion, from a fixed seed."""
    rng = np.random.default_rng(0)
    shape = (prompts, group_size)
    if kind == "natural":
        # A few tokens for most, a long tail for some: log-normal, cut at the default budget of 64.
        drawn = np.clip(np.rint(rng.lognormal(2.8, 0.85, shape)), 4, 64).astype(int)
    elif kind == "long":
        drawn = rng.integers(128, 351, shape)
    else:
        drawn = rng.integers(8, 39, shape)
    return drawn.tolist()


def make_job(arguments: argparse.Namespace) -> dict[str, Any]:
    """What both sides do, as plain data."""
    base = load_base_model(arguments.model, device="cpu", dtype="bfloat16")
    if arguments.task == "gsm8k":
        rng = np.random.default_rng(0)
        low, high = 100, min(40_000, len(base.tokenizer) - 100)
        prompts = [rng.integers(low, high, int(rng.integers(100, 151))).tolist() for _ in range(4)]
        kind = "long"
    else:
        config = load_recipe("demo")
        task = build_task(config.task, config.prompt)
        items = task.items("train")[:8]
        prompts = [list(encode_prompt(base, task.prompt(item), config.prompt.chat)) for item in items]
        kind = arguments.lengths
    group_size = 8
    if arguments.quick:
        prompts = prompts[:2]
    return {
        "model": arguments.model,
        "folder": str(base.files[0].parent),
        "prompts": prompts,
        "lengths": draw_lengths(kind, len(prompts), group_size),
        "group_size": group_size,
        "temperature": TEMPERATURE,
        "lr": LR,
        "numbers": NUMBERS,
        "seed": 0,
        "threads": arguments.threads,
        "warmup": 1,
        "steps": arguments.steps,
    }


class ForcedLengths:
    """`should_stop` of one request: of the rows that reach n tokens, as many stop as the job has of that length.

    Which of a prompt's samples stops does not matter, so the lengths of the group come out exactly, in whatever order
    an engine asks, as long as it asks once a row and token.
    """

    def __init__(self, lengths: list[int]) -> None:
        self.due = Counter(lengths)

    def __call__(self, token_ids: list[int]) -> bool:
        if not self.due[len(token_ids)]:
            return False
        self.due[len(token_ids)] -= 1
        return True


class Ours:
    """Our side of the job: the engine and the learner as training uses them."""

    def __init__(self, job: dict[str, Any], backend: str) -> None:
        self.job = job
        longest = max(max(lengths) for lengths in job["lengths"])
        runtime = open_runtime(
            RunConfig(
                model=ModelConfig(name=job["model"], device="cpu", dtype="bfloat16"),
                adapter=AdapterConfig(rank=2, u=1, num_groups=job["numbers"]),
                generation=GenerationConfig(
                    backend=backend,  # type: ignore[arg-type]
                    temperature=job["temperature"],
                    max_new_tokens=longest,
                ),
                optim=OptimConfig(lr=job["lr"]),
                train=TrainConfig(num_threads=job["threads"]),
            ),
            task=False,
        )
        if runtime.engine.name != backend:
            raise SystemExit(f"the {backend} engine does not serve this model; give --backend {runtime.engine.name}")
        self.config, self.engine = runtime.config, runtime.engine
        self.params = SamplingParams(temperature=job["temperature"], max_new_tokens=longest, seed=job["seed"])
        self.learner = Learner(
            runtime.base.model, runtime.adapter, temperature=job["temperature"], pad_token_id=runtime.base.pad_token_id
        )
        self.rewards = random.Random(job["seed"])
        self.v = runtime.adapter.zeros().requires_grad_()
        self.optimizer = make_optimizer(self.v, self.config)
        self.step_number = 0
        self.forward_seconds = 0.0
        logprobs = self.learner.logprobs

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            found = logprobs(*args, **kwargs)
            self.forward_seconds += time.perf_counter() - started
            return found

        self.learner.logprobs = timed  # type: ignore[method-assign]

    def rollout(self) -> list[Group]:
        requests = [
            Request(
                prompt_ids=tuple(prompt),
                params=self.params,
                num_samples=self.job["group_size"],
                key=self.step_number * len(self.job["prompts"]) + index,
                v=self.v.detach(),
                should_stop=ForcedLengths(lengths),
            )
            for index, (prompt, lengths) in enumerate(zip(self.job["prompts"], self.job["lengths"], strict=True))
        ]
        by_request: list[list[Completion]] = [[] for _ in requests]
        for completion in self.engine.generate(requests):
            by_request[completion.request_index].append(completion)
        return [
            unscored_group(request.prompt_ids, completions, [self.rewards.random() for _ in completions])
            for request, completions in zip(requests, by_request, strict=True)
        ]

    def step(self) -> dict[str, float]:
        """One step; its seconds (the backward pass is what the update takes beside the forward pass) and tokens."""
        self.forward_seconds = 0.0
        started, cpu = time.perf_counter(), time.process_time()
        groups = self.rollout()
        sampled = time.perf_counter()
        metrics = grpo_step(self.learner, groups, self.v, self.optimizer, self.config, self.step_number)
        ended, cpu = time.perf_counter(), time.process_time() - cpu
        self.step_number += 1
        for group, lengths in zip(groups, self.job["lengths"], strict=True):
            drawn = sorted(len(reply.token_ids) for reply in group.replies)
            if drawn != sorted(lengths):
                raise SystemExit(f"the lengths are not the job's: {drawn} for {sorted(lengths)}")
        tokens = sum(map(sum, self.job["lengths"]))
        if metrics["tokens_computed"] != tokens:
            raise SystemExit(f"{metrics['tokens_computed']} of {tokens} tokens were trained on")
        return {
            "seconds": ended - started,
            "cpu_seconds": cpu,
            "rollout": sampled - started,
            "forward": self.forward_seconds,
            "backward": ended - sampled - self.forward_seconds,
            "tokens": tokens,
        }


def profile_of(step: Callable[[], Any]) -> dict[str, Any]:
    """Where one step's CPU time goes: milliseconds of torch's operators by name, C kernels of the engine apart."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        found = step()
    operators = sorted(profiler.key_averages(), key=lambda one: -one.self_cpu_time_total)
    top = {one.key: [round(one.self_cpu_time_total / 1e3, 1), one.count] for one in operators[:14]}
    return {"step": found, "operators_ms_and_calls": top}


def run_ours(job: dict[str, Any], backend: str, profile: bool = False) -> dict[str, Any]:
    """The child process of our side."""
    ours, memory, steps = Ours(job, backend), PeakMemory(), []
    for number in range(job["warmup"] + job["steps"]):
        gc.collect()
        memory.restart()
        step = ours.step() | {"peak_mb": memory.peak_mb()}
        print(f"  ours: step {number + 1}: {step['seconds']:.2f} s", file=sys.stderr, flush=True)
        steps.append(step)
    if not bool((ours.v != 0).all()):
        raise SystemExit("our steps have not moved v")
    return {
        "steps": steps[job["warmup"] :],
        "numbers": ours.v.numel(),
        "dtype_v": str(ours.v.dtype),
        "process_peak_mb": memory.process_peak_mb(),
        "threads": torch.get_num_threads(),
        "profile": profile_of(ours.step) if profile else None,
    }


def environment(threads: int, more: dict[str, str]) -> dict[str, str]:
    """The same for both sides, but for `more`."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "1000",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        **more,
    }


def run_child(command: list[str], threads: int, limit_seconds: float, more: dict[str, str]) -> dict[str, Any]:
    """Run one side to its end; what it says on the way goes to stderr, its last line is the result."""
    with tempfile.TemporaryFile("w+") as said:
        try:
            done = subprocess.run(
                command,
                env=environment(threads, more),
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                timeout=limit_seconds,
            )
        except subprocess.TimeoutExpired:
            raise SystemExit(f"took longer than {limit_seconds:.0f} s: {' '.join(command)}") from None
        said.seek(0)
        lines = said.read().splitlines()
    for line in lines:
        if ": step " in line:
            print(line, file=sys.stderr)
    if done.returncode:
        print("\n".join(lines[-30:]), file=sys.stderr)
        raise SystemExit(f"failed with {done.returncode}: {' '.join(command)}")
    return json.loads(done.stdout.splitlines()[-1])


def median_of(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.median(step[key] for run in runs for step in run["steps"])


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all counted steps of one side."""
    seconds = median_of(runs, "seconds")
    return {
        "step_seconds": round(seconds, 3),
        "all_step_seconds": [round(step["seconds"], 2) for run in runs for step in run["steps"]],
        "cpu_seconds": round(median_of(runs, "cpu_seconds"), 2),
        "rollout_seconds": round(median_of(runs, "rollout"), 3),
        "forward_seconds": round(median_of(runs, "forward"), 3),
        "backward_seconds": round(median_of(runs, "backward"), 3),
        "kept_tokens": int(median_of(runs, "tokens")),
        "kept_tokens_per_second": round(median_of(runs, "tokens") / seconds, 1),
        "peak_mb": round(median_of(runs, "peak_mb"), 1),
        "process_peak_mb": round(statistics.median(run["process_peak_mb"] for run in runs), 1),
        "trained_numbers": runs[0]["numbers"],
        "dtype_v": runs[0]["dtype_v"],
    }


def find_peer_python(given: str) -> str:
    """The peer's interpreter: the one given, that of `make bench-setup`, or this one."""
    candidates = [given] if given else [str(ROOT / ".venv-bench" / "bin" / "python"), sys.executable]
    for python in candidates:
        found = (
            subprocess.run(
                [
                    python,
                    "-c",
                    "import importlib.util as u, sys; sys.exit(not (u.find_spec('trl') and u.find_spec('peft')))",
                ],
                capture_output=True,
            )
            if Path(python).exists()
            else None
        )
        if found is not None and found.returncode == 0:
            return python
    raise SystemExit(f"no trl and peft in {' or '.join(candidates)}; run make bench-setup, or give --peer-python")


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    job = make_job(arguments)
    gc.collect()
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    peer_python = find_peer_python(arguments.peer_python)
    ours_command = [sys.executable, "-m", "bench.speed.grpo_step", "--child", str(path), "--backend", arguments.backend]
    peer_command = [peer_python, "-m", "bench.peers.trl_step", str(path)]
    peer_settings = [part for setting in arguments.peer_set for part in ("--set", setting)]
    commands: dict[str, tuple[list[str], dict[str, str]]] = {
        "ours": (ours_command, {}),
        "peer": ([*peer_command, *peer_settings], PEER_ENVIRONMENT),
    }
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    loads = []
    for number in range(arguments.rounds):
        for side in ("ours", "peer") if number % 2 == 0 else ("peer", "ours"):
            command, more = commands[side]
            loads.append(load()[:1])
            print(f"round {number + 1}, {side} (load {loads[-1]})", file=sys.stderr, flush=True)
            runs[side].append(run_child(command, arguments.threads, arguments.limit_seconds, more))
    speedups = [
        statistics.median(s["seconds"] for s in peer["steps"]) / statistics.median(s["seconds"] for s in ours["steps"])
        for ours, peer in zip(runs["ours"], runs["peer"], strict=True)
    ]
    ours, peer = summary(runs["ours"]), summary(runs["peer"])
    if ours["kept_tokens"] != peer["kept_tokens"] or ours["trained_numbers"] != peer["trained_numbers"]:
        raise SystemExit(f"the two sides did not do the same work: {ours} and {peer}")
    lengths = [length for group in job["lengths"] for length in group]
    result: dict[str, Any] = {
        "speedup_vs_trl": round(statistics.median(speedups), 2),
        "memory_ratio": round(ours["peak_mb"] / peer["peak_mb"], 3),
        "speedups_by_round": [round(s, 2) for s in speedups],
        "cpu_seconds_ratio": round(peer["cpu_seconds"] / ours["cpu_seconds"], 2),
        "model": Path(arguments.model).name,
        "task": arguments.task,
        "setting": {
            "prompts": len(job["prompts"]),
            "prompt_tokens": [len(prompt) for prompt in job["prompts"]],
            "group_size": job["group_size"],
            "lengths": "uniform 128..350" if arguments.task == "gsm8k" else arguments.lengths,
            "mean_length": round(statistics.mean(lengths), 1),
            "max_length": max(lengths),
            "temperature": job["temperature"],
            "dtype": "bfloat16",
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "steps": arguments.steps,
            "quick": arguments.quick,
        },
        "backend": arguments.backend,
        "ours": ours,
        "peer": peer | {"settings": runs["peer"][0]["settings"], "environment": PEER_ENVIRONMENT},
        "load_by_run": [one[0] for one in loads if one],
    }
    result["profile_of_ours"] = run_child([*ours_command, "--profile"], arguments.threads, arguments.limit_seconds, {})[
        "profile"
    ]
    if arguments.as_it_comes:
        print("the peer as it comes, once", file=sys.stderr, flush=True)
        run = run_child([*peer_command, "--as-it-comes"], arguments.threads, arguments.limit_seconds, {})
        plain = summary([run])
        result["speedup_vs_trl_as_it_comes"] = round(plain["step_seconds"] / ours["step_seconds"], 2)
        result["memory_ratio_as_it_comes"] = round(ours["peak_mb"] / plain["peak_mb"], 3)
        result["peer_as_it_comes"] = plain | {"settings": run["settings"]}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, folder or .gguf file")
    parser.add_argument("--task", choices=("chain_sum", "gsm8k"), default="chain_sum")
    parser.add_argument("--lengths", choices=("uniform", "natural"), default="uniform", help="of chain_sum")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--steps", type=int, default=1, help="counted steps a process")
    parser.add_argument("--backend", choices=("native", "transformers"), default="native", help="our engine")
    parser.add_argument("--threads", type=int, default=0, help="of both sides; 0: the cores there are")
    parser.add_argument("--quick", action="store_true", help="2 prompts, 1 round, 1 step: does it run at all?")
    parser.add_argument(
        "--as-it-comes",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also run the peer at the library's own settings, once",
    )
    parser.add_argument("--peer-python", default="", help="interpreter with trl and peft; default .venv-bench, or this")
    parser.add_argument("--peer-set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the peer")
    parser.add_argument("--limit-seconds", type=float, default=1800, help="for one process")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results/speed/")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        job = json.loads(Path(arguments.child).read_text())
        print(json.dumps(run_ours(job, arguments.backend, arguments.profile)))
        return
    arguments.threads = arguments.threads or available_threads()
    if arguments.quick:
        arguments.rounds, arguments.steps = 1, 1
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(arguments, Path(folder))
    name = "speed/grpo_step" if arguments.task == "chain_sum" else f"speed/grpo_step_{arguments.task}"
    finish(name, result, arguments.save and not arguments.quick, PACKAGES)


if __name__ == "__main__":
    main()
