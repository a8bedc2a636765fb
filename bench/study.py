"""Run a study's cells in the order in which they were written down, and put what came out into one file.

A study is a TOML file: [[cell]] with name, block, recipe, seed and perhaps control, set (settings), items, also (other
tasks). A cell that is no control is evaluated under all controls, the trained ones of its recipe among them. Cells that
are done are kept; one that fails is recorded and does not stop the rest; what time does not allow stays "not run".

    python bench/study.py docs/studies/NAME.toml --out runs/NAME [--jobs 2] [--until 9:30] [--save]
"""

import argparse
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

from common import ROOT, finish

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
    if run is not None and (run / "adapter.tinylora").exists():
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
            if control is not None and (control / "adapter.tinylora").exists():
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each")
    parser.add_argument("--until", default="", metavar="HH:MM", help="begin nothing after this time of day")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results/")
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

    blocks = list(dict.fromkeys(cell["block"] for cell in cells))  # a block's trainings, then its evidence
    for block in blocks:
        part = [cell for cell in cells if cell["block"] == block]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(do, part))
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(judge, [cell for cell in part if not cell.get("control")]))
    results = [
        {"cell": cell, **state[cell["name"]], "result": summary(cell, args.out / cell["name"])} for cell in cells
    ]
    finish(f"study_{args.study.stem}", {"study": args.study.name, "cells": results}, args.save)


if __name__ == "__main__":
    main()
