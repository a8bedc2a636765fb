"""Run a study's cells in the order in which they were written down, and put what came out into one file.

A study is a TOML file: [[cell]] with name, block, recipe, seed and perhaps control, set (settings), items, also (other
tasks). A cell that is no control is evaluated under all controls, the trained ones of its recipe among them. Cells that
are done are kept; one that fails is recorded and does not stop the rest; what time does not allow stays "not run".

    python -m bench.studies.study docs/studies/NAME.toml --out runs/NAME [--jobs 2] [--until 9:30] [--save]
    python -m bench.studies.study docs/studies/NAME.toml --out runs/NAME --collect --save [--items docs/studies/NAME]

--collect runs nothing and writes down what is there. --items keeps every answer: one compressed file a cell with
condition, item, reply and scores, from which all counts can be made again. Over the seeds of a recipe every control is
pooled by item (a question answered under three seeds is one question).
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.common import ROOT, finish
from tinylora.evaluation.statistics.paired import pooled_result
from tinylora.evaluation.statistics.power import adjusted_p_values

Cell = dict[str, Any]


def call(words: list[str], log: Path) -> int:
    """A tinylora command in a process of its own, one thread, its talk in a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("ab") as talk:
        talk.write(f"$ tinylora {' '.join(words)}\n".encode())
        talk.flush()
        program = [sys.executable, "-c", "from tinylora.cli import main; main()", *words]
        return subprocess.run(program, env=environment, stdout=talk, stderr=talk, check=False).returncode


def the_run(folder: Path) -> Path | None:
    """The one run folder in there."""
    return next((path.parent for path in folder.glob("*/config.toml")), None)


def train(cell: Cell, folder: Path) -> str:
    """Train a cell, or go on with it; "done", or why not."""
    folder.mkdir(parents=True, exist_ok=True)
    log, run = folder / "talk.txt", the_run(folder)
    if run is not None and (run / "adapter.safetensors").exists():
        return "done"
    changes = [f"train.seed={cell['seed']}", "train.num_threads=1", "eval.num_test=0", *cell.get("set", [])]
    settings = [word for change in changes for word in ("--set", change)]
    control = ["--control", cell["control"]] if cell.get("control") else []
    words = (
        ["train", "--resume", str(run)] if run else ["train", cell["recipe"], "--out", str(folder), *control, *settings]
    )
    code = call(words, log)
    return "done" if code == 0 else f"training ended with {code}, see {log.name}"


def evaluate(cell: Cell, folder: Path, cells: list[Cell], root: Path) -> str:
    """All controls of a trained cell; "done", or why not."""
    run = the_run(folder)
    assert run is not None
    trained = []
    for other in cells:
        if other.get("control") and other["recipe"] == cell["recipe"]:
            control = the_run(root / other["name"])
            if control is not None and (control / "adapter.safetensors").exists():
                trained += ["--trained-control", str(control)]
    also = [word for name in cell.get("also", []) for word in ("--also", name)]
    words = ["eval", str(run), "--controls", "--num-items", str(cell.get("items", 1000)), *trained, *also]
    code = call([*words, "--set", "train.num_threads=1"], folder / "talk.txt")
    return "done" if code == 0 else f"evaluation ended with {code}, see talk.txt"


def summary(cell: Cell, folder: Path) -> dict[str, Any]:
    """What a cell's evidence.json says, without paths of this machine."""
    run = the_run(folder)
    if run is None or not (run / "evidence.json").exists():
        return {}
    evidence = json.loads((run / "evidence.json").read_text())
    evidence["run"] = cell["name"]
    return dict(evidence)


KEPT = ("condition", "item_id", "answer", "text", "strict", "value_only", "answered", "stopped", "num_tokens")


ID = 12
"""Characters of an item's id that are kept: enough to tell items apart."""


def keep_items(cell: Cell, root: Path, to: Path) -> None:
    """A cell's answers without the questions, which the task generates again, as NAME.jsonl.gz."""
    run = the_run(root / cell["name"])
    if run is None or not (run / "evidence_items.jsonl").exists():
        return
    rows = [json.loads(line) for line in (run / "evidence_items.jsonl").read_text().splitlines()]
    short = [{key: row[key][:ID] if key == "item_id" else row[key] for key in KEPT} for row in rows]
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in short)
    to.mkdir(parents=True, exist_ok=True)
    # No time and no name inside: the same answers are the same bytes.
    (to / f"{cell['name']}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))


def pooled(cells: list[Cell], root: Path) -> dict[str, Any]:
    """By recipe, the adapters of all seeds against every condition that all of them have, strict, pooled by item."""
    found: dict[str, Any] = {}
    for recipe in dict.fromkeys(cell["recipe"] for cell in cells):
        sides: list[dict[str, dict[str, bool]]] = []
        for cell in cells:
            run = the_run(root / cell["name"])
            if cell["recipe"] != recipe or cell.get("control") or run is None:
                continue
            if not (run / "evidence.json").exists():
                continue
            mine: dict[str, dict[str, bool]] = {}
            for line in (run / "evidence_items.jsonl").read_text().splitlines():
                row = json.loads(line)
                mine.setdefault(row["condition"], {})[row["item_id"]] = row["strict"] >= 1
            sides.append(mine)
        if not sides:
            continue
        items = sorted(sides[0]["tuned"])
        names = [name for name in sides[0] if name != "tuned" and all(name in side for side in sides)]
        table = {}
        for name in names:
            pairs = [([side[name][i] for i in items], [side["tuned"][i] for i in items]) for side in sides]
            result = pooled_result(pairs)
            table[name] = {
                "mean_share": sum(sum(base) for base, _ in pairs) / len(pairs) / len(items),
                "adapter_minus_it": result.difference,
                "interval": result.interval,
                "won": result.won,
                "lost": result.lost,
                "p_value": result.p_value,
            }
        adjusted = adjusted_p_values([one["p_value"] for one in table.values()])
        for one, p in zip(table.values(), adjusted, strict=True):
            one["p_adjusted"] = p
        found[recipe] = {"seeds": len(sides), "items": len(items), "against": table}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each")
    parser.add_argument("--until", default="", metavar="HH:MM", help="begin nothing after this time of day")
    parser.add_argument("--collect", action="store_true", help="run nothing, write down what is there")
    parser.add_argument("--items", type=Path, default=None, metavar="FOLDER", help="keep every answer there")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results/studies/")
    args = parser.parse_args()
    cells: list[Cell] = tomllib.loads(args.study.read_text())["cell"]
    state: dict[str, dict[str, Any]] = {cell["name"]: {"training": "not run", "evidence": "not run"} for cell in cells}

    def late() -> bool:
        return bool(args.until) and datetime.now().strftime("%H:%M") >= args.until.zfill(5)

    def do(cell: Cell) -> None:
        folder, mine = args.out / cell["name"], state[cell["name"]]
        if late():
            return
        started = time.perf_counter()
        mine["training"] = train(cell, folder)
        mine["training_seconds"] = round(time.perf_counter() - started, 1)
        print(cell["name"], mine, flush=True)

    def judge(cell: Cell) -> None:
        mine = state[cell["name"]]
        if late() or mine["training"] != "done":
            return
        started = time.perf_counter()
        mine["evidence"] = evaluate(cell, args.out / cell["name"], cells, args.out)
        mine["evidence_seconds"] = round(time.perf_counter() - started, 1)
        print(cell["name"], mine, flush=True)

    if args.collect:
        for cell in cells:
            run = the_run(args.out / cell["name"])
            if run is not None and (run / "adapter.safetensors").exists():
                state[cell["name"]]["training"] = "done"
            if cell.get("control"):
                state[cell["name"]]["evidence"] = "none: it is a control of the others"
            elif run is not None and (run / "evidence.json").exists():
                state[cell["name"]]["evidence"] = "done"
    blocks = (
        [] if args.collect else list(dict.fromkeys(cell["block"] for cell in cells))
    )  # a block's trainings, then its evidence
    for block in blocks:
        part = [cell for cell in cells if cell["block"] == block]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(do, part))
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(judge, [cell for cell in part if not cell.get("control")]))
    results = [
        {"cell": cell, **state[cell["name"]], "result": summary(cell, args.out / cell["name"])} for cell in cells
    ]
    if args.items is not None:
        for cell in cells:
            keep_items(cell, args.out, args.items)
    found = {"study": args.study.name, "cells": results, "pooled": pooled(cells, args.out)}
    finish(f"studies/study_{args.study.stem}", found, args.save)


if __name__ == "__main__":
    main()
