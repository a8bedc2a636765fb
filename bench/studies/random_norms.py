"""Would random search do as well as training if it were free to choose the length of its vectors, too?

`tinylora eval --controls` holds a run against random vectors of the norm that training came to. Where such vectors
destroy the model, shorter ones might not. Here random directions are tried at several shares of that norm on the
validation items, and the best of all on the test items, beside the adapter and the untrained model. It gets more
samples than training did.

    python -m bench.studies.random_norms runs/demo-001 [--factors 0.5 0.25 0.125] [--vectors 15] [--save-as NAME]
"""

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.common import finish
from tinylora.config.recipe import load_recipe
from tinylora.evaluation.conditions import random_vectors
from tinylora.evaluation.statistics.paired import paired_result
from tinylora.rollouts.runtime import open_runtime
from tinylora.store.adapter import open_adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--vectors", type=int, default=15)
    parser.add_argument("--num-items", type=int, default=1000)
    parser.add_argument("--save-as", default="", help="keep the result as bench/results/studies/NAME.json")
    args = parser.parse_args()
    opened = open_adapter(args.run)
    config = load_recipe(str(args.run / "config.toml"), ["train.num_threads=0"])
    runtime = open_runtime(config, say=print, on=opened)
    validation = runtime.task.items("validation")[: config.eval.num_validation]
    test = runtime.task.items("test")[: args.num_items]

    def right(v: Tensor | None, items: Any) -> list[bool]:
        return [one.strict >= 1 for one in runtime.answer(items, v)]

    v = opened.v.to(runtime.adapter.zeros())
    tried: list[tuple[float, float, int, Tensor]] = []
    for factor in args.factors:
        for index, vector in enumerate(random_vectors(factor * v, args.vectors, config.train.seed + 7919)):
            share = sum(right(vector, validation)) / len(validation)
            tried.append((share, factor, index, vector))
            print(f"{factor} x |v|, vector {index + 1}: {share:.3f} on validation", flush=True)
    base_validation = sum(right(None, validation)) / len(validation)
    share, factor, index, best = max(tried, key=lambda one: one[0])
    answers = {"untrained": right(None, test), "tuned": right(v, test), "best": right(best, test)}
    pairs = {name: paired_result(answers[name], answers["tuned"]) for name in ("untrained", "best")}
    for name, pair in pairs.items():
        print(f"adapter against {name}: {pair.text()}")
    result = {
        "numbers": int(v.numel()), "v_norm": float(v.norm()), "vectors": args.vectors, "factors": args.factors,
        "validation_items": len(validation), "test_items": len(test), "untrained_validation": base_validation,
        "validation": {str(f): [s for s, g, _, _ in tried if g == f] for f in args.factors},
        "chosen": {"factor": factor, "vector": index, "validation": share},
        "correct": {name: sum(found) for name, found in answers.items()},
        "adapter_against": {
            name: {"difference": p.difference, "interval": list(p.interval), "won": p.won, "lost": p.lost,
                   "p_value": p.p_value} for name, p in pairs.items()
        },
    }  # fmt: skip
    finish(f"studies/{args.save_as or 'random_norms'}", result, bool(args.save_as))


if __name__ == "__main__":
    main()
