"""The evaluation that ends a run: trained numbers against the untrained model and its controls, on held-out items.

The primary measure is declared before anything is trained: greedy decoding, strict score, exact McNemar on the same
test items. Everything else stands beside it so that a reader can see where a gain comes from. Writes result.json
(numbers) and result_items.jsonl (one line an item, from which they can be recomputed).
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinylora.evaluation.lengths import LENGTHS, random_label
from tinylora.evaluation.plain import paired_json, share_json
from tinylora.evaluation.protocol import protocol_of
from tinylora.evaluation.resumable import Partial
from tinylora.evaluation.verdict import MOST_NUMBERS, verdict
from tinylora.rollouts.answers import evaluate
from tinylora.rollouts.prompts import BUDGET_FACTOR, larger_budget, larger_budget_in_words, prompt_candidates
from tinylora.rollouts.replies import ItemResult, correct, mean
from tinylora.rollouts.runtime import Workbench
from tinylora.system.files import write_atomically
from tinylora.talk import Say
from tinylora.tasks.base import Item

PRIMARY = "greedy decoding, strict score, exact McNemar on the same held-out items"


def random_vectors(v: Tensor, count: int, seed: int, lengths: Sequence[float] = (1.0,)) -> Iterator[Tensor]:
    """`count` vectors of uniformly random direction; their norms are `lengths`, taken in turn, times that of v.

    One at a time, as v may be all weights of a model.
    """
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    for index in range(count):
        direction = torch.randn(v.shape, generator=generator)
        yield (direction / direction.norm() * v.norm() * lengths[index % len(lengths)]).to(v.dtype)


def final_evaluation(run: Path, bench: Workbench, v: Tensor, say: Say, seconds_trained: float = 0.0) -> dict[str, Any]:
    """Evaluate v on the first eval.num_test test items, with the controls, and write result.json into the run.

    Killed, it goes on with the conditions that are missing.
    """
    config, task = bench.config, bench.task
    assert task is not None
    items = task.items("test")[: config.eval.num_test]
    validation = task.items("validation")[: config.eval.num_validation]
    budget = config.generation.max_new_tokens
    started = time.perf_counter()
    kept: dict[str, list[ItemResult]] = {}
    sections = ("model", "task", "prompt", "generation", "eval")
    plan = {
        "v": hashlib.sha256(v.contiguous().numpy().tobytes()).hexdigest(),
        "items": [item.id for item in items],
        "config": {name: asdict(getattr(config, name)) for name in sections},
        "seed": config.train.seed,
    }
    partial = Partial(run / "result_items.jsonl.part", plan, say)

    def measure(name: str, v: Tensor | None, what: Sequence[Item] = items, **options: Any) -> list[ItemResult]:
        options = {"max_new_tokens": budget, "chat": config.prompt.chat, "seed": config.train.seed, **options}
        options["stop_strings"] = config.generation.stop_strings

        def answer() -> list[ItemResult]:
            say(f"evaluating {name} on {len(what):,} items")
            return evaluate(bench.engine, bench.base, task, what, v=v, **options)

        return partial.answers(name, answer)

    base = kept["base_greedy"] = measure("the untrained model, greedy", None)
    tuned = kept["tuned_greedy"] = measure(f"{v.numel()} trained numbers, greedy", v)
    temperature = config.generation.temperature
    base_sampled = kept["base_sampled"] = measure(
        f"the untrained model, sampled at {temperature:g}", None, temperature=temperature
    )
    tuned_sampled = kept["tuned_sampled"] = measure(f"trained, sampled at {temperature:g}", v, temperature=temperature)

    # Greedy decoding that has stopped is the same under a larger budget: only the answers cut off are decoded again.
    cut = [i for i, result in enumerate(base) if not result.stopped]
    larger, larger_tokens = list(base), BUDGET_FACTOR * budget
    if cut:
        larger_tokens = larger_budget(bench, [items[i] for i in cut])
        what = larger_budget_in_words(larger_tokens, budget)
        again = measure(f"the untrained model with {what}, where it was cut off", None,
                        [items[i] for i in cut], max_new_tokens=larger_tokens)  # fmt: skip
        for i, result in zip(cut, again, strict=True):
            larger[i] = result
    kept["base_larger_budget"] = larger

    candidates = prompt_candidates(config)
    scores = {
        name: mean(measure(f"prompt {name!r} (untrained, validation)", None, validation, prompt=prompt), "strict")
        for name, prompt in candidates.items()
    }
    best = max(scores, key=lambda name: (scores[name], name == "own"))
    best_results = base if best == "own" else measure(f"best prompt {best!r}, untrained", None, prompt=candidates[best])
    kept["base_best_prompt"] = best_results

    randoms = []
    for index, vector in enumerate(random_vectors(v, config.eval.random_vectors, config.train.seed, LENGTHS)):
        length = LENGTHS[index % len(LENGTHS)]
        kept[f"random_{index}"] = drawn = measure(f"{random_label(index, length)}, greedy", vector)
        randoms.append({"correct": int(correct(drawn).sum()), "total": len(drawn), "length": length})

    report: dict[str, Any] = {
        "trained_numbers": v.numel(),
        "seed": config.train.seed,
        "seconds": seconds_trained + time.perf_counter() - started,
        "seconds_trained": seconds_trained,
        "decoding": PRIMARY,
        "protocol": protocol_of(config, task, items),
        "v": v.flatten().tolist() if v.numel() <= MOST_NUMBERS else None,
        "v_norm": float(v.norm()),
        "primary": paired_json(base, tuned, "strict"),
        "value_only": paired_json(base, tuned, "value_only"),
        "sampled": {**paired_json(base_sampled, tuned_sampled, "strict"), "temperature": temperature},
        "sampled_value_only": paired_json(base_sampled, tuned_sampled, "value_only"),
        "stopped": {"base": mean(base, "stopped"), "tuned": mean(tuned, "stopped")},
        "length": {"base": mean(base, "num_tokens"), "tuned": mean(tuned, "num_tokens")},
        "random": randoms,
        "best_prompt": {
            **share_json(best_results),
            "name": best,
            "validation": scores,
            "against_tuned": paired_json(best_results, tuned, "strict"),
        },
        "larger_budget": {
            **share_json(larger),
            "max_new_tokens": larger_tokens,
            "in_words": larger_budget_in_words(larger_tokens, budget),
            "against_tuned": paired_json(larger, tuned, "strict"),
        },
        "examples": _examples(base, tuned),
        "run": str(run),
    }
    report["verdict"] = verdict(report)
    rows = [{"condition": name, **asdict(record)} for name, results in kept.items() for record in results]
    write_atomically(run / "result_items.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    # Last and atomically: a run that has a result.json has a whole one.
    write_atomically(run / "result.json", (json.dumps(report, indent=2) + "\n").encode())
    partial.remove()
    return report


def _examples(base: Sequence[ItemResult], tuned: Sequence[ItemResult]) -> list[dict[str, str]]:
    """Three answers before and after: the first item won, the first one lost, the first that is neither."""
    changes = {"won": 1, "lost": -1, "unchanged": 0}
    found = []
    for kind, change in changes.items():
        for b, t in zip(base, tuned, strict=True):
            if int(t.strict >= 1) - int(b.strict >= 1) == change:
                found.append(
                    {"kind": kind, "question": b.question, "gold": b.answer, "before": b.text, "after": t.text}
                )
                break
    return found
