"""A run small enough to train within a test: the tiny Llama's folder, and a task over bytes that needs no text at all.

Run as a program it is the test of real kills: see `main`.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tinylora.adapter.config import AdapterConfig
from tinylora.config.run import (
    EvalConfig,
    GenerationConfig,
    GrpoConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from tinylora.store.adapter_file import save_vector
from tinylora.store.own import remember_own
from tinylora.system.jsonl import read_jsonl
from tinylora.tasks.base import Item, Message, Split
from tinylora.tasks.config import TaskConfig
from tinylora.tasks.split import question_id
from tinylora.training.train import TrainResult, resume, train

TIMING = {"seconds", "rollout_seconds", "tokens_per_second", "cpu_seconds", "peak_memory_bytes", "time"}
STEPS = 10


class ByteTask:
    """value_only is the share of characters with an even code, strict whether that is a half or more, one is 1."""

    name = "bytes"

    def __init__(self, size: int = 5, prefix: str = "q") -> None:
        self.size = size
        self.prefix = prefix

    def items(self, split: Split) -> Sequence[Item]:
        texts = [f"{self.prefix}{split[:2]}{i}" for i in range(self.size)]
        return [Item(question_id(text), text, "even") for text in texts]

    def prompt(self, item: Item) -> list[Message]:
        return [{"role": "user", "content": item.question}]

    def parse(self, text: str) -> str | None:
        return text or None

    def score(self, item: Item, text: str) -> dict[str, float]:
        share = sum(ord(character) % 2 == 0 for character in text) / max(1, len(text))
        return {"strict": float(share >= 0.5), "value_only": share, "one": 1.0}

    def fingerprint(self) -> str:
        return f"{self.prefix} {self.size}"


def tiny_config(model: Path | str, **sections: dict[str, Any]) -> RunConfig:
    """A run of 10 steps of 2 prompts x 2 samples x 4 tokens; `sections` replaces fields, e.g. train={"steps": 3}."""
    config = RunConfig(
        model=ModelConfig(name=str(model), device="cpu", dtype="float32"),
        adapter=AdapterConfig(u=2, n_tie=8),
        reward={"value_only": 1.0},
        generation=GenerationConfig(max_new_tokens=4),
        grpo=GrpoConfig(prompts_per_step=2, group_size=2, truncated="keep"),
        optim=OptimConfig(lr=0.05),
        train=TrainConfig(steps=STEPS, num_threads=1, liveness_every=4),
        eval=EvalConfig(every=3, num_validation=2, num_test=0),
        log=LogConfig(samples_per_step=1),
    )
    return replace(config, **{name: replace(getattr(config, name), **fields) for name, fields in sections.items()})


def quiet(text: str) -> None:
    """Talk that nobody listens to."""


def start(model: Path, out: Path, task: Any = None, **sections: dict[str, Any]) -> TrainResult:
    """Train the tiny run."""
    return train(tiny_config(model, **sections), task or ByteTask(), out=out, say=quiet)


def adapter_run(model: Path, folder: Path) -> Path:
    """A run folder with three numbers and the settings of 64 sums from a file, to evaluate and to chat with."""
    file = folder / "sums.jsonl"
    file.write_text("".join(f'{{"question": "{a} + {b}", "answer": "{a + b}"}}\n' for a in range(8) for b in range(8)))
    config = RunConfig(
        model=ModelConfig(name=str(model), device="cpu", dtype="float32"),
        adapter=AdapterConfig(n_tie=8),
        task=TaskConfig(name="jsonl", path=str(file)),
        generation=GenerationConfig(max_new_tokens=6),
        train=TrainConfig(num_threads=1),
    )
    run = folder / "runs" / "demo-001"
    run.mkdir(parents=True)
    save_vector(run / "adapter.safetensors", torch.full((3, 1), 0.3), config)
    remember_own(config, quiet)
    return run


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The run's metrics without what a clock says."""
    rows = read_jsonl(run / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def _attempt(model: Path, out: Path, steps: int) -> None:
    runs = [path.parent for path in sorted(out.glob("*/config.toml"))]
    if runs:
        resume(runs[0], task=ByteTask(), say=quiet)
    else:
        start(model, out, train={"steps": steps})


def _half_written(out: Path, since: float) -> bool:
    """Whether a checkpoint that was begun after that time has not been put in its place."""
    for path in out.glob("*/checkpoint/*.tmp"):
        with suppress(FileNotFoundError):  # it has just been put in its place
            if path.stat().st_mtime > since:
                return True
    return False


def _bytes_of_metrics(out: Path) -> int:
    return sum(path.stat().st_size for path in out.glob("*/metrics.jsonl"))


def _run_to_its_end(
    model: Path, out: Path, steps: int, rng: random.Random, most: int, slowest: float
) -> tuple[int, int]:
    """Kills, `most` at most, and kills that left half a checkpoint."""
    kills = torn = 0
    while True:
        started, done_before = time.time(), _bytes_of_metrics(out)
        child = os.fork()
        if child == 0:
            _attempt(model, out, steps)
            os._exit(0)
        if kills >= most:
            if os.waitpid(child, 0)[1]:
                raise SystemExit("the child failed")
            return kills, torn
        wait_for_write = kills % 3 == 2
        until = time.monotonic() + (20 if wait_for_write else rng.uniform(0, slowest))
        ready = time.monotonic() + rng.uniform(0, slowest)
        done = 0
        while time.monotonic() < until and not done:
            done, status = os.waitpid(child, os.WNOHANG)
            if wait_for_write and time.monotonic() > ready and _half_written(out, started):
                break
            time.sleep(0.0001 if wait_for_write else 0.003)
        if done:
            if status:
                raise SystemExit(f"the child failed with status {status}")
            return kills, torn
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        torn += _half_written(out, started)
        if _bytes_of_metrics(out) == done_before:
            slowest *= 1.5


def main(model: Path, out: Path, steps: int, kills_wanted: int, slowest: float) -> None:
    """Runs, each trained in child processes that are killed (signal 9) again and again until one gets to the end.

    The children are forked, so the imports are paid for once. One attempt in three waits for a checkpoint that is being
    written, and kills in the middle of that; the others are killed within `slowest` seconds. After an attempt that was
    killed before its first step, the next ones may take half as long again: loading takes a time of its own, and on a
    slow machine nobody would ever get beyond it. Another run begins until there were that many kills and two half
    checkpoints, six at most. Prints the number of kills and of those that left half a checkpoint.
    """
    import transformers.models.llama.modeling_llama  # noqa: F401 (else every child imports it)

    kills = torn = 0
    for seed in range(6):
        if kills >= kills_wanted and torn >= 2:
            break
        more, half = _run_to_its_end(
            model, out / str(seed), steps, random.Random(seed), max(3, kills_wanted - kills), slowest
        )
        kills, torn = kills + more, torn + half
    print(kills, torn)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
