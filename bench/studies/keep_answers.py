"""Keep what a sweep's runs answered, or one run under all controls: files that recount.py counts again.

One file for each run that is done (CELL_sSEED, or CELL_sSEEDpDRAW of another draw of P than 0), with the adapter's
replies, and one with the untrained model's, which answered the same items for all. Item ids are cut to 12 characters,
questions left out: the recipe gives them back. Of a run that `tinylora eval RUN --controls` was asked about, one file
with every condition; of a run's final evaluation, the adapter's greedy replies as those of a cell.

    python -m bench.studies.keep_answers runs/mine docs/studies/NAME --results NAME    (results.json as well)
    python -m bench.studies.keep_answers RUN docs/studies/NAME --controls --results NAME    (evidence.json as well)
    python -m bench.studies.keep_answers RUN docs/studies/NAME --cell 13-numbers    (result_items.jsonl as CELL_sSEED)
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from bench.common import RESULTS

KEPT = ("condition", "item_id", "answer", "text", "strict", "value_only", "answered", "stopped", "num_tokens")


def rows_of(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.append({key: row[key][:12] if key == "item_id" else row[key] for key in KEPT})
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--results", default="", help="keep the summary as bench/results/studies/RESULTS.json")
    parser.add_argument("--controls", action="store_true", help="SWEEP is a run with evidence.json")
    parser.add_argument("--only", default="", help="this cell alone")
    parser.add_argument("--cell", default="", help="SWEEP is a run with a final evaluation, kept under this name")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.cell:
        seed = json.loads((args.sweep / "result.json").read_text(encoding="utf-8"))["seed"]
        rows = [row for row in rows_of(args.sweep / "result_items.jsonl") if row["condition"] == "tuned_greedy"]
        write(args.out / f"{args.cell}_s{seed}.jsonl.gz", [row | {"condition": "tuned"} for row in rows])
        return
    if args.controls:
        evidence = json.loads((args.sweep / "evidence.json").read_text(encoding="utf-8"))
        evidence["run"] = args.sweep.name  # where it lay on this machine is nobody's business
        write(args.out / f"{args.results}.jsonl.gz", rows_of(args.sweep / "evidence_items.jsonl"))
        (RESULTS / "studies" / f"{args.results}.json").write_text(
            json.dumps(evidence, indent=2) + "\n", encoding="utf-8"
        )
        return
    results = json.loads((args.sweep / "results.json").read_text(encoding="utf-8"))
    untrained: list[dict[str, Any]] = []
    for cell in results["cells"]:
        for run in cell["runs"]:
            if run["state"] != "done" or args.only not in ("", cell["name"]):
                continue
            items = args.sweep / run["items"]
            rows = rows_of(items)
            base = [row for row in rows if row["condition"] == "untrained"]
            if untrained and base != untrained:
                raise SystemExit(f"{items}: the untrained model's replies are not those of the other runs")
            untrained = base
            draw = f"p{run['projection_seed']}" if run["projection_seed"] else ""
            write(args.out / f"{cell['name']}_s{run['seed']}{draw}.jsonl.gz",
                  [row | {"condition": "tuned"} for row in rows if row["condition"] != "untrained"])  # fmt: skip
            print(items, len(rows))
    if not untrained:
        raise SystemExit(f"no run of {args.sweep} is done")
    write(args.out / "untrained.jsonl.gz", untrained)
    if args.results:
        (RESULTS / "studies" / f"{args.results}.json").write_text(
            json.dumps(results, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
