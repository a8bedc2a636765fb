"""Does the demo's gain hold over seeds? Its runs, each against the untrained model, and pooled over the same items.

Reads finished runs (result.json and result_items.jsonl of each folder), or makes them with --run. A train.seed moves
the order of the questions and the sampling; the P matrices stay (adapter.seed). Pooling counts the item as evidence,
not each of its appearances: `tinylora.evaluation.statistics.paired.pooled_result`. Every run is recorded in full,
whatever it shows.

    python -m bench.studies.demo_seeds runs/demo-001 runs/demo-002 runs/demo-003 [--save]
    python -m bench.studies.demo_seeds --run --seeds 0 1 2 [--save]
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import finish
from tinylora.config.recipe import load_recipe
from tinylora.config.schema import to_table
from tinylora.errors import UserError
from tinylora.evaluation.statistics.paired import PooledResult, pooled_result
from tinylora.store.run_folder import RunFolder
from tinylora.system.jsonl import read_jsonl

MEASURES = {  # name: condition before, condition after, score
    "primary": ("base_greedy", "tuned_greedy", "strict"),
    "value_only": ("base_greedy", "tuned_greedy", "value_only"),
    "sampled": ("base_sampled", "tuned_sampled", "strict"),
    "sampled_value_only": ("base_sampled", "tuned_sampled", "value_only"),
    "against_best_prompt": ("base_best_prompt", "tuned_greedy", "strict"),
    "against_larger_budget": ("base_larger_budget", "tuned_greedy", "strict"),
}
Outcomes = dict[str, tuple[np.ndarray, np.ndarray]]


def read_run(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's full result, and its items' results by condition."""
    if not (run / "result.json").is_file():
        raise UserError(f"{run} has no result.json: it is no run, or its final evaluation has not ended")
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    result["run"] = run.name  # where it lay on this machine is nobody's business
    by_condition: dict[str, list[dict[str, Any]]] = {}
    for record in read_jsonl(run / "result_items.jsonl"):
        by_condition.setdefault(record["condition"], []).append(record)
    return result, by_condition


def outcomes(run: Path, items: dict[str, list[dict[str, Any]]]) -> tuple[list[str], Outcomes]:
    """Item ids and, for every measure, which items were right before and after."""
    ids = [record["item_id"] for record in items["tuned_greedy"]]
    found: Outcomes = {}
    for name, (before, after, score) in MEASURES.items():
        for condition in (before, after):
            if [record["item_id"] for record in items[condition]] != ids:
                raise UserError(f"{run}: {condition} was not measured on the items of tuned_greedy")
        pair = [np.array([record[score] >= 1.0 for record in items[c]], dtype=bool) for c in (before, after)]
        found[name] = (pair[0], pair[1])
    return ids, found


def pool(runs: Sequence[Path]) -> dict[str, Any]:
    """Every run's result and settings, and each measure pooled over the runs.

    Raises: UserError for a folder without a result, runs on other items, or a result.json that its items contradict.
    """
    results, all_outcomes, first_ids = [], [], None
    for run in runs:
        result, items = read_run(run)
        ids, found = outcomes(run, items)
        if first_ids is not None and ids != first_ids:
            raise UserError(f"{run} was evaluated on other items than {runs[0]}; only like runs can be pooled")
        first_ids = ids
        before, after = found["primary"]
        said = [result["primary"][side]["correct"] for side in ("base", "tuned")]
        if said != [int(before.sum()), int(after.sum())]:
            raise UserError(f"{run}: result.json says {said} right, its items {[int(before.sum()), int(after.sum())]}")
        folder = RunFolder.open(run)
        result["config"] = to_table(folder.read_config())
        if results and like(result["config"]) != like(results[0]["config"]):
            raise UserError(f"{run} was trained with other settings than {runs[0]}; only like runs can be pooled")
        result["environment"] = {k: v for k, v in folder.read_environment().items() if k != "command"}
        results.append(result)
        all_outcomes.append(found)
    pooled = {name: pooled_result([found[name] for found in all_outcomes]) for name in MEASURES}
    return {
        "seeds": [result["seed"] for result in results],
        "items": len(first_ids or []),
        "every_seed_positive": all(result["primary"]["difference"] > 0 for result in results),
        "pooled": {name: record(value) for name, value in pooled.items()},
        "random_best": max(r["correct"] for result in results for r in result["random"]) if results[0]["random"] else 0,
        "runs": results,
    }


def like(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that runs of one recipe under several seeds have in common."""
    own = {"train": ("seed", "num_threads"), "log": tuple(config["log"])}
    return {name: {k: v for k, v in section.items() if k not in own.get(name, ())} if isinstance(section, dict)
            else section for name, section in config.items()}  # fmt: skip


def record(pooled: PooledResult) -> dict[str, Any]:
    """The pooled numbers without the single seeds, which stand in the runs' own results."""
    return {**{k: v for k, v in asdict(pooled).items() if k != "per_seed"}, "text": pooled.text()}


def table(result: dict[str, Any]) -> str:
    lines = []
    for run in result["runs"]:
        randoms = ", ".join(str(r["correct"]) for r in run["random"])
        lines += [
            f"{run['run']} (seed {run['seed']}, {run['trained_numbers']} numbers, |v| {run['v_norm']:.3f}, "
            f"{run['seconds'] / 60:.1f} minutes)",
            f"  greedy, strict      {run['primary']['text']}",
            f"  greedy, value-only  {run['value_only']['text']}",
            f"  sampled, strict     {run['sampled']['text']}",
            f"  random vectors right: {randoms} of {result['items']}",
        ]
    lines.append("pooled")
    lines += [f"  {name:<22} {pooled['text']}" for name, pooled in result["pooled"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="folders of finished runs")
    parser.add_argument("--run", action="store_true", help="make the runs first")
    parser.add_argument("--recipe", default="demo", help="what --run trains, and the name that --save gives the result")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of --run")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where --run puts run folders")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results/studies/RECIPE.json")
    arguments = parser.parse_args()
    if bool(arguments.runs) == arguments.run:
        parser.error("give run folders, or --run to make them")

    runs = list(arguments.runs)
    if arguments.run:
        from tinylora.training.train import train

        for seed in arguments.seeds:
            config = load_recipe(arguments.recipe, [f"train.seed={seed}"])
            runs.append(train(config, out=arguments.out, name=arguments.recipe).run)
    try:
        result = pool(runs)
    except UserError as error:
        parser.error(str(error))
    print(table(result))
    finish(f"studies/{arguments.recipe}", result, arguments.save)


if __name__ == "__main__":
    main()
