"""Count the answers kept in docs/studies again: shares, and every condition against the adapter, from nothing else.

    python -m bench.studies.recount docs/studies/dial-smollm2 [--against rl-tinylora-13] [--seed 0] [--save]

Each file NAME.jsonl.gz holds lines with condition, item and scores; "tuned" is the adapter. The p values of a file are
also adjusted together (Benjamini-Hochberg), as `tinylora eval --controls` does. What untrained.jsonl.gz holds is
compared with in every file. Files CELL_s0, CELL_s1, ... are seeds of one cell (CELL_s0p1, ... other draws of P) and are
also pooled by item (one question under three seeds is not three questions:
`tinylora.evaluation.statistics.paired.pooled_result`); with --against CELL, each other cell is compared with that one,
too, over the seeds that both have. Where a file has more items than untrained.jsonl.gz, by which the cells were
compared, the others are also counted alone ("unseen").
"""

import argparse
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import finish
from tinylora.evaluation.statistics.paired import paired_result, pooled_result
from tinylora.evaluation.statistics.power import adjusted_p_values

Answers = dict[str, dict[str, bool]]
"""Whether each item is right, by condition."""


def read(file: Path) -> Answers:
    right: Answers = {}
    for line in gzip.decompress(file.read_bytes()).decode().splitlines():
        row = json.loads(line)
        right.setdefault(row["condition"], {})[row["item_id"]] = row["strict"] >= 1
    return right


Seed = tuple[int, int]
"""Training's seed, and the seed of P."""


def in_words(seed: Seed) -> int | str:
    return f"{seed[0]}p{seed[1]}" if seed[1] else seed[0]


def pooled(cells: dict[str, dict[Seed, dict[str, bool]]], shared: Answers, reference: str) -> dict[str, Any]:
    """Of each cell, its seeds together: against the untrained model, and against the cell `reference`."""
    found: dict[str, Any] = {}
    for name, seeds in cells.items():
        others = {"untrained": dict.fromkeys(seeds, shared["untrained"])} if "untrained" in shared else {}
        if reference and name != reference:
            others[reference] = {seed: answers for seed, answers in cells[reference].items() if seed in seeds}
        found[name] = {
            "seeds": [in_words(s) for s in sorted(seeds)],
            "shares": [sum(seeds[s].values()) / len(seeds[s]) for s in sorted(seeds)],
        }
        for other, theirs in others.items():
            items = list(seeds[min(seeds)])
            pair = pooled_result(
                [
                    tuple(np.array([answers[item] for item in items], dtype=bool) for answers in (theirs[s], seeds[s]))
                    for s in sorted(theirs)
                ]
            )
            found[name][other] = {
                "seeds": [in_words(s) for s in sorted(theirs)],
                "difference": pair.difference, "interval": list(pair.interval),
                "won": pair.won, "lost": pair.lost, "p_value": pair.p_value,
            }  # fmt: skip
    return found


def recount(right: Answers) -> dict[str, Any]:
    """Of one file, by condition."""
    tuned = right.pop("tuned") if "tuned" in right else right.pop("adapter")  # eval --controls, and eval --items
    items = list(tuned)
    pairs = {
        name: paired_result([answers[item] for item in items], [tuned[item] for item in items])
        for name, answers in right.items()
    }
    adjusted = adjusted_p_values([pair.p_value for pair in pairs.values()])
    return {
        "items": len(items),
        "tuned": sum(tuned.values()),
        "against": {
            name: {
                "correct": pair.base.correct, "difference": pair.difference, "interval": list(pair.interval),
                "won": pair.won, "lost": pair.lost, "p_value": pair.p_value, "p_adjusted": p,
            }
            for (name, pair), p in zip(pairs.items(), adjusted, strict=True)
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", default="", help="a cell that all others are compared with")
    parser.add_argument("--seed", type=int, help="runs of this training seed alone, so that only draws of P are pooled")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    files = {file.name.removesuffix(".jsonl.gz"): read(file) for file in sorted(args.folder.glob("*.jsonl.gz"))}
    shared = files.pop("untrained", {})
    if not files:
        raise SystemExit(f"{args.folder} holds no *.jsonl.gz")
    counted = {name: recount({**shared, **right}) for name, right in files.items()}
    for name, right in files.items():  # items that no cell was chosen by
        unseen = {item for item in right["tuned"] if "untrained" in shared and item not in shared["untrained"]}
        if unseen and "untrained" in right:
            part = {condition: {item: answers[item] for item in unseen} for condition, answers in right.items()}
            counted[name]["unseen"] = recount(part)
    cells: dict[str, dict[Seed, dict[str, bool]]] = {}
    for name, right in files.items():
        seed = re.fullmatch(r"(.*)_s(\d+)(?:p(\d+))?", name)
        if seed and args.seed in (None, int(seed[2])):
            cells.setdefault(seed[1], {})[int(seed[2]), int(seed[3] or 0)] = right["tuned"]
    if args.against and args.against not in cells:
        raise SystemExit(f"no file {args.against}_s*.jsonl.gz in {args.folder}")
    result = {"folder": args.folder.name, "files": counted, "pooled": pooled(cells, shared, args.against)}
    only = "" if args.seed is None else f"_seed{args.seed}"
    finish(f"studies/recount_{args.folder.name}{only}", result, args.save)


if __name__ == "__main__":
    main()
