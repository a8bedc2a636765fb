"""What becomes of the inputs that people's data, models and machines bring: the right outcome, or something else?

Each input is given to the command line in a child process, with a data folder, a cache and tiny random models of its
own; where a scorer's verdict is the question, to `build_task(...).score` in a child for many. `wrong` counts those with
another outcome than the one stated beside it, a child that hangs included; `tracebacks` those where a child showed a
Python traceback, was ended by a signal, or exited with code 1 where nothing had failed. An input that this machine does
not allow (no root, no namespaces) is skipped and counted apart.

Children are forked from a process that has imported torch, which saves each of them ten seconds; what comes before
that import (encodings, arguments that are no UTF-8) is asked of a fresh interpreter. `--fresh` starts one for each.

    python -m bench.trust.robustness [--only PATTERN] [--list] [--fresh] [--save]

PATTERN is a part of a name, or a regular expression. Inputs are in bench/trust/robustness_cases/, a file a theme.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.common import ROOT, finish


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="inputs whose name holds this")
    parser.add_argument("--list", action="store_true", help="print the names and what is right; run nothing")
    parser.add_argument("--fresh", action="store_true", help="a fresh interpreter for every child")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it there")
    parser.add_argument("--rows", type=Path, help="write every row here as it comes, as JSONL")
    parser.add_argument("--save", action="store_true", help="keep the result under bench/results/")
    given = parser.parse_args(arguments)

    from bench.trust.robustness_cases import INPUTS

    chosen = [one for one in INPUTS if not given.only or re.search(given.only, one.name)]
    chosen.sort(key=lambda one: one.name[:2])
    if not chosen:
        raise SystemExit(f"no input's name matches {given.only!r}; --list prints them")
    if given.list:
        for one in chosen:
            print(f"{one.name}\n    right: {one.right}")
        print(f"{len(chosen)} inputs")
        return
    # Not TemporaryDirectory: forked children, too, would remove it at their end.
    folder = (given.keep or Path(tempfile.mkdtemp(prefix="robustness-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        strangers_machine(folder)
        result = try_all(chosen, folder, given)
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
    finish("trust/robustness", result, given.save)
    if result["wrong"] or result["tracebacks"]:
        raise SystemExit(1)


def strangers_machine(folder: Path) -> None:
    """Make this process, before torch is imported, one on a machine that is nobody's: home, cache, one thread."""
    mine = {name: value for name, value in os.environ.items() if name in ("PATH", "LD_LIBRARY_PATH")}
    os.environ.clear()
    for name in ("home", "cache", "tmp", "bytecode"):
        (folder / name).mkdir(exist_ok=True)
    home = folder / "home"
    os.environ.update(
        mine, HOME=str(home), XDG_CACHE_HOME=str(home / ".cache"), XDG_DATA_HOME=str(home / ".local" / "share"),
        XDG_CONFIG_HOME=str(home / ".config"), XDG_STATE_HOME=str(home / ".local" / "state"),
        TINYLORA_CACHE=str(folder / "cache"), TMPDIR=str(folder / "tmp"), HF_HOME=str(home / "hf"),
        HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false",
        LANG="C.UTF-8", PYTHONPATH=str(ROOT), PYTHONPYCACHEPREFIX=str(folder / "bytecode"), COLUMNS="110",
    )  # fmt: skip
    tempfile.tempdir = None  # it is looked up once


def try_all(chosen: list[Any], folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """A row an input, and the counts."""
    from bench.trust.robustness_cases.inputs import Judge

    judge = Judge(folder, fresh=given.fresh)
    rows = []
    for row in judge.rows(chosen):
        rows.append(row)
        verdict = "ok" if row["verdict"] == "right" else row["verdict"].upper()
        print(f"{verdict:7} {row['seconds']:6.1f} s  {row['name']}", file=sys.stderr, flush=True)
        if row["verdict"] not in ("right", "skipped"):
            print(f"        {row['why']}", file=sys.stderr, flush=True)
        if given.rows:
            with given.rows.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
    wrong = [row["name"] for row in rows if row["verdict"] == "wrong"]
    tracebacks = [row["name"] for row in rows if row["traceback"]]
    return {
        "inputs": sum(row["verdict"] != "skipped" for row in rows),
        "wrong": len(wrong),
        "tracebacks": len(tracebacks),
        "hangs": sum(row["hung"] for row in rows),
        "skipped": sum(row["verdict"] == "skipped" for row in rows),
        "cpu_seconds": round(sum(row.get("cpu_seconds", row["seconds"]) for row in rows), 1),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "wrong_ones": wrong,
        "traceback_ones": tracebacks,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
