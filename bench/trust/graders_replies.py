"""Replies to GSM8K test problems under two published prompts, for bench/trust/graders.py to be compared on.

The model answers the first `--count` problems under `gsm8k-qwen-boxed` and the next ones under `gsm8k-lm-eval`,
greedily, 256 tokens at most, so that some replies are cut off. Kept are the question's id, gold answer and reply.

    python -m bench.trust.graders_replies --model MODEL --data FOLDER_WITH_GSM8K [--count 50]

writes bench/data/grader_replies.jsonl.
"""

import argparse
import json
from pathlib import Path

from bench.common import ROOT
from tinylora.config.recipe import apply_overrides, load_recipe
from tinylora.rollouts.runtime import open_runtime
from tinylora.talk import say_to_stderr

RECIPES = ("gsm8k-qwen-boxed", "gsm8k-lm-eval")
TARGET = ROOT / "bench" / "data" / "grader_replies.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--count", type=int, default=50, help="problems for each prompt")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    base, rows = None, []
    for number, recipe in enumerate(RECIPES):
        settings = [f"model.name={arguments.model}", f"task.path={arguments.data}", "generation.max_new_tokens=256"]
        settings += [f"train.num_threads={arguments.threads}", "adapter.basis=random", "generation.max_batch_rows=16"]
        runtime = open_runtime(apply_overrides(load_recipe(recipe), settings), base=base)
        base = runtime.base
        items = runtime.task.items("test")[number * arguments.count : (number + 1) * arguments.count]
        progress = lambda done, all_: say_to_stderr(f"{done} of {all_}")  # noqa: E731
        results = runtime.answer(items, None, max_new_tokens=256, on_progress=progress)
        runtime.adapter.detach()
        for r in results:
            row = {"id": f"{recipe}/{r.item_id[:12]}", "answer": r.answer, "text": r.text, "stopped": r.stopped}
            rows.append({**row, "model": Path(arguments.model).name})
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
