"""result.json and evidence.json counted again: what they say of a gain is computed, and never taken from them.

Where the lines of items are there, their scores count; where they are not, the counts of right items that the file
states. All else (differences, intervals, p values, sentences, verdict) follows from those. A file that states other
numbers than these is refused. Needs no torch.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np

from tinylora.errors import UserError
from tinylora.evaluation.statistics.paired import PairedResult, paired_result, wilson_interval
from tinylora.evaluation.statistics.power import adjusted_p_values, smallest_json
from tinylora.evaluation.statistics.split_gain import split_gain
from tinylora.evaluation.verdict import evidence_verdict, verdict

Told = Mapping[str, Any]
Rows = Mapping[str, Sequence[Mapping[str, Any]]]
"""Lines of a file of items, by condition."""
AGAIN = "make it again with: tinylora eval RUN --controls"
MEASURES = ("strict", "value_only", "answered", "stopped")
LACKS = (KeyError, TypeError, AttributeError, ValueError, IndexError)
"""What reading a file raises that lacks what it must have; `lacks` says it in words."""


def lacks(error: Exception) -> str:
    """What a file is like that raised one of LACKS."""
    return f"lacks {error}" if isinstance(error, KeyError) else f"does not hold what it should ({error})"


def by_condition(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Lines of a file of items, by their condition, in their order."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(str(row.get("condition")), []).append(row)
    return found


def contradiction(what: str, told: object, counted: object) -> UserError:
    """The error for a file that says otherwise than its items."""
    return UserError(f"it says {told} for {what}, its items say {counted}; they do not belong together; {AGAIN}")


def recount_result(told: Told, rows: Rows) -> dict[str, Any]:
    """result.json with all that follows from items computed.

    Raises: UserError where it says otherwise; one of LACKS where it lacks what it must have.
    """
    found = dict(told)
    for key, base, tuned, measure in (
        ("primary", "base_greedy", "tuned_greedy", "strict"),
        ("value_only", "base_greedy", "tuned_greedy", "value_only"),
        ("sampled", "base_sampled", "tuned_sampled", "strict"),
        ("sampled_value_only", "base_sampled", "tuned_sampled", "value_only"),
    ):
        if key in told or key in ("primary", "value_only"):
            found[key] = recount_pair(key, told[key], rows.get(base), rows.get(tuned), measure)
    sides = {"base": rows.get("base_greedy"), "tuned": rows.get("tuned_greedy")}
    for key, field in (("stopped", "stopped"), ("length", "num_tokens")):
        if key in told:
            counted = {side: sum(row[field] for row in own) / len(own) for side, own in sides.items() if own}
            _check_same(key, told[key], counted)
    for key in ("best_prompt", "larger_budget"):
        one, own = told[key], rows.get(f"base_{key}")
        against = recount_pair(
            f"the adapter against {key}", one["against_tuned"], own, rows.get("tuned_greedy"), "strict"
        )
        found[key] = {**one, **recount_share(key, one, own, "strict"), "against_tuned": against}
    found["random"] = [
        {**one, **recount_share(f"random_{number}", one, rows.get(f"random_{number}"), "strict")}
        for number, one in enumerate(told["random"])
    ]
    if isinstance(told.get("v"), list) and len(told["v"]) != told["trained_numbers"]:
        raise contradiction("trained_numbers", told["trained_numbers"], len(told["v"]))
    return _with_verdict(found, verdict(found))


def recount_evidence(told: Told, rows: Rows) -> dict[str, Any]:
    """evidence.json with all that follows from items computed. Raises: as `recount_result`."""
    if "untrained" not in {one["name"] for one in told["conditions"]}:
        raise KeyError("untrained")
    conditions = []
    for one in told["conditions"]:
        name, own, again = str(one["name"]), rows.get(str(one["name"])), dict(one)
        for measure in MEASURES:
            if measure in one:
                again[measure] = recount_share(f"{name}, {measure}", one[measure], own, measure)
        if one.get("against_tuned") is not None:
            what = f"the adapter against {name}"
            again["against_tuned"] = recount_pair(what, one["against_tuned"], own, rows.get("tuned"), "strict")
        conditions.append(again)
    _adjust([one["against_tuned"] for one in conditions if one.get("against_tuned") is not None])
    untrained, tuned = rows.get("untrained"), rows.get("tuned")
    primary = next(one for one in conditions if one["name"] == "untrained")["against_tuned"]
    total = primary["base"]["total"]
    if told["num_items"] != total:
        raise contradiction("num_items", told["num_items"], total)
    found = {**told, "conditions": conditions}
    found["value_only"] = recount_pair("value_only", told["value_only"], untrained, tuned, "value_only")
    if untrained and tuned and all("answered" in row for side in (untrained, tuned) for row in side):
        sides = [[SimpleNamespace(**{name: row[name] for name in ("strict", "stopped", "answered")}) for row in side]
                 for side in (untrained, tuned)]  # fmt: skip
        found["gain"] = asdict(split_gain(*sides))
        _check_same("gain", told.get("gain") or {}, found["gain"])
    effect = smallest_json(total, (primary["won"] + primary["lost"]) / total)
    _check_same("smallest_effect", told.get("smallest_effect") or {}, effect)
    found["smallest_effect"] = effect
    if told.get("side_effects"):
        found["side_effects"] = {**told["side_effects"], "tasks": _other_tasks(told["side_effects"].get("tasks") or ())}
    return _with_verdict(found, evidence_verdict(found))


def _with_verdict(found: dict[str, Any], text: str) -> dict[str, Any]:
    """The verdict that the numbers give; `restated` is whether the file has another one, by an edit or of old."""
    return {**found, "verdict": text, "restated": found["verdict"] != text}


def _other_tasks(told: Sequence[Told]) -> list[dict[str, Any]]:
    """Other tasks have no file of items, so their counts count."""
    tasks = [dict(one) for one in told]
    for measure in ("strict", "value_only"):
        known = [one for one in tasks if one.get(measure)]
        for one in known:
            one[measure] = recount_pair(f"{one['task']}, {measure}", one[measure], None, None, measure)
        _adjust([one[measure] for one in known])
    return tasks


def _adjust(pairs: Sequence[dict[str, Any]]) -> None:
    """Adjusted p values of comparisons that are read together, in place of those that were told."""
    for one, p in zip(pairs, adjusted_p_values([one["p_value"] for one in pairs]), strict=True):
        _check_same("an adjusted p value", {"p": one.get("p_adjusted", p)}, {"p": p})
        one["p_adjusted"] = p


def recount_share(what: str, told: Told, rows: Sequence[Told] | None, measure: str) -> dict[str, Any]:
    """One share and its interval, from lines of items where there are any. Raises: as `recount_result`."""
    right, total = int(told["correct"]), int(told["total"])
    if rows and all(measure in row for row in rows):
        counted = int(_right(rows, measure).sum()), len(rows)
        if counted != (right, total):
            raise contradiction(what, f"{right} of {total}", "{} of {}".format(*counted))
    found: dict[str, Any] = {"correct": right, "total": total}
    if "interval" in told:
        found["interval"] = list(wilson_interval(right, total))
        _check_same(what, {"interval": told["interval"]}, found)
    return {**told, **found}


def recount_pair(
    what: str, told: Told, base: Sequence[Told] | None, tuned: Sequence[Told] | None, measure: str
) -> dict[str, Any]:
    """A paired comparison, from lines of items or, without them, from its counts. Raises: as `recount_result`."""
    if base and tuned:
        if [row["item_id"] for row in base] != [row["item_id"] for row in tuned]:
            raise UserError(f"{base[0]['condition']} and the adapter have answered other items; {AGAIN}")
        paired = paired_result(_right(base, measure), _right(tuned, measure))
    else:
        paired = paired_from_counts(what, told)
    if (told["won"], told["lost"]) != (paired.won, paired.lost):
        raise contradiction(
            what, f"{told['won']} won and {told['lost']} lost", f"{paired.won} won and {paired.lost} lost"
        )
    counts = (told["base"]["correct"], told["tuned"]["correct"], told["base"]["total"])
    counted = (paired.base.correct, paired.tuned.correct, paired.base.total)
    if counts != counted:
        raise contradiction(what, *("{} and {} right of {}".format(*one) for one in (counts, counted)))
    found = {
        "base": {**told["base"], "correct": paired.base.correct, "total": paired.base.total},
        "tuned": {**told["tuned"], "correct": paired.tuned.correct, "total": paired.tuned.total},
        "won": paired.won, "lost": paired.lost, "p_value": paired.p_value, "difference": paired.difference,
        "interval": list(paired.interval), "text": paired.text(),
    }  # fmt: skip
    _check_same(what, {name: told[name] for name in ("p_value", "difference", "interval")}, found)
    return {**told, **found}


def paired_from_counts(what: str, told: Told) -> PairedResult:
    """The comparison that has these counts of right, won and lost items. Raises: UserError if there is none."""
    base, tuned, total = told["base"]["correct"], told["tuned"]["correct"], told["base"]["total"]
    won, lost = told["won"], told["lost"]
    both, neither = base - lost, total - base - won
    if not all(isinstance(one, int) and one >= 0 for one in (won, lost, both, neither)) or both + won != tuned:
        raise UserError(
            f"its counts for {what} contradict each other: {base} and {tuned} of {total} right, {won} won and {lost} "
            f"lost; {AGAIN}"
        )
    sides = np.repeat([[True, True], [False, True], [True, False], [False, False]], [both, won, lost, neither], axis=0)
    return paired_result(sides[:, 0], sides[:, 1])


def _right(rows: Sequence[Told], measure: str) -> Any:
    return np.array([float(row[measure]) >= 1 for row in rows])


def _check_same(what: str, told: Told, counted: Told) -> None:
    """Raises: UserError where a number that both have is another one, rounding aside."""
    for name, value in told.items():
        if name not in counted or isinstance(value, str):
            continue
        pairs = zip(value, counted[name], strict=True) if isinstance(value, list) else [(value, counted[name])]
        for one, other in pairs:
            if one is other is None:
                continue
            if None in (one, other) or not math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9):
                raise contradiction(f"{what}, {name}", one, other)
