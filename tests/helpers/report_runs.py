"""Run folders written by hand for the report's tests and for looking at it: no model, a second each.

python tests/helpers/report_runs.py FOLDER      a few runs to try `tinylora report` on
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tinylora.adapter.config import AdapterConfig
from tinylora.config.run import EvalConfig, RunConfig, TrainConfig
from tinylora.config.schema import dump_config
from tinylora.evaluation.account import Account, Prices
from tinylora.evaluation.evidence import assemble
from tinylora.evaluation.plain import paired_json
from tinylora.evaluation.resumable import Condition
from tinylora.evaluation.verdict import verdict
from tinylora.rollouts.replies import Reply
from tinylora.store.adapter_file import BEST, save_vector
from tinylora.tasks.config import TaskConfig

Answers = dict[str, list[Reply]]
CONDITIONS = [  # name, kind, how much better than the untrained model
    ("untrained", "untrained", 0.0), ("tuned", "tuned", 0.3), ("zero", "zero", 0.0),
    *((f"random_{i}", "random", -0.05) for i in range(5)), ("best_random", "best_random", 0.05),
    ("best_shorter", "best_shorter", 0.03),
    ("best_prompt", "best_prompt", 0.08), ("larger_budget", "larger_budget", 0.04), ("constant", "constant", -0.35),
    ("trained:shuffled", "trained_control", 0.02),
]  # fmt: skip
WORDS = ["so", "then", "we", "add", "and", "carry", "the", "one", "which", "gives", "what", "was", "asked", "for"]


def make_run(
    path: Path,
    *,
    numbers: int = 13,
    steps: int = 40,
    seed: int = 0,
    evidence: bool = True,
    result: bool = True,
    num_items: int = 60,
    text: str = "",
    label: str = "",
    control: str = "none",
    task: str = "jsonl",
) -> Path:
    """A whole run folder. `text` is every reply, `label` is put before every condition's label."""
    path.mkdir(parents=True)
    config = RunConfig(
        task=TaskConfig(name=task, path="mine.jsonl" if task == "jsonl" else ""),
        adapter=AdapterConfig(num_groups=numbers),
        train=TrainConfig(seed=seed, steps=steps, control=control),  # type: ignore[arg-type]
        eval=EvalConfig(num_test=300),
    )
    (path / "config.toml").write_text(dump_config(config), encoding="utf-8")
    environment = {"python": "3.12.1", "cpu": "a processor", "cuda": None, "command": "tinylora train <b>"}
    (path / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    rows = _metrics(config, numbers, steps)
    write_lines(path / "metrics.jsonl", rows)
    kept = steps - steps % 10 if steps >= 10 else steps
    v = torch.tensor(rows[kept]["v"]).reshape(numbers, 1)
    save_vector(path / BEST, v, config, {"step": kept, "kept": "best", "fingerprint": "00ff" * 8})
    answers = {name: _items(name, lift, num_items, seed, text) for name, _, lift in CONDITIONS}
    if result:
        _write_result(path, answers, numbers, seed)
    if evidence:
        _write_evidence(path, answers, numbers, float(v.norm()), label, rows)
    return path


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _items(name: str, lift: float, num_items: int, seed: int, text: str) -> list[Reply]:
    """Replies of one condition: an item keeps its difficulty, so that conditions are correlated as real ones are."""
    rng = random.Random(f"{seed} {'untrained' if name == 'zero' else name}")
    results = []
    for i in range(num_items):
        hard = random.Random(f"item {i}").random()
        stopped = rng.random() < 0.9 + (0.08 if name == "tuned" else 0.0)
        answered = stopped and rng.random() < 0.85 + lift / 3
        right = answered and rng.random() < 0.85 - hard + lift
        value = right or rng.random() < 0.12
        tokens = rng.randint(4, 30) if stopped else 64
        reply = text or " ".join(rng.choice(WORDS) for _ in range(tokens)) + (f" #### {i}" if answered else "")
        results.append(
            Reply(
                f"{i:064x}", f"{i} + {2 * i + 1} = ?", str(3 * i + 1), reply, float(right), float(value), stopped,
                tokens, {"strict": float(right)}, answered=answered,
            )
        )  # fmt: skip
    return results


def _metrics(config: RunConfig, numbers: int, steps: int) -> list[dict[str, Any]]:
    rng = random.Random(f"metrics {config.train.seed}")
    rows: list[dict[str, Any]] = []
    v, aims = [0.0] * numbers, [rng.gauss(0, 0.05) for _ in range(numbers)]
    for step in range(steps + 1):
        done = step / max(1, steps)
        row: dict[str, Any] = {"step": step}
        if step:
            v = [x + 0.06 * (aim - x) + rng.gauss(0, 0.002) for x, aim in zip(v, aims, strict=True)]
            strict = 0.3 + 0.25 * done + rng.gauss(0, 0.05)
            row |= {
                "reward": strict, "strict": strict, "value_only": strict + 0.08, "answered": 0.85 + 0.1 * done,
                "truncated": 0.1 - 0.08 * done, "length": 21 - 5 * done + rng.gauss(0, 1),
                "zero_variance_groups": 0.3 + 0.2 * done + rng.gauss(0, 0.06), "prompts_sampled": 12,
                "tokens_sampled": 1000 + rng.randint(0, 99), "prompt_tokens": 500, "tokens_trained": 900.0,
                "v_norm": sum(x * x for x in v) ** 0.5, "v": v, "seconds": 2.5, "cpu_seconds": 4.75,
                "peak_memory_bytes": 1_500_000_000 + step,
            }  # fmt: skip
        if step % 10 == 0 or step == steps:
            lift = 0.03 * rng.random()
            names = ("reward", "strict", "value_only")
            row |= {f"validation_{name}": 0.35 + 0.2 * done + lift + 0.08 * (name == "value_only") for name in names}
            row["validation_length"] = 20 - 4 * done
        rows.append(row)
    return rows


def _write_evidence(
    path: Path, answers: Answers, numbers: int, norm: float, label: str, rows: list[dict[str, Any]]
) -> None:
    num_items = len(answers["tuned"])
    account = Account(tokens_sampled=1200, prompt_tokens=600, seconds=3.5, flops=2.5e12)
    details: dict[str, dict[str, Any]] = {
        "zero": {"texts_that_differ": 0}, "best_prompt": {"prompt": "what is"}, "constant": {"reply": "<i>7</i>"},
    }  # fmt: skip
    labels = {
        "untrained": "untrained model, same prompt", "tuned": f"{numbers} trained numbers", "zero": "v = 0",
        "best_random": "best of 30 random vectors, by validation", "constant": "best constant reply, by validation",
        "best_shorter": "best of 30 shorter random vectors, by validation",
        "best_prompt": "untrained model, best of 8 prompts by validation",
        "larger_budget": "untrained model, 4 x the token budget",
        "trained:shuffled": "trained on a control reward: shuffled (seed 0)",
    }  # fmt: skip
    conditions = [
        Condition(
            name=name, kind=kind, label=label + labels.get(name, f"random vector {name[-1]} of the same norm"),
            replies=tuple(answers[name]), account=account, details=details.get(name, {}),
        )
        for name, kind, _ in CONDITIONS
    ]  # fmt: skip
    half = slice(0, num_items // 2)
    other = paired_json(answers["untrained"][half], answers["tuned"][half])
    task = {"task": "gsm8k", "num_items": num_items // 2}
    task |= {measure: {**other, "p_adjusted": other["p_value"]} for measure in ("strict", "value_only")}
    side_effects = {
        "kl_per_token": 0.0123, "perplexity": {"base": 21.5, "tuned": 21.9}, "num_tokens": 900,
        "length": {"base": 20.0, "tuned": 17.0}, "repetition": {"base": 0.01, "tuned": 0.02}, "tasks": [task],
    }  # fmt: skip
    training = Account(
        tokens_sampled=42000, prompt_tokens=20000, tokens_trained=36000, distinct_problems=480, seconds=100.0,
        flops=1.5e14, cpu_hours=0.05, gpu_hours=0.0, peak_memory_bytes=1_500_000_040, energy_kwh=0.0005, money=0.01,
        prices=Prices(price_per_hour=0.2),
    )  # fmt: skip
    meta = {
        "run": str(path), "model": "a model", "task": "jsonl", "protocol": "1f" * 8, "num_items": num_items,
        "decoding": {"max_new_tokens": 64, "temperature": 0.0, "seed": 0}, "trained_numbers": numbers,
        "v_norm": norm, "seed": 0, "projection_seed": 0,
    }  # fmt: skip
    accounts = {"training": training.to_json(), "controls": account.to_json()}
    found = assemble(conditions, meta=meta, side_effects=side_effects, account=accounts, prices=Prices())
    found["curve"] = [
        {
            "step": row["step"], "distinct_problems": 12.0 * row["step"],
            "validation_strict": row["validation_strict"], "validation_value_only": row["validation_value_only"],
        }
        for row in rows
        if "validation_strict" in row
    ]  # fmt: skip
    (path / "evidence.json").write_text(json.dumps(found), encoding="utf-8")
    lines = [{"condition": one.name, **result.row()} for one in conditions for result in one.replies]
    write_lines(path / "evidence_items.jsonl", lines)


def _write_result(path: Path, answers: Answers, numbers: int, seed: int) -> None:
    named = {
        "base_greedy": answers["untrained"], "tuned_greedy": answers["tuned"], "base_sampled": answers["random_3"],
        "tuned_sampled": answers["best_prompt"], "base_larger_budget": answers["larger_budget"],
        "base_best_prompt": answers["best_prompt"], **{f"random_{i}": answers[f"random_{i}"] for i in range(5)},
    }  # fmt: skip
    num_items = len(named["base_greedy"])

    def pair(base: str, tuned: str, measure: str = "strict") -> dict[str, Any]:
        return paired_json(named[base], named[tuned], measure)

    def share(name: str) -> dict[str, int]:
        return {"correct": sum(one.strict >= 1 for one in named[name]), "total": num_items}

    def means(field: str) -> dict[str, float]:
        sides = {"base": named["base_greedy"], "tuned": named["tuned_greedy"]}
        return {side: sum(float(getattr(one, field)) for one in rows) / num_items for side, rows in sides.items()}

    against = {name: pair(f"base_{name}", "tuned_greedy") for name in ("best_prompt", "larger_budget")}
    result: dict[str, Any] = {
        "trained_numbers": numbers, "seed": seed, "seconds": 130.0, "seconds_trained": 100.0, "decoding": "greedy",
        "primary": pair("base_greedy", "tuned_greedy"),
        "value_only": pair("base_greedy", "tuned_greedy", "value_only"),
        "sampled": {**pair("base_sampled", "tuned_sampled"), "temperature": 0.6},
        "sampled_value_only": pair("base_sampled", "tuned_sampled", "value_only"),
        "stopped": means("stopped"), "length": means("num_tokens"),
        "random": [share(f"random_{i}") for i in range(5)],
        "best_prompt": {
            **share("base_best_prompt"), "name": "what is", "validation": {"own": 0.4, "what is": 0.5},
            "against_tuned": against["best_prompt"],
        },
        "larger_budget": {
            **share("base_larger_budget"), "max_new_tokens": 256, "against_tuned": against["larger_budget"],
        },
        "examples": [], "run": str(path),
    }  # fmt: skip
    result["verdict"] = verdict(result)
    (path / "result.json").write_text(json.dumps(result), encoding="utf-8")
    write_lines(path / "result_items.jsonl", [{"condition": n, **asdict(r)} for n, rows in named.items() for r in rows])


if __name__ == "__main__":
    out = Path(sys.argv[1])
    for number in range(3):
        make_run(out / f"demo-{number + 1:03d}", seed=number, num_items=300, steps=60)
    make_run(out / "demo-shuffled-001", num_items=300, control="shuffled", evidence=False)
    make_run(out / "curves-only", evidence=False, result=False, steps=7)
