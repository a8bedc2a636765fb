"""Under which prompt is the untrained model best? How the demo's prompt was chosen: before anything was trained.

The recipe's own prompt, its alternatives (eval.prompts) and those below, greedy and sampled, on validation items alone.
Test items are never looked at.

    python -m bench.studies.prompts [--items 256] [--set section.key=value] [--save]
"""

import argparse
import sys
from dataclasses import replace
from typing import Any

from bench.common import finish
from tinylora.config.recipe import load_recipe
from tinylora.evaluation.statistics.paired import wilson_interval
from tinylora.rollouts.prompts import prompt_candidates
from tinylora.rollouts.replies import Reply, correct, mean
from tinylora.rollouts.runtime import open_runtime

# In the form of eval.prompts; what a line leaves out is as in the recipe. pattern "" keeps reasoning-gym's own wording.
MORE: tuple[dict[str, str], ...] = (
    {"name": "no system", "system": ""},
    {"name": "no examples", "few_shot": "no"},
    {"name": "no system, no examples", "system": "", "few_shot": "no"},
    {"name": "question as it comes", "system": "", "pattern": "", "few_shot": "no"},
    {"name": "number alone", "system": "Answer with the number alone.", "few_shot": "no"},
    {"name": "brief", "system": "You are a calculator. Reply with the result and nothing else.", "few_shot": "no"},
    {"name": "what is", "system": "", "template": "What is {question}", "few_shot": "no"},
    {"name": "calculate", "system": "", "template": "Calculate: {question}", "few_shot": "no"},
)


def share(results: list[Reply]) -> dict[str, Any]:
    right = int(correct(results).sum())
    return {
        "strict": {"correct": right, "total": len(results), "interval": list(wilson_interval(right, len(results)))},
        "value_only": mean(results, "value_only"),
        "stopped": mean(results, "stopped"),
        "length": mean(results, "num_tokens"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["prompt"]) for row in rows)
    lines = [f"{'prompt':<{width}}  greedy: strict  value  stopped  tokens   sampled: strict  value  stopped  tokens"]
    for row in rows:
        cells = []
        for side in ("greedy", "sampled"):
            found = row[side]
            strict = found["strict"]["correct"] / found["strict"]["total"]
            cells.append(f"{strict:14.3f}  {found['value_only']:.3f}  {found['stopped']:7.3f}  {found['length']:6.1f}")
        lines.append(f"{row['prompt']:<{width}}  " + "    ".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--items", type=int, default=256, help="validation items")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the sampling; 0 takes the recipe's")
    parser.add_argument("--own", action="store_true", help="leave out this script's prompts; take the recipe's alone")
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[])
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results/studies/prompts.json")
    arguments = parser.parse_args()

    config = load_recipe(arguments.recipe, arguments.overrides)
    taken = {table["name"] for table in config.eval.prompts}
    more = () if arguments.own else tuple(table for table in MORE if table["name"] not in taken)
    candidates = prompt_candidates(replace(config, eval=replace(config.eval, prompts=(*config.eval.prompts, *more))))
    runtime = open_runtime(config)
    items = runtime.task.items("validation")[: arguments.items]
    temperature = arguments.temperature or config.generation.temperature
    rows = []
    for name, prompt in candidates.items():
        row: dict[str, Any] = {"prompt": name, "first_messages": prompt(items[0])}
        for side, heat in (("greedy", 0.0), ("sampled", temperature)):
            results = runtime.answer(items, None, prompt=prompt, temperature=heat, seed=config.train.seed)
            row[side] = {**share(results), "example": results[0].text}
        rows.append(row)
        print(table(rows[-1:]), file=sys.stderr, flush=True)
    rows.sort(key=lambda row: -row["greedy"]["strict"]["correct"])
    print(table(rows))
    result = {
        "recipe": arguments.recipe,
        "overrides": arguments.overrides,
        "split": "validation",
        "items": len(items),
        "temperature": temperature,
        "max_new_tokens": config.generation.max_new_tokens,
        "best": rows[0]["prompt"],
        "prompts": rows,
    }
    finish("studies/prompts", result, arguments.save)


if __name__ == "__main__":
    main()
