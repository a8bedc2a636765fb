"""The evaluation that ends a run: trained numbers against the untrained model and its controls, on held-out items.

The primary measure is declared before anything is trained: greedy decoding, strict score, exact McNemar on the same
test items. Everything else stands beside it so that a reader can see where a gain comes from. Writes result.json
(numbers) and result_items.jsonl (one line an item, from which they can be recomputed).
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.evaluation.lengths import LENGTHS, random_label, randoms_in_words
from tinylora.evaluation.plain import paired_json, share_json
from tinylora.evaluation.resumable import Partial
from tinylora.models.load import encode_prompt
from tinylora.rollouts.answers import ItemResult, correct, evaluate, mean, protocol_of
from tinylora.rollouts.runtime import Say, Workbench
from tinylora.system.files import write_atomically
from tinylora.tasks.base import Item, Message
from tinylora.tasks.prompt import Prompt

BUDGET_FACTOR = 4
MOST_NUMBERS = 4096
"""Trained numbers that are written out in result.json; of more, only the norm."""
PRIMARY = "greedy decoding, strict score, exact McNemar on the same held-out items"


def prompt_candidates(config: RunConfig) -> dict[str, Callable[[Item], list[Message]]]:
    """The run's own prompt and the recipe's alternatives (eval.prompts), by name.

    Raises: UserError for an alternative with an unknown key, without a name, or with the name of another.
    """
    candidates = {"own": Prompt(config.prompt)}
    for number, table in enumerate(config.eval.prompts, 1):
        unknown = set(table) - {"name", "system", "template", "pattern", "few_shot"}
        if unknown or "name" not in table or table.get("few_shot", "yes") not in ("yes", "no"):
            raise UserError(
                f"eval.prompts[{number - 1}] has {sorted(table)}; allowed: name (required), system, template, pattern, "
                "few_shot ('yes' keeps the recipe's examples, 'no' leaves them out)"
            )
        if table["name"] in candidates:
            raise UserError(
                f"eval.prompts[{number - 1}] has the name {table['name']!r}, which another prompt has "
                "('own' is the run's); give each a name of its own"
            )
        candidates[table["name"]] = Prompt(
            replace(
                config.prompt,
                system=table.get("system", config.prompt.system),
                template=table.get("template", config.prompt.template),
                pattern=table.get("pattern", config.prompt.pattern),
                few_shot=config.prompt.few_shot if table.get("few_shot", "yes") == "yes" else (),
            )
        )
    return {name: (lambda item, p=prompt: p.messages(item.question)) for name, prompt in candidates.items()}  # type: ignore[misc]


def random_vectors(v: Tensor, count: int, seed: int, lengths: Sequence[float] = (1.0,)) -> Iterator[Tensor]:
    """`count` vectors of uniformly random direction; their norms are `lengths`, taken in turn, times that of v.

    One at a time, as v may be all weights of a model.
    """
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    for index in range(count):
        direction = torch.randn(v.shape, generator=generator)
        yield (direction / direction.norm() * v.norm() * lengths[index % len(lengths)]).to(v.dtype)


def larger_budget(bench: Workbench, items: Sequence[Item]) -> int:
    """BUDGET_FACTOR times the token budget, or what the engine has memory for with the longest of these prompts."""
    config, task = bench.config, bench.task
    assert task is not None
    prompts = (len(encode_prompt(bench.base, task.prompt(item), config.prompt.chat)) for item in items)
    room = min((bench.engine.room_for_reply(length) for length in prompts), default=0)
    return max(config.generation.max_new_tokens, min(BUDGET_FACTOR * config.generation.max_new_tokens, room))


def larger_budget_in_words(tokens: int, budget: int) -> str:
    """How the larger of two token budgets is called."""
    if tokens == BUDGET_FACTOR * budget:
        return f"{BUDGET_FACTOR} x the token budget"
    return f"{tokens:,} tokens instead of {budget:,} (all that generation.kv_budget_gib holds)"


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


def verdict(result: dict[str, Any]) -> str:
    """What the numbers allow one to say, in plain words."""
    primary, value = result["primary"], result["value_only"]
    low, high = primary["interval"]
    span = (
        f"{100 * primary['difference']:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f}, "
        f"p = {primary['p_value']:.2g})"
    )
    numbers = result["trained_numbers"]
    if primary["p_value"] >= 0.05:
        return (
            f"No gain shown: training {numbers} numbers changed the primary measure by {span}; chance can explain that."
        )
    if primary["difference"] < 0:
        return f"Training {numbers} numbers made the model worse on the primary measure: {span}."
    text = f"Training {numbers} numbers raised the primary measure by {span}."
    if value["p_value"] < 0.05 and value["difference"] > 0:
        text += " The value-only score rises too, so the gain is more than format or stopping."
    else:
        text += (
            " The value-only score does not rise beyond chance: the gain is in format or stopping, not in right values."
        )
    if max((r["correct"] for r in result["random"]), default=-1) >= primary["tuned"]["correct"]:
        text += " A random vector no longer than v does as well: do not credit the training."
    for key, name in (("best_prompt", "the best prompt found"), ("larger_budget", "a larger token budget")):
        against = result[key]["against_tuned"]
        if against["difference"] <= 0 or against["p_value"] >= 0.05:
            text += f" Against the untrained model with {name}, no gain is shown."
    return text


def format_result(result: dict[str, Any]) -> str:
    """The result as the lines that a run prints at its end."""
    share = lambda s: f"{100 * s['correct'] / s['total']:.1f} %"  # noqa: E731
    stopped, best, larger = result["stopped"], result["best_prompt"], result["larger_budget"]
    lines = [
        f"{result['trained_numbers']} trained numbers on {result['primary']['base']['total']:,} distinct held-out "
        f"questions (seed {result['seed']})",
        f"primary measure, declared beforehand: {result['decoding']}",
        "",
        f"  greedy, strict        {result['primary']['text']}",
        f"  greedy, value-only    {result['value_only']['text']}",
        f"  sampled, strict       {result['sampled']['text']}",
        f"  sampled, value-only   {result['sampled_value_only']['text']}",
        f"  stopped in time       {100 * stopped['base']:.1f} -> {100 * stopped['tuned']:.1f} % (mean length "
        f"{result['length']['base']:.1f} -> {result['length']['tuned']:.1f} tokens)",
        f"  untrained, {larger.get('in_words', f'{BUDGET_FACTOR} x the tokens')}   {share(larger)}; "
        f"trained against it: {larger['against_tuned']['text']}",
        f"  untrained, best of {len(best['validation'])} prompts ({best['name']!r}, chosen on validation)   "
        f"{share(best)}; "
        f"trained against it: {best['against_tuned']['text']}",
        f"  random vectors        {randoms_in_words(result['random']) or 'none'}",
        "",
    ]
    for example in result["examples"]:
        lines += [
            f"  {example['kind']}: {example['question']}  (gold {example['gold']})",
            f"    before {example['before']!r}",
            f"    after  {example['after']!r}",
        ]
    lines += [
        "",
        f"the {result['trained_numbers']:,} numbers (norm {result['v_norm']:.3f}): {_numbers(result['v'])}",
        f"run folder: {result['run']}",
        "",
        result["verdict"],
    ]
    if result["primary"]["p_value"] < 0.05 and result["primary"]["difference"] > 0:
        lines.append(
            "Not yet held against the best of many random vectors, which may do as well: "
            f"tinylora eval {result['run']} --controls"
        )
    return "\n".join(lines)


def _numbers(v: list[float] | None) -> str:
    """The first ones; None where there are too many to be written down."""
    if v is None:
        return "in the adapter's file"
    return " ".join(f"{x:+.4f}" for x in v[:64]) + (f" and {len(v) - 64:,} more" if len(v) > 64 else "")
