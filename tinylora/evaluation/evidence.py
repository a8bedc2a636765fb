"""`tinylora eval RUN --controls`: everything a sceptic would ask for, on the same items, in evidence.json.

The primary measure is that of the run: greedy, strict, exact McNemar against the untrained model under the same prompt.
The controls are read together, so their p values are adjusted (Benjamini-Hochberg), and so are those of other tasks.
Per-item answers are in evidence_items.jsonl, from which every number here can be computed again.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tinylora.adapter.attach import linear_shapes
from tinylora.errors import UserError
from tinylora.evaluation.account import (
    Account,
    Prices,
    completions_sampled,
    gain_curve,
    linear_parameters,
    priced,
    training_account,
)
from tinylora.evaluation.conditions import Conditions
from tinylora.evaluation.plain import paired_json, share_json
from tinylora.evaluation.protocol import protocol_of
from tinylora.evaluation.resumable import EVIDENCE_FILE, Condition, Store
from tinylora.evaluation.settings import check_held_out, settings_for_eval
from tinylora.evaluation.side_effects import neutral_text, text_effect
from tinylora.evaluation.statistics.power import adjusted_p_values, smallest_json
from tinylora.evaluation.statistics.scores import repetition
from tinylora.evaluation.statistics.split_gain import split_gain
from tinylora.evaluation.verdict import MOST_NUMBERS, evidence_verdict
from tinylora.models.template import with_fixed_date
from tinylora.rollouts.check import check_items
from tinylora.rollouts.prompts import prompt_candidates
from tinylora.rollouts.replies import Reply, mean
from tinylora.rollouts.runtime import Runtime
from tinylora.store.adapter import Adapter
from tinylora.system.files import write_atomically
from tinylora.system.jsonl import read_jsonl
from tinylora.system.progress import Bar
from tinylora.talk import Say
from tinylora.tasks.base import Item
from tinylora.tasks.build import build_task, say_what_runs

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceOptions:
    """What is asked for beyond the conditions that are always there."""

    num_items: int = 0
    """Test items; 0 takes the config's eval.num_test, or all."""
    random_vectors: int = 5
    also: tuple[str, ...] = ()
    """Other tasks or recipes, answered before and after: what was forgotten."""
    also_items: int = 200
    """Test items of each of them, at most."""
    trained: tuple[Adapter, ...] = ()
    """Adapters trained on a control reward."""
    text: str = ""
    """Neutral text for KL and perplexity."""
    prices: Prices = field(default_factory=Prices)

    def __post_init__(self) -> None:
        if self.random_vectors < 5:
            raise UserError(f"--random must be at least 5 vectors, got {self.random_vectors}")
        if self.also_items < 1 or self.num_items < 0:
            raise UserError(f"item counts must be at least 1, got {self.also_items} and {self.num_items}")


def gather_evidence(
    runtime: Runtime, adapter: Adapter, folder: Path, options: EvidenceOptions, say: Say, run: Path | None = None
) -> dict[str, Any]:
    """Answer all conditions and write evidence.json into `folder`, which is a run's or any other.

    run: the folder of the training, whose metrics.jsonl tells how many completions it drew; None: that is not known.
    Raises: UserError for a task without test or validation items, control adapters of another shape, basis or base,
    other tasks that cannot be asked, a failing scorer.
    """
    config, task, v = runtime.config, runtime.task, adapter.v
    every = task.items("test")
    items = every[: options.num_items or config.eval.num_test or len(every)]
    if candidates := list(prompt_candidates(config).values())[1:]:  # asked late, so looked at now
        validation = task.items("validation")[: config.eval.num_validation]
        check_items(runtime, "validation", validation, [None, *candidates])
        check_items(runtime, "test", items, candidates)
    controls = _named(options.trained)
    for control in controls.values():
        check_control(adapter, control)
    also = {name: _asked(runtime, adapter, name, options.also_items, say) for name in options.also}
    metrics = read_jsonl(run / "metrics.jsonl") if run is not None else []
    allowed = completions_sampled(metrics, config.grpo.group_size)
    plan = {
        "v": _identity(v),
        "items": [item.id for item in items],
        "config": {name: asdict(getattr(config, name)) for name in ("model", "task", "prompt", "generation", "eval")},
        "seed": config.train.seed,
        "completions": allowed,
        "controls": {},  # each is told apart by its own numbers, so that one more does not undo the others
    }
    store = Store.of_evidence(folder, plan, say)
    has_prompts = len(prompt_candidates(config)) > 1
    total = 5 + options.random_vectors + 2 * bool(allowed) + has_prompts + len(controls)
    with Bar("controls", total, "conditions", timed=False) as bar:
        answers = Conditions(runtime, v, items, store, say, bar)
        conditions = [answers.untrained(), answers.adapter(), answers.zero(), *answers.randoms(options.random_vectors)]
        if allowed:
            conditions += [answers.best_random(allowed), answers.best_shorter(allowed)]
        else:
            say(
                "how many completions training sampled is not known (no metrics.jsonl), so there is no best of N "
                "vectors"
            )
        if has_prompts:
            conditions.append(answers.best_prompt())
        else:
            say(
                "the recipe names no other prompts (eval.prompts), so the best of several prompts is not among the "
                "controls"
            )
        conditions += [answers.larger_budget(), answers.constant()]
        conditions += [
            answers.trained_control(name, control.v, _control_label(control)) for name, control in controls.items()
        ]
    side = _side_effects(runtime, adapter, conditions, options, also, say)
    parameters = linear_parameters(linear_shapes(runtime.base.model))
    evidence = assemble(
        conditions,
        meta={
            "run": str(run or folder),
            "model": config.model.name,
            "task": task.name,
            "num_items": len(items),
            "protocol": protocol_of(config, task, items),
            "decoding": {
                "max_new_tokens": config.generation.max_new_tokens, "temperature": 0.0, "seed": config.train.seed,
            },
            "trained_numbers": v.numel(),
            "v_norm": float(v.norm()),
            "seed": config.train.seed,
            "projection_seed": config.adapter.seed,
        },
        side_effects=side,
        account=_accounts(runtime, conditions, metrics, parameters, options.prices),
        prices=options.prices,
    )  # fmt: skip
    evidence["curve"] = gain_curve(metrics, len(task.items("train")))
    write_atomically(folder / EVIDENCE_FILE, (json.dumps(evidence, indent=2, ensure_ascii=False) + "\n").encode())
    return evidence


def check_control(adapter: Adapter, control: Adapter) -> None:
    """Raises: UserError unless the control's numbers mean what the adapter's do: same method, settings, basis, base."""

    def differ(one: object, other: object) -> bool:  # of what both files say
        return bool(one) and bool(other) and one != other

    shapes = tuple(control.v.shape), tuple(adapter.v.shape)
    if shapes[0] != shapes[1] or control.method != adapter.method or differ(control.config, adapter.config):
        raise UserError(
            f"{control.label} has another adapter than {adapter.label} ({shapes[0]} numbers against "
            f"{shapes[1]}, or other settings); a trained control is trained by the same recipe"
        )
    if differ(control.fingerprint, adapter.fingerprint):
        raise UserError(f"{control.label} was trained on another base than {adapter.label}; a control needs the same")
    if (control.explicit is None) != (adapter.explicit is None) or differ(control.check, adapter.check):
        raise UserError(f"{control.label} is on another basis than {adapter.label}; a control needs the same")
    if control.explicit is not None and control.folder != adapter.folder:
        raise UserError(
            f"{control.label} is on a basis of its own run (adapter.basis = gradient), in which its numbers mean "
            f"something else than in that of {adapter.label}; compare the two by tinylora report, each on its own basis"
        )


def _identity(v: Tensor) -> Any:
    """The numbers, or of very many their hash: what tells one plan from another."""
    if v.numel() <= MOST_NUMBERS:
        return v.flatten().tolist()
    return hashlib.sha256(v.contiguous().numpy().tobytes()).hexdigest()


def assemble(
    conditions: Sequence[Condition],
    *,
    meta: dict[str, Any],
    side_effects: dict[str, Any],
    account: dict[str, Any],
    prices: Prices,
) -> dict[str, Any]:
    """evidence.json from answers that are there. Everything but meta, side effects and account comes from the items.

    Raises: UserError if the conditions are not of the same items in the same order, or lack the untrained model.
    """
    by_name = {condition.name: condition for condition in conditions}
    if not {"untrained", "tuned"} <= set(by_name):
        raise UserError("evidence needs the untrained model and the adapter on the same items")
    untrained, tuned = by_name["untrained"], by_name["tuned"]
    ids = [result.item_id for result in tuned.replies]
    for condition in conditions:
        if [result.item_id for result in condition.replies] != ids:
            raise UserError(f"condition {condition.name} has other items than the adapter; evaluate it again")
    others = [condition for condition in conditions if condition is not tuned]
    against = {one.name: paired_json(one.replies, tuned.replies) for one in others}
    for name, p in zip(against, adjusted_p_values([one["p_value"] for one in against.values()]), strict=True):
        against[name]["p_adjusted"] = p
    primary = against["untrained"]
    evidence: dict[str, Any] = {
        "format": FORMAT,
        **meta,
        "conditions": [
            {
                "name": one.name,
                "kind": one.kind,
                "label": one.label,
                "strict": share_json(one.replies, "strict"),
                "value_only": share_json(one.replies, "value_only"),
                "stopped": share_json(one.replies, "stopped"),
                "answered": share_json(one.replies, "answered"),
                "length": mean(one.replies, "num_tokens"),
                "repetition": _repetition(one.replies),
                "account": priced(one.account, prices).to_json(),
                "against_tuned": against.get(one.name),
                "details": one.details,
            }
            for one in conditions
        ],
        "value_only": paired_json(untrained.replies, tuned.replies, "value_only"),
        "gain": asdict(split_gain(untrained.replies, tuned.replies)),
        "smallest_effect": smallest_json(len(ids), (primary["won"] + primary["lost"]) / len(ids)),
        "side_effects": side_effects,
        "account": account,
    }
    evidence["verdict"] = evidence_verdict(evidence)
    return evidence


def _named(controls: Sequence[Adapter]) -> dict[str, Adapter]:
    """Trained controls by their reward; several of one reward get numbers."""
    named: dict[str, Adapter] = {}
    for control in controls:
        kind = control.run.train.control if control.run is not None else "adapter"
        same = sum(name.split("-")[0] == kind for name in named)
        named[f"{kind}-{same + 1}" if same else kind] = control
    return named


def _control_label(control: Adapter) -> str:
    if control.run is None or control.run.train.control == "none":
        return "another trained adapter"
    return f"trained on a control reward: {control.run.train.control} (seed {control.run.train.seed})"


def _side_effects(
    runtime: Runtime,
    adapter: Adapter,
    conditions: Sequence[Condition],
    options: EvidenceOptions,
    also: dict[str, tuple[Runtime, Sequence[Item]]],
    say: Say,
) -> dict[str, Any]:
    say("KL to the base and perplexity on neutral text")
    effect = text_effect(runtime, adapter.v, options.text or neutral_text())
    base, tuned = conditions[0].replies, conditions[1].replies
    tasks = [_forgetting(adapter, name, *other, say) for name, other in also.items()]
    for measure in ("strict", "value_only"):
        adjusted = adjusted_p_values([one[measure]["p_value"] for one in tasks])
        for one, p in zip(tasks, adjusted, strict=True):
            one[measure]["p_adjusted"] = p
    return {
        "kl_per_token": effect.kl_per_token,
        "perplexity": {"base": effect.base_perplexity, "tuned": effect.tuned_perplexity},
        "num_tokens": effect.num_tokens,
        "text": "of the user's" if options.text else "neutral text that comes along",
        "length": {"base": mean(base, "num_tokens"), "tuned": mean(tuned, "num_tokens")},
        "repetition": {"base": _repetition(base), "tuned": _repetition(tuned)},
        "tasks": tasks,
    }


def _asked(runtime: Runtime, adapter: Adapter, name: str, num_items: int, say: Say) -> tuple[Runtime, Sequence[Item]]:
    """The runtime with another task, and its items; every prompt is made once, so that what cannot be asked is known
    before hours of work.

    Raises: UserError for a task that cannot be built, or a prompt that an item does not fit.
    """
    trained = adapter.run if adapter.run is not None and adapter.is_own else runtime.config
    config = settings_for_eval(trained, name, is_bare=True)
    prompt = replace(config.prompt, date=config.prompt.date or runtime.config.prompt.date)
    config = replace(config, prompt=with_fixed_date(runtime.base, prompt))
    task = build_task(config.task, config.prompt)
    say_what_runs(task, say)
    items = task.items("test")[:num_items]
    check_held_out(adapter.run or trained, config, items, say, is_own=adapter.is_own or adapter.run is None)
    other = replace(runtime, config=config, task=task)
    for item in items:
        other.encode(task.prompt(item))
    return other, items


def _forgetting(adapter: Adapter, name: str, other: Runtime, items: Sequence[Item], say: Say) -> dict[str, Any]:
    sides = []
    for v, who in ((None, "untrained"), (adapter.v, "adapter")):
        say(f"{who} on {len(items):,} items of {other.task.name} (forgetting)")
        sides.append(other.answer(items, v, seed=other.config.train.seed, who=f"{who}, {other.task.name}"))
    return {
        "task": name,
        "num_items": len(items),
        "protocol": protocol_of(other.config, other.task, items),
        "strict": paired_json(sides[0], sides[1], "strict"),
        "value_only": paired_json(sides[0], sides[1], "value_only"),
        "length": {"base": mean(sides[0], "num_tokens"), "tuned": mean(sides[1], "num_tokens")},
    }


def _accounts(
    runtime: Runtime, conditions: Sequence[Condition], metrics: list[dict[str, Any]], parameters: int, prices: Prices
) -> dict[str, Any]:
    config = runtime.config
    training = None
    if metrics:
        training = training_account(
            metrics, num_train=len(runtime.task.items("train")), group_size=config.grpo.group_size,
            parameters=parameters, device=config.model.device, threads=config.train.num_threads,
            all_weights=config.method.name == "full",
        )  # fmt: skip
    names = ("tokens_sampled", "prompt_tokens", "seconds", "flops", "cpu_hours", "gpu_hours")
    spent = [one.account for one in conditions if one.kind not in ("untrained", "tuned")]
    totals: dict[str, Any] = {name: sum(getattr(account, name) or 0 for account in spent) for name in names}
    controls = priced(Account(**totals), prices)
    return {
        "training": None if training is None else priced(training, prices).to_json(),
        "controls": controls.to_json(),
    }


def _repetition(results: Sequence[Reply]) -> float:
    return sum(repetition(result.text) for result in results) / len(results)
