"""Count the answers kept in docs/studies again: shares, and every condition against the adapter, from nothing else.

    python bench/recount.py docs/studies/dial-smollm2 [--save]

Each file NAME.jsonl.gz holds lines with condition, item and scores; "tuned" is the adapter. The p values of a file are
also adjusted together (Benjamini-Hochberg), as `tinylora eval --controls` does.
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from common import finish

from tinylora.evaluation.power import adjusted_p_values
from tinylora.evaluation.statistics import paired_result


def recount(file: Path) -> dict[str, Any]:
    """Of one file, by condition."""
    right: dict[str, dict[str, bool]] = {}
    for line in gzip.decompress(file.read_bytes()).decode().splitlines():
        row = json.loads(line)
        right.setdefault(row["condition"], {})[row["item_id"]] = row["strict"] >= 1
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
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    files = sorted(args.folder.glob("*.jsonl.gz"))
    if not files:
        raise SystemExit(f"{args.folder} holds no *.jsonl.gz")
    counted = {file.name.removesuffix(".jsonl.gz"): recount(file) for file in files}
    finish(f"recount_{args.folder.name}", {"folder": args.folder.name, "files": counted}, args.save)


if __name__ == "__main__":
    main()
