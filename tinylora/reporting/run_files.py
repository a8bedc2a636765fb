"""The JSON files of a run's folder, read and checked: what a report is made of. Knows no statistics and no page."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinylora.errors import UserError
from tinylora.evaluation.lengths import random_label
from tinylora.system import strict_json
from tinylora.system.jsonl import read_jsonl
from tinylora.system.reading import MOST_DATA_BYTES

Row = dict[str, Any]
Items = dict[str, list[Row]]

EVIDENCE, RESULT = "evidence.json", "result.json"
GREEDY = {
    "base_greedy": "untrained",
    "tuned_greedy": "tuned",
    "base_best_prompt": "best_prompt",
    "base_larger_budget": "larger_budget",
}
"""Conditions of result_items.jsonl by the names that evidence_items.jsonl has for them."""
AGAIN = "make it again with: tinylora eval RUN --controls"
_FIELDS = {"condition", "item_id", "question", "answer", "text", "strict", "value_only", "stopped", "num_tokens"}


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None if there is no such file. Raises: UserError for anything else."""
    if not os.path.lexists(path):
        return None
    found = strict_json.read_json(path, "mend it, or remove it", MOST_DATA_BYTES)
    if not isinstance(found, dict):
        raise UserError(f"{path} must be a JSON object, got {type(found).__name__}; mend it, or remove it")
    return found


def read_items(path: Path) -> Items:
    """Lines by condition, in their order. Raises: UserError for lines that are no items."""
    items: Items = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        if missing := _FIELDS - set(row):
            raise UserError(f"{path}, line {number} lacks {', '.join(sorted(missing))}; {AGAIN}")
        items.setdefault(str(row["condition"]), []).append(row)
    return items


@contextmanager
def well_formed(path: Path) -> Iterator[None]:
    """Around code that reads what `path` held. Raises: UserError where that is not what it expects."""
    try:
        yield
    except UserError as error:
        if str(path.parent) in str(error):
            raise
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"does not hold what it should ({error})"
        raise UserError(f"{path} {what}: it is damaged, or of another version; {AGAIN}") from error


def conditions_of_result(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The greedy conditions of result.json in the shape that they have in evidence.json."""
    total = result["primary"]["base"]["total"]
    found: list[dict[str, Any]] = []
    for name, side, label in (
        ("untrained", "base", "untrained model, same prompt"),
        ("tuned", "tuned", f"{result['trained_numbers']} trained numbers"),
    ):
        found.append(
            {
                "name": name,
                "kind": name,
                "label": label,
                "strict": result["primary"][side],
                "value_only": result["value_only"][side],
                "stopped": {"correct": round(result["stopped"][side] * total), "total": total},
                "length": result["length"][side],
            }
        )
    found[0]["against_tuned"] = result["primary"]
    for index, one in enumerate(result["random"]):
        label = random_label(index, one.get("length", 1.0))
        found.append({"name": f"random_{index}", "kind": "random", "label": label, "strict": one})
    best, larger = result["best_prompt"], result["larger_budget"]
    found.append(
        {
            "name": "best_prompt",
            "kind": "best_prompt",
            "label": f"untrained model, best of {len(best['validation'])} prompts by validation",
            "strict": best,
            "against_tuned": best["against_tuned"],
            "details": {"prompt": best["name"], "validation": best["validation"]},
        }
    )
    found.append(
        {
            "name": "larger_budget",
            "kind": "larger_budget",
            "label": f"untrained model, up to {larger['max_new_tokens']:,} tokens",
            "strict": larger,
            "against_tuned": larger["against_tuned"],
            "details": {"max_new_tokens": larger["max_new_tokens"]},
        }
    )
    return found
