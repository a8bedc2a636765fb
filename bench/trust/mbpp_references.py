"""Do MBPP's own solutions pass their own tests in the sandbox, and what does a run cost?

Every reference solution is run as a reply's code would be. Those that fail are run once more without a sandbox (they
are the data set's, not a model's), to tell faults of the data from faults of the sandbox. Then one batch as training
scores it: replies to `--batch` items one after the other, right ones and broken ones in turn.

    python -m bench.trust.mbpp_references --path FOLDER [--batch 96] [--save]

FOLDER holds train.jsonl and test.jsonl of MBPP; without it they come from the hub.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections import Counter
from typing import Any

from bench.common import finish
from tinylora.config.recipe import load_recipe
from tinylora.tasks import build_task
from tinylora.tasks.base import Item
from tinylora.tasks.sandbox.child import VALUE
from tinylora.tasks.sandbox.run import read_test, run_python
from tinylora.tasks.sets.mbpp import PythonTestsScorer


def passes_plainly(item: Item) -> bool:
    """Without a sandbox, asserts as they stand."""
    program = "\n".join([item.answer, item.metadata["setup"], *item.metadata["tests"]])
    return subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="", help="folder with train.jsonl and test.jsonl; empty takes the hub")
    parser.add_argument("--batch", type=int, default=96, help="replies of one training step")
    parser.add_argument(
        "--save", action="store_true", help="keep the result in bench/results/trust/mbpp_references.json"
    )
    arguments = parser.parse_args()

    config = load_recipe("mbpp", [f"task.path={arguments.path}"])
    task = build_task(config.task, config.prompt)
    scorer = task.scorer
    assert isinstance(scorer, PythonTestsScorer)
    splits: dict[str, Any] = {}
    milliseconds: list[float] = []
    failed: list[dict[str, Any]] = []
    forms: Counter[str] = Counter()
    for split in ("train", "validation", "test"):
        passed = 0
        items = task.items(split)
        for item in items:
            forms.update(
                "compared outside" if read_test(test).kind == VALUE else "judged where the code runs"
                for test in item.metadata["tests"]
            )
            started = time.perf_counter()
            outcome = run_python(
                item.answer, item.metadata["tests"], item.metadata["setup"],
                timeout_seconds=scorer.timeout_seconds, memory_mb=scorer.memory_mb,
            )  # fmt: skip
            milliseconds.append(1000 * (time.perf_counter() - started))
            passed += outcome.passed
            if not outcome.passed:
                plainly = passes_plainly(item)
                reason = outcome.reason[:200]
                failed.append({"task_id": item.metadata["task_id"], "reason": reason, "passes_plainly": plainly})
                print(failed[-1], file=sys.stderr, flush=True)
        splits[split] = {"passed": passed, "total": len(items)}
        print(split, splits[split], file=sys.stderr, flush=True)

    batch = task.items("train")[: arguments.batch]
    forms_of_reply = ("```python\n{}\n```", "```python\n{}\nraise ValueError\n```", "It is {}", "```python\n{}")
    started = time.perf_counter()
    for number, item in enumerate(batch):
        task.score(item, forms_of_reply[number % 4].format(item.answer))
    batch_seconds = time.perf_counter() - started
    started = time.perf_counter()
    for item in batch:
        task.score(item, "I do not know.")
    unrun_seconds = time.perf_counter() - started
    quantiles = statistics.quantiles(milliseconds, n=20)
    result = {
        "splits": splits,
        "failed": failed,
        "tests": dict(forms),
        "milliseconds_per_run": {
            "fastest": min(milliseconds), "median": statistics.median(milliseconds), "p95": quantiles[18],
            "slowest": max(milliseconds),
        },
        "batch": {"replies": len(batch), "seconds": batch_seconds, "seconds_without_code": unrun_seconds},
        "timeout_seconds": scorer.timeout_seconds,
        "memory_mb": scorer.memory_mb,
    }  # fmt: skip
    finish("trust/mbpp_references", result, arguments.save)


if __name__ == "__main__":
    main()
