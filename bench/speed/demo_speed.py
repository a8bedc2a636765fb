"""How much faster is the demo than at another commit, on this machine, and is its gain still there?

Checks the other commit out into a folder of its own and trains that commit's demo recipe with the code of both, one
after the other, each in a process of its own with the same interpreter, threads and caches. Model and basis are in the
cache before either clock starts.

    python -m bench.speed.demo_speed [--before f4bea3c] [--save]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.common import ROOT, finish, load


def demo(code: Path, recipe: Path, out: Path, settings: list[str]) -> dict[str, Any]:
    """Train a recipe with the code in that folder; what its result.json says, and the seconds from start to end."""
    command = [sys.executable, "-m", "tinylora", "train", str(recipe), "--out", str(out), *settings]
    if not (code / "tinylora" / "__main__.py").exists():
        command[1:3] = ["-c", "from tinylora.cli import main; main()"]
    started, before, cpu_before = time.perf_counter(), load(), cpu_seconds()
    done = subprocess.run(
        command, cwd=code, env={**os.environ, "PYTHONPATH": str(code)}, stdout=subprocess.DEVNULL, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"the demo in {code} ended with {done.returncode}")
    (run,) = (path.parent for path in out.glob("*/config.toml"))
    if not settings:
        result = json.loads((run / "result.json").read_text())
        facts = {
            name: result[name] for name in ("trained_numbers", "seconds_trained", "primary", "value_only", "verdict")
        }
    else:
        facts = {}
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds() - cpu_before, 1),
        "load_before": before,
        **facts,
    }


def cpu_seconds() -> float:
    """Of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="f4bea3c", help="the commit to compare with")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results/speed/demo_speed.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(folder / "before"), args.before], cwd=ROOT, check=True
        )
        recipe = folder / "before" / "recipes" / "demo.toml"
        try:
            warm = ["--set", "train.steps=1", "--set", "eval.num_test=0", "--set", "eval.num_validation=8"]
            for name, code in (("before", folder / "before"), ("now", ROOT)):
                demo(code, recipe, folder / f"warm-{name}", warm)
            now = demo(ROOT, recipe, folder / "now", [])
            before = demo(folder / "before", recipe, folder / "runs-before", [])
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(folder / "before")], cwd=ROOT, check=False)
    result = {
        "speedup": round(before["seconds"] / now["seconds"], 2),
        "cpu_seconds_ratio": round(before["cpu_seconds"] / now["cpu_seconds"], 2),
        "training_speedup": round(before["seconds_trained"] / now["seconds_trained"], 2),
        "before_commit": args.before,
        "now": now,
        "before": before,
    }
    finish("speed/demo_speed", result, args.save)


if __name__ == "__main__":
    main()
