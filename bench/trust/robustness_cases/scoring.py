"""Replies put before `build_task(...).score`, the public Python surface, in a child for many."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.trust.robustness_cases.inputs import Input, Score

LIMIT_SECONDS = 240.0
CHILD = """
import json, sys, tempfile, pathlib, traceback
from tinylora import PromptConfig, TaskConfig, build_task
from tinylora.errors import UserError
for line in open(sys.argv[1], encoding="utf-8"):
    job = json.loads(line)
    answer = {"number": job["number"]}
    try:
        task = build_task(
            TaskConfig(name="jsonl", path=job["path"], scorer=job["scorer"], scorer_options=job["options"],
                       validation_share=0.0, test_share=0.0),
            PromptConfig(),
        )
        item = task.items("train")[0]
        answer["scores"] = task.score(item, job["reply"])
    except UserError as error:
        answer["refused"] = str(error)
    except BaseException:
        answer["traceback"] = traceback.format_exc()
    print("\\n@" + json.dumps(answer), flush=True)
"""


def score_all(inputs: "Sequence[Input]", folder: Path) -> "Iterator[dict[str, Any]]":
    """A row an input. A child that ends early or hangs is charged to the input it was at; another takes the rest."""
    waiting = list(range(len(inputs)))
    jobs = [_job(number, one.score, folder) for number, one in enumerate(inputs) if one.score is not None]
    while waiting:
        started = time.monotonic()
        answers, end = _child([jobs[number] for number in waiting], folder)
        seconds = (time.monotonic() - started) / len(waiting)
        for number in waiting:
            if number not in answers:
                break
            yield _row(inputs[number], answers[number], seconds)
        else:
            return
        yield _row(inputs[number], {end: f"the child ended here ({end})"}, seconds)
        waiting = waiting[waiting.index(number) + 1 :]


def _job(number: int, score: "Score", folder: Path) -> dict[str, Any]:
    row = {"question": f"question {number}", "answer": score.gold, **score.more}
    path = folder / "scored" / f"{number:04d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text((score.raw or json.dumps(row, ensure_ascii=False)) + "\n", encoding="utf-8")
    return {
        "number": number, "path": str(path), "scorer": score.scorer, "options": score.options, "reply": score.reply,
    }  # fmt: skip


def _child(jobs: list[dict[str, Any]], folder: Path) -> tuple[dict[int, dict[str, Any]], str]:
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", dir=folder, delete=False, encoding="utf-8") as file:
        file.writelines(json.dumps(job) + "\n" for job in jobs)
    command, end = [sys.executable, "-c", CHILD, file.name], "traceback"
    try:
        done = subprocess.run(command, capture_output=True, cwd=folder, env=dict(os.environ), timeout=LIMIT_SECONDS)
        out = done.stdout
    except subprocess.TimeoutExpired as late:
        out, end = late.stdout or b"", "hung"
    answers = [json.loads(line[1:]) for line in out.decode("utf-8", "replace").splitlines() if line.startswith("@{")]
    return {answer["number"]: answer for answer in answers}, end


def _row(one: "Input", answer: dict[str, Any], seconds: float) -> dict[str, Any]:
    from bench.trust.robustness_cases.inputs import has

    score = one.score
    assert score is not None
    why = ""
    if "traceback" in answer or "hung" in answer:
        why = str(answer.get("traceback") or answer["hung"]).strip().splitlines()[-1]
    elif score.strict is None:
        if "refused" not in answer:
            why = f"taken, and scores {answer['scores']}"
        elif not all(has(answer["refused"], words) for words in score.says):
            why = f"refused without {score.says}: {answer['refused']}"
    elif "refused" in answer:
        why = f"refused: {answer['refused']}"
    else:
        got = answer["scores"]
        asked = {"strict": score.strict, "value_only": score.value_only}
        if any(value is not None and got[name] != value for name, value in asked.items()):
            why = ", ".join(f"{name} {got[name]:g}" for name in asked)
    return {
        "name": one.name, "right": one.right, "verdict": "wrong" if why else "right", "why": why,
        "commands": ["build_task(...).score(...)"], "codes": [], "traceback": "traceback" in answer,
        "hung": "hung" in answer, "seconds": round(seconds, 2),
    }  # fmt: skip
