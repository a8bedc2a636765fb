"""The evaluation that ends a run: trained numbers against the untrained model and its controls, on held-out items.

The primary measure is declared before anything is trained: greedy decoding, strict score, exact McNemar on the same
test items. Everything else stands beside it so that a reader can see where a gain comes from. Writes result.json
(numbers) and result_items.jsonl (one line an item, from which they can be recomputed). The conditions are those of
`tinylora eval --controls`; in these two files the sides are called base and tuned.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from tinylora.config.run import RunConfig
from tinylora.evaluation.conditions import Conditions
from tinylora.evaluation.lengths import LENGTHS
from tinylora.evaluation.plain import paired_json, share_json
from tinylora.evaluation.protocol import protocol_of
from tinylora.evaluation.resumable import Condition, Store
from tinylora.evaluation.verdict import MOST_NUMBERS, verdict
from tinylora.rollouts.prompts import larger_budget_in_words
from tinylora.rollouts.replies import Reply, correct, mean
from tinylora.rollouts.runtime import Runtime
from tinylora.system.files import write_atomically
from tinylora.system.progress import Bar
from tinylora.talk import Say

PRIMARY = "greedy decoding, strict score, exact McNemar on the same held-out items"
NAMES = {
    "untrained": "base_greedy",
    "tuned": "tuned_greedy",
    "untrained_sampled": "base_sampled",
    "tuned_sampled": "tuned_sampled",
    "larger_budget": "base_larger_budget",
    "best_prompt": "base_best_prompt",
}
"""What conditions are called in result_items.jsonl; random_0, random_1, ... keep their names."""


def final_evaluation(run: Path, runtime: Runtime, v: Tensor, say: Say, seconds_trained: float = 0.0) -> dict[str, Any]:
    """Evaluate v on the first eval.num_test test items, with the controls, and write result.json into the run.

    Killed, it goes on with the conditions that are missing.
    """
    config = runtime.config
    started = time.perf_counter()
    items = runtime.task.items("test")[: config.eval.num_test]
    sections = ("model", "task", "prompt", "generation", "eval")
    plan = {
        "v": hashlib.sha256(v.contiguous().numpy().tobytes()).hexdigest(),
        "items": [item.id for item in items],
        "config": {name: asdict(getattr(config, name)) for name in sections},
        "seed": config.train.seed,
    }
    store = Store.of_result(run, plan, say)
    with Bar("final evaluation", 6 + config.eval.random_vectors, "conditions", timed=False) as bar:
        answers = Conditions(runtime, v, items, store, say, bar)
        conditions = [
            answers.untrained(),
            answers.adapter(),
            *answers.sampled(config.generation.temperature),
            answers.larger_budget(),
            answers.best_prompt(),
            *answers.randoms(config.eval.random_vectors, LENGTHS),
        ]
    report = {
        "trained_numbers": v.numel(),
        "seed": config.train.seed,
        "seconds": seconds_trained + time.perf_counter() - started,
        "seconds_trained": seconds_trained,
        "decoding": PRIMARY,
        "protocol": protocol_of(config, runtime.task, items),
        "v": v.flatten().tolist() if v.numel() <= MOST_NUMBERS else None,
        "v_norm": float(v.norm()),
        **result_view(conditions, config),
        "run": str(run),
    }
    report["verdict"] = verdict(report)
    rows = [{"condition": NAMES.get(one.name, one.name), **reply.row()} for one in conditions for reply in one.replies]
    write_atomically(run / "result_items.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    # Last and atomically: a run that has a result.json has a whole one.
    write_atomically(run / "result.json", (json.dumps(report, indent=2) + "\n").encode())
    store.remove()
    return report


def result_view(conditions: Sequence[Condition], config: RunConfig) -> dict[str, Any]:
    """What result.json says of the conditions; evidence.json is another view of the same."""
    named = {one.name: one for one in conditions}
    untrained, adapter = named["untrained"].replies, named["tuned"].replies
    sampled = named["untrained_sampled"].replies, named["tuned_sampled"].replies
    best, larger = named["best_prompt"], named["larger_budget"]
    budget, larger_tokens = config.generation.max_new_tokens, larger.details["max_new_tokens"]
    randoms = [one for one in conditions if one.kind == "random"]
    return {
        "primary": paired_json(untrained, adapter, "strict"),
        "value_only": paired_json(untrained, adapter, "value_only"),
        "sampled": {**paired_json(*sampled, "strict"), "temperature": config.generation.temperature},
        "sampled_value_only": paired_json(*sampled, "value_only"),
        "stopped": {"base": mean(untrained, "stopped"), "tuned": mean(adapter, "stopped")},
        "length": {"base": mean(untrained, "num_tokens"), "tuned": mean(adapter, "num_tokens")},
        "random": [
            {
                "correct": int(correct(one.replies).sum()),
                "total": len(one.replies),
                "length": LENGTHS[i % len(LENGTHS)],
            }
            for i, one in enumerate(randoms)
        ],
        "best_prompt": {
            **share_json(best.replies),
            "name": best.details["prompt"],
            "validation": best.details["validation"],
            "against_tuned": paired_json(best.replies, adapter, "strict"),
        },
        "larger_budget": {
            **share_json(larger.replies),
            "max_new_tokens": larger_tokens,
            "in_words": larger_budget_in_words(larger_tokens, budget),
            "against_tuned": paired_json(larger.replies, adapter, "strict"),
        },
        "examples": _examples(untrained, adapter),
    }


def _examples(untrained: Sequence[Reply], adapter: Sequence[Reply]) -> list[dict[str, str]]:
    """Three answers before and after: the first item won, the first one lost, the first that is neither."""
    changes = {"won": 1, "lost": -1, "unchanged": 0}
    found = []
    for kind, change in changes.items():
        for b, t in zip(untrained, adapter, strict=True):
            if int(t.strict >= 1) - int(b.strict >= 1) == change:
                found.append(
                    {"kind": kind, "question": b.question, "gold": b.answer, "before": b.text, "after": t.text}
                )
                break
    return found
