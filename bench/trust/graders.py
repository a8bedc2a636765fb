"""Do our scorers judge as others do? The same replies under our scorers, math-verify and lm-evaluation-harness.

Replies: bench/data/grader_replies.jsonl, a 0.5B model's to 100 GSM8K problems (bench/trust/graders_replies.py), and
bench/data/grader_cases.jsonl, written by hand, with `right`: whether a reader takes the reply's answer for right.

math-verify is called as its documentation does. The harness's verdicts are its own code's, run in an interpreter of
its own (--peer-python; bench/peers/README.md): gsm8k's two filters with its exact match, and the answer checks of
hendrycks_math and minerva_math on what stands in the last box. Every disagreement of a pair is listed with both
verdicts and, from bench/data/grader_notes.jsonl, who is right and why, judged by reading: ours, theirs, neither, or
format (the value is right, and our strict score asks for a form that the reply does not have).

    python -m bench.trust.graders [--peer-python PATH] [--save]

Talk goes to stderr; the last line of stdout is the result as JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from bench.common import ROOT, finish
from tinylora.config.recipe import load_recipe
from tinylora.tasks.build import make_scorer
from tinylora.tasks.scorers.text import Scorer, TextScorer

DATA = ROOT / "bench" / "data"
DIRECT = "math-verify, called directly"
STRICT_MATCH, FLEXIBLE = "lm-eval gsm8k strict-match", "lm-eval gsm8k flexible-extract"
HENDRYCKS, MINERVA = "lm-eval hendrycks_math on the box", "lm-eval minerva_math on the box"

PAIRS = (
    ("gsm8k-lm-eval strict", STRICT_MATCH),
    ("number value_only", FLEXIBLE),
    ("number (final) strict", FLEXIBLE),
    ("boxed strict", HENDRYCKS),
    ("boxed strict", MINERVA),
    ("boxed strict", "math-verify strict"),
    ("math-verify strict", HENDRYCKS),
    ("math-verify strict", MINERVA),
    ("math-verify value_only", DIRECT),
)
"""(ours, theirs), but for the third with boxed: two of ours."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def outputs() -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for name in ("grader_replies", "grader_cases")
        for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def our_scorers() -> dict[str, Scorer]:
    lm_eval = load_recipe("gsm8k-lm-eval").task
    return {
        "number": make_scorer("number", {}),
        "number (final)": make_scorer("number", {"style": "final"}),
        "boxed": make_scorer("boxed", {}),
        "math-verify": make_scorer("math-verify", {}),
        "gsm8k-lm-eval": make_scorer(lm_eval.scorer, lm_eval.scorer_options),
    }


def our_verdicts(replies: list[dict[str, Any]]) -> dict[str, list[bool | None]]:
    """By "scorer score"; None where a scorer cannot take the gold answer."""
    found: dict[str, list[bool | None]] = {}
    for name, scorer in our_scorers().items():
        assert isinstance(scorer, TextScorer)
        for one in replies:
            try:
                scorer.check_answer(one["answer"])
            except ValueError:  # a number scorer, and an answer that is none
                scores: dict[str, float] = {}
            else:
                scores = scorer.score(one["answer"], one["text"])
            for kind in ("strict", "value_only"):
                found.setdefault(f"{name} {kind}", []).append(scores[kind] == 1.0 if scores else None)
    return found


def direct(replies: list[dict[str, Any]]) -> list[bool]:
    from math_verify import parse, verify

    return [bool(verify(parse(f"${one['answer']}$"), parse(one["text"]))) for one in replies]


def peer_verdicts(replies: list[dict[str, Any]], python: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        job = Path(scratch) / "job.json"
        job.write_text(json.dumps([{"answer": one["answer"], "text": one["text"]} for one in replies]))
        script = str(ROOT / "bench" / "peers" / "graders_peer.py")
        done = subprocess.run([python, script, str(job)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{Path(script).name} failed: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def notes() -> dict[tuple[str, str, str], dict[str, str]]:
    """(ours, theirs, id of the reply) to {"right", "note"}; one line of the file may hold for many ids and pairs."""
    found = {}
    for line in (DATA / "grader_notes.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for ours, theirs in row["pairs"]:
            for name in row["ids"]:
                found[ours, theirs, name] = {"right": row["right"], "note": row["note"]}
    return found


LETTERS = {True: "1", False: "0", None: "-", "AssertionError": "!"}
"""How verdicts are kept, one letter a reply: right, wrong, a gold answer that the scorer cannot take, a crash."""


def disagreements(replies: list[dict[str, Any]], verdicts: dict[str, list[Any]]) -> list[dict[str, Any]]:
    judged, listed = notes(), []
    for ours, theirs in PAIRS:
        if theirs not in verdicts:
            continue
        for one, a, b in zip(replies, verdicts[ours], verdicts[theirs], strict=True):
            if a is not None and b is not None and a != b:
                note = judged.get((ours, theirs, one["id"]), {"right": "not judged", "note": ""})
                row = {
                    "ours": ours,
                    "theirs": theirs,
                    "id": one["id"],
                    "kind": one.get("kind", "reply"),
                    "verdicts": [a, b],
                }
                listed.append({**row, "answer": one["answer"], "end": one["text"][-80:], **note})
    return listed


def agreement(replies: list[dict[str, Any]], verdicts: dict[str, list[Any]], listed: list[dict[str, Any]]) -> Any:
    """Per pair: outputs compared, disagreements, and of these who was right."""
    rows = []
    for ours, theirs in PAIRS:
        if theirs not in verdicts:
            continue
        both = [a is not None and b is not None for a, b in zip(verdicts[ours], verdicts[theirs], strict=True)]
        mine = [row for row in listed if (row["ours"], row["theirs"]) == (ours, theirs)]
        who = Counter(row["right"] for row in mine)
        replied = sum(row["kind"] == "reply" for row in mine)
        rows.append({"ours": ours, "theirs": theirs, "compared": sum(both), "disagreements": len(mine),
                     "on_model_replies": replied, "right": dict(sorted(who.items()))})  # fmt: skip
    return rows


def asked_format(grader: str) -> str:
    """What a reply must hold for this grader to find its answer; empty for those that look anywhere."""
    if grader.startswith("gsm8k-lm-eval strict") or grader == STRICT_MATCH:
        return "####"
    return "\\boxed" if grader in ("boxed strict", "math-verify strict", HENDRYCKS, MINERVA) else ""


def against_the_reader(replies: list[dict[str, Any]], verdicts: dict[str, list[Any]]) -> dict[str, dict[str, int]]:
    """On the cases written by hand that hold the format asked for: right answers refused, wrong ones taken."""
    table = {}
    for name, given in verdicts.items():
        if name in ("number strict", "number (final) strict"):  # their format is the whole reply, or its last line
            continue
        pairs = [
            (one["right"], a)
            for one, a in zip(replies, given, strict=True)
            if "right" in one and a is not None and asked_format(name) in one["text"]
        ]
        table[name] = {
            "cases": len(pairs),
            "right_but_refused": sum(right and a is not True for right, a in pairs),
            "wrong_but_taken": sum(not right and a is True for right, a in pairs),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=str(ROOT / ".venv-interop" / "bin" / "python"))
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results/trust/graders.json")
    arguments = parser.parse_args()
    replies = outputs()
    verdicts: dict[str, list[Any]] = {**our_verdicts(replies), DIRECT: direct(replies)}
    peer: dict[str, Any] = {"version": None, "left_out": {}}
    if Path(arguments.peer_python).exists():
        peer = peer_verdicts(replies, arguments.peer_python)
        verdicts.update(peer["verdicts"])
    else:
        say(f"left out: lm-evaluation-harness, there being no {arguments.peer_python} (make interop-setup)")
    for name, reason in peer["left_out"].items():
        say(f"left out: {name} ({reason})")
    listed = disagreements(replies, verdicts)
    for row in listed:
        a, b = ("right" if v is True else "wrong" if v is False else v for v in row["verdicts"])
        say(f"{row['id']} [{row['kind']}] gold {row['answer']!r}, reply ...{row['end']!r}")
        say(f"    {row['ours']}: {a}; {row['theirs']}: {b}; in the right: {row['right']}. {row['note']}")
    result = {
        "outputs": len(replies),
        "disagreements": len(listed),
        "not_judged": sum(row["right"] == "not judged" for row in listed),
        "model_replies": sum("model" in one for one in replies),
        "cases_by_hand": sum("right" in one for one in replies),
        "pairs": agreement(replies, verdicts, listed),
        "against_the_reader": against_the_reader(replies, verdicts),
        "lm_eval": peer["version"],
        "left_out": peer["left_out"],
        "listed": listed,
        "verdicts": {name: "".join(LETTERS[v] for v in row) for name, row in verdicts.items()},
    }
    finish("trust/graders", result, arguments.save, packages=("math-verify", "latex2sympy2-extended", "sympy"))


if __name__ == "__main__":
    main()
