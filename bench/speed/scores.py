"""What does a whole npg step cost beside a GRPO step: the same replies, sampled once, then learned from in both ways?

Real prompts and replies of a recipe under the untrained model. Sampling, GRPO's update and npg's are timed by turns in
one process, in processor time, so that other work on the machine counts less. `step_ratio` is (sampling + npg) /
(sampling + GRPO); `way` is how scores are computed (tinylora/learner/scores.py). Scores are compared with one backward
pass a reply on the first replies.

    python -m bench.speed.scores [--recipes demo demo-210] [--rounds 3] [--threads 1] [--save]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.common import finish
from tinylora.config.recipe import load_recipe
from tinylora.learner.learner import Learner, Row
from tinylora.learner.scores import cheaper_way, cost, reply_scores
from tinylora.rollouts.groups import sample_step
from tinylora.rollouts.order import DataOrder
from tinylora.rollouts.runtime import open_runtime
from tinylora.training.grpo import grpo_step
from tinylora.training.npg import Npg
from tinylora.training.update import make_optimizer

CHECKED = 8
"""Replies whose scores are compared with a backward pass of their own."""


def seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    found = work()
    return found, time.process_time() - started


def one_recipe(name: str, rounds: int, threads: int, dtype: str) -> dict[str, Any]:
    settings = [f"train.num_threads={threads}", f"model.dtype={dtype}"]
    config = load_recipe(name, settings)
    runtime = open_runtime(config, task=True, say=print)
    config = runtime.config
    learner = Learner(
        runtime.base.model, runtime.adapter, temperature=config.generation.temperature,
        pad_token_id=runtime.base.pad_token_id,
    )  # fmt: skip
    v = runtime.adapter.zeros().requires_grad_(True)
    algorithm = Npg(runtime, learner, v)
    order = DataOrder(runtime.task.items("train"), 0)
    times: dict[str, list[float]] = {"sampling": [], "grpo": [], "npg": []}
    for turn in range(rounds + 1):
        rollouts, sampling = seconds(partial(sample_step, runtime, order, v.detach().clone()))
        optimizer = make_optimizer(v, config)
        _, grpo = seconds(partial(grpo_step, learner, rollouts.groups, v, optimizer, config, turn))
        with torch.no_grad():
            v.zero_()
        _, npg = seconds(partial(algorithm.learn, rollouts.groups, turn))
        with torch.no_grad():
            v.zero_()
        if turn:  # the first warms up
            for key, value in zip(times, (sampling, grpo, npg), strict=True):
                times[key].append(value)
    rows = [
        Row(index, group.prompt_ids, reply.token_ids)
        for index, group in enumerate(rollouts.groups)
        for reply in group.replies
    ]
    middle = {key: round(statistics.median(values), 3) for key, values in times.items()}
    ratios = [(s + n) / (s + g) for s, g, n in zip(*times.values(), strict=True)]
    return {
        "numbers": v.numel(),
        "replies": len(rows),
        "way": cheaper_way(rows, v.numel(), learner.packed is not None),
        "tokens": {way: cost(rows, v.numel(), way) for way in ("apart", "tangents")},
        "cpu_seconds": middle,
        "step_ratio": round(statistics.median(ratios), 3),
        "step_ratios": [round(ratio, 3) for ratio in ratios],
        "largest_relative_error": largest_error(learner, rows[:CHECKED], v),
    }


def largest_error(learner: Learner, rows: list[Row], v: torch.Tensor) -> float:
    """Of scores against one backward pass a reply, over the largest score."""
    found = reply_scores(learner, rows, v).scores
    alone = torch.stack([torch.autograd.grad(learner.logprobs([row], v)[0].sum(), v)[0] for row in rows])
    return float((found - alone).abs().max() / alone.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["demo", "demo-210"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results/speed/scores.json")
    args = parser.parse_args()
    result = {name: one_recipe(name, args.rounds, args.threads, args.dtype) for name in args.recipes}
    finish("speed/scores", {"dtype": args.dtype, **result}, args.save)


if __name__ == "__main__":
    main()
