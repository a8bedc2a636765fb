"""Which learning rate suits thirteen numbers? A recipe at several rates, up to where it breaks.

Public trainings of so few numbers use rates up to 2e-4, at which they barely move. Every rate and seed is a short run
of its own (a run folder below --out, without the final evaluation); validation is greedy, on the same items every time,
and compared with the untrained model item by item at the end. Test items are never looked at.

    python -m bench.studies.lr_sweep [--rates 1e-3 1e-2] [--seeds 0 1] [--steps 30] [--set section.key=value] [--save]
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.common import finish
from tinylora.config.recipe import load_recipe
from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.evaluation.statistics.paired import paired_result
from tinylora.rollouts.replies import correct, mean
from tinylora.rollouts.runtime import Runtime, open_runtime
from tinylora.system.jsonl import read_jsonl
from tinylora.training.train import train

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
CURVE = ("reward", "strict", "value_only", "truncated", "length", "v_norm", "grad_norm", "zero_variance_groups")
VALIDATION = ("validation_strict", "validation_value_only", "validation_stopped", "validation_length")


def swept(config: RunConfig, rate: float, seed: int, steps: int) -> RunConfig:
    """The recipe at one rate: short, last v, no final evaluation."""
    return replace(
        config,
        optim=replace(config.optim, lr=rate),
        train=replace(config.train, seed=seed, steps=steps, keep="last"),
        eval=replace(config.eval, num_test=0),
    )


def read_curve(run: Path) -> dict[str, list[Any]]:
    """What the steps said, as one list a quantity; validation as [step, value] pairs."""
    records = read_jsonl(run / "metrics.jsonl")
    steps = [record for record in records if "reward" in record]  # the first record may be validation alone
    curve: dict[str, list[Any]] = {name: [record.get(name) for record in steps] for name in CURVE}
    for name in VALIDATION:
        curve[name] = [[record["step"], record[name]] for record in records if name in record]
    return curve


def validate(runtime: Runtime, v: Any) -> list[Any]:
    config = runtime.config
    items = runtime.task.items("validation")[: config.eval.num_validation]
    return runtime.answer(items, v)


def one_run(config: RunConfig, runtime: Runtime, untrained: list[Any], out: Path) -> dict[str, Any]:
    """Train at one rate, then compare its last v with the untrained model on validation items."""
    facts: dict[str, Any] = {"lr": config.optim.lr, "seed": config.train.seed}
    name = f"lr{config.optim.lr:g}-seed{config.train.seed}"
    try:
        trained = train(config, out=out, name=name)
    except UserError as error:  # a rate that breaks the run is a result, too
        newest = max(out.glob(f"{name}-*"), key=lambda run: run.stat().st_mtime, default=None)
        return {**facts, "stopped_by": str(error), "curve": read_curve(newest) if newest else None}
    after = validate(runtime, trained.v.to(runtime.adapter.zeros()))
    paired = paired_result(correct(untrained), correct(after))
    return {
        **facts,
        "before": paired.base.value,
        "after": paired.tuned.value,
        "won": paired.won,
        "lost": paired.lost,
        "p_value": paired.p_value,
        "value_only_before": mean(untrained, "value_only"),
        "value_only_after": mean(after, "value_only"),
        "stopped_before": mean(untrained, "stopped"),
        "stopped_after": mean(after, "stopped"),
        "v_norm": float(trained.v.norm()),
        "v": trained.v.flatten().tolist(),
        "seconds": trained.seconds,
        "curve": read_curve(trained.run),
    }


def summary(runs: Sequence[dict[str, Any]], rates: Sequence[float]) -> list[dict[str, Any]]:
    """Mean over seeds, a row a rate."""
    rows = []
    for rate in rates:
        done = [run for run in runs if run["lr"] == rate and "after" in run]
        row: dict[str, Any] = {"lr": rate, "seeds": len(done), "broken": sum(r["lr"] == rate for r in runs) - len(done)}
        if done:
            names = ("before", "after", "value_only_before", "value_only_after", "stopped_after", "v_norm")
            row |= {name: statistics.fmean(run[name] for run in done) for name in names}
            last = [run["curve"]["reward"][-5:] for run in done]
            row["last_rewards"] = statistics.fmean(value for values in last for value in values)
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["     lr  seeds  broken  greedy strict     value-only        stopped  |v|    reward, last 5 steps"]
    for row in rows:
        head = f"{row['lr']:7g}  {row['seeds']:5}  {row['broken']:6}"
        if row["seeds"]:
            head += (
                f"  {row['before']:.3f} -> {row['after']:.3f}"
                f"  {row['value_only_before']:.3f} -> {row['value_only_after']:.3f}"
                f"  {row['stopped_after']:.3f}    {row['v_norm']:.3f}  {row['last_rewards']:.3f}"
            )
        lines.append(head)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo-tiled")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/lr-sweep"))
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results/studies/lr_sweep.json")
    arguments = parser.parse_args()

    config = load_recipe(arguments.recipe, arguments.overrides)
    runtime = open_runtime(config)
    untrained = validate(runtime, None)
    runs: list[dict[str, Any]] = []
    for seed in arguments.seeds:  # seeds outside: what is there after an interruption covers every rate
        for rate in arguments.rates:
            runs.append(one_run(swept(config, rate, seed, arguments.steps), runtime, untrained, arguments.out))
            print(table(summary(runs, arguments.rates)), file=sys.stderr, flush=True)
    rows = summary(runs, arguments.rates)
    print(table(rows))
    result = {
        "recipe": arguments.recipe,
        "overrides": arguments.overrides,
        "steps": arguments.steps,
        "validation_items": len(untrained),
        "rates": rows,
        "runs": runs,
    }
    finish("studies/lr_sweep", result, arguments.save)


if __name__ == "__main__":
    main()
