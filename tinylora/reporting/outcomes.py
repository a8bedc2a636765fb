"""What was measured on held-out items: every condition's counts, from evidence.json or result.json and their items.

Where the items are there (one JSON line each), every count is taken from them, and the JSON file beside them must say
the same: a page is not made of files that do not belong together. Without the items the JSON file's counts are shown.
Leaves out: what the numbers look like (charts, page).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from tinylora.errors import UserError
from tinylora.evaluation.recount import paired_from_counts, recount_evidence, recount_result
from tinylora.evaluation.statistics.paired import PairedResult, Share, paired_result
from tinylora.evaluation.statistics.power import adjusted_p_values, smallest_effect
from tinylora.evaluation.statistics.scores import repetition
from tinylora.evaluation.statistics.split_gain import split_gain
from tinylora.reporting.run_files import (
    AGAIN,
    EVIDENCE,
    GREEDY,
    RESULT,
    Items,
    Row,
    conditions_of_result,
    read_items,
    read_json,
    well_formed,
)
from tinylora.talk import shell_line

BEST = "adapter.safetensors"
MEASURES = ("strict", "value_only", "answered", "stopped")
LABELS = {"strict": "strict", "value_only": "value only", "answered": "format readable", "stopped": "stopped in time"}
ALPHA, POWER = 0.05, 0.8
KINDS = {
    "zero": "v = 0 through the adapter's own path",
    "random": "single random vectors",
    "best_random": "the best of many random vectors",
    "best_shorter": "the best of many shorter random vectors",
    "best_prompt": "the untrained model under the best of several prompts",
    "larger_budget": "the untrained model with a larger token budget",
    "constant": "one constant reply",
    "trained_control": "adapters trained on a control reward",
}
"""Every kind of control there is, for saying which were not run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One condition on the test items. What was not measured is None, or is not among the shares."""

    name: str
    kind: str
    label: str
    shares: Mapping[str, Share]
    length: float | None
    """Mean tokens of a reply, stop token included."""
    repetition: float | None
    against: PairedResult | None
    """The adapter (tuned) against this condition (base), strict; None for the adapter itself."""
    p_adjusted: float | None
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherTask:
    """A task that was not trained, answered before and after."""

    task: str
    num_items: int
    paired: Mapping[str, PairedResult]
    """By measure."""
    p_adjusted: Mapping[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SideEffects:
    """What changed where nothing was trained; `base` and `tuned` are the two models. None: not measured."""

    kl_per_token: float | None
    num_tokens: int | None
    perplexity: Mapping[str, float | None]
    length: Mapping[str, float | None]
    repetition: Mapping[str, float | None]
    tasks: tuple[OtherTask, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """All that is known of a run on held-out items."""

    source: str
    """The JSON file it comes from."""
    items_file: str
    """The file with one line a condition and item; empty if it is not there."""
    protocol: str
    verdict: str
    num_items: int
    outcomes: tuple[Outcome, ...]
    paired: Mapping[str, PairedResult]
    """By measure: the adapter against the untrained model, greedy."""
    sampled: Mapping[str, PairedResult]
    """By measure, sampled at `temperature`, from the evaluation at the run's end."""
    temperature: float | None
    gain: Mapping[str, float] | None
    smallest: Mapping[str, float | None]
    side_effects: SideEffects | None
    account: Mapping[str, Mapping[str, Any]]
    curve: tuple[Mapping[str, float], ...]
    sides: tuple[list[Row], list[Row]] | None
    """Items of the untrained model and of the adapter, in one order."""
    not_run: tuple[str, ...]
    note: str = ""
    """What the file says otherwise than its items, where that was put right."""

    def outcome(self, name: str) -> Outcome | None:
        """A condition by its name."""
        return next((one for one in self.outcomes if one.name == name), None)


def read_evaluation(run: Path) -> Evaluation | None:
    """What the run's evidence.json says, or else its result.json; None where it has neither.

    Raises: UserError for files that are no JSON, lack what they must have, contradict their items, or are of other
    numbers than the run's adapter.
    """
    evidence, result = read_json(run / EVIDENCE), read_json(run / RESULT)
    finals = read_items(run / "result_items.jsonl") if result is not None else {}
    numbers = _numbers_of_adapter(run)
    for path, told in ((run / EVIDENCE, evidence), (run / RESULT, result)):
        _check_numbers(path, told, numbers)
    if evidence is not None:
        with well_formed(run / EVIDENCE):
            if evidence["format"] != 1:
                raise UserError(f"{run / EVIDENCE} has format {evidence['format']}, this version reads 1; {AGAIN}")
            items = read_items(run / "evidence_items.jsonl")
            evidence = recount_evidence(evidence, items)
            found = _evaluation(EVIDENCE, evidence, evidence["conditions"], items)
    elif result is not None:
        with well_formed(run / RESULT):
            result = recount_result(result, finals)
            items = {GREEDY.get(name, name): rows for name, rows in finals.items()}
            found = _evaluation(RESULT, result, conditions_of_result(result), items)
    else:
        return None
    if result is None:
        return found
    with well_formed(run / RESULT):
        result = recount_result(result, finals)
        sampled, temperature = _sampled(result, finals), (result.get("sampled") or {}).get("temperature")
        return replace(found, sampled=sampled, temperature=temperature)


def _numbers_of_adapter(run: Path) -> tuple[int, float] | None:
    """How many, and |v|, of the run's adapter; None where its file is not there, cannot be read, or holds a large
    model's weights."""
    try:
        with safe_open(run / BEST, framework="numpy") as handle:
            count = math.prod(handle.get_slice("v").get_shape())
            if count > 2**24:
                return None
            return count, float(np.linalg.norm(handle.get_tensor("v").astype(np.float64)))
    except (SafetensorError, OSError, ValueError):
        return None


def _check_numbers(path: Path, told: Mapping[str, Any] | None, numbers: tuple[int, float] | None) -> None:
    """Raises: UserError if the file tells of other numbers, as it does when training went on after it was written."""
    if numbers is None:
        return
    count, norm = numbers
    told = told or {}
    if told.get("trained_numbers", count) != count:
        raise UserError(f"{path} tells of {told['trained_numbers']} numbers, the run's {BEST} has {count}; {AGAIN}")
    said = told.get("v_norm")
    if not isinstance(said, (int, float)) or math.isclose(said, norm, rel_tol=1e-4, abs_tol=1e-9):
        return
    then = "make it again with: tinylora eval RUN --controls" if path.name == EVIDENCE else (
        f"go on with: {shell_line('tinylora', 'train', '--resume', path.parent)}"
    )  # fmt: skip
    raise UserError(
        f"{path} is of other numbers than the run's {BEST} (norm {said:.4g} there, {norm:.4g} here), such as those "
        f"before training went on; {then}, or remove the file"
    )


def _evaluation(
    source: str, told: Mapping[str, Any], conditions: Sequence[Mapping[str, Any]], items: Items
) -> Evaluation:
    tuned = items.get("tuned", [])
    outcomes = _with_adjusted([_outcome(one, items.get(one["name"], []), tuned) for one in conditions])
    by_name = {one.name: one for one in outcomes}
    sides = (items["untrained"], tuned) if items.get("untrained") and tuned else None
    paired: dict[str, PairedResult] = {}
    if (against := by_name["untrained"].against) is not None:
        paired["strict"] = against
    for measure in MEASURES[1:]:
        if sides is not None and all(measure in row for side in sides for row in side):
            paired[measure] = _pair(*sides, measure)
        elif measure == "value_only" and "value_only" in told:
            paired[measure] = _stored_pair(told["value_only"])
    gain: dict[str, float] | None = None
    if told.get("gain") is not None:
        gain = {name: float(told["gain"][name]) for name in ("total", "value", "format", "stops")}
    elif sides is not None and "answered" in paired:
        before, after = ([SimpleNamespace(**_reply(row)) for row in side] for side in sides)
        gain = asdict(split_gain(before, after))
    strict = paired["strict"]
    discordant = (strict.won + strict.lost) / strict.base.total
    least = smallest_effect(strict.base.total, discordant, alpha=ALPHA, power=POWER)
    kinds = {one.kind for one in outcomes}
    side_effects = _side_effects(told["side_effects"]) if told.get("side_effects") else None
    return Evaluation(
        source=source,
        items_file=source.replace(".json", "_items.jsonl") if items else "",
        protocol=str(told.get("protocol", "")),
        verdict=str(told["verdict"]),
        note=f"the verdict in {source} is not what its items give; what they give is shown" if told["restated"] else "",
        num_items=strict.base.total,
        outcomes=tuple(outcomes),
        paired=paired,
        sampled={},
        temperature=None,
        gain=gain,
        smallest={"difference": least, "discordant": discordant, "power": POWER, "alpha": ALPHA},
        side_effects=side_effects,
        account={who: dict(one) for who, one in (told.get("account") or {}).items() if one is not None},
        curve=tuple(told.get("curve") or ()),
        sides=sides,
        not_run=(
            *(label for kind, label in KINDS.items() if kind not in kinds),
            *(() if side_effects is not None else ("side effects on neutral text and on other tasks",)),
        ),
    )


def _outcome(told: Mapping[str, Any], rows: list[Row], tuned: list[Row]) -> Outcome:
    name = told["name"]
    shares = {m: Share(told[m]["correct"], told[m]["total"]) for m in MEASURES if m in told}
    counted = {m: _share(rows, m) for m in MEASURES if rows and all(m in row for row in rows)}
    for measure in sorted(shares.keys() & counted.keys()):
        if shares[measure] != counted[measure]:
            here, there = (f"{one.correct} of {one.total}" for one in (shares[measure], counted[measure]))
            raise _contradiction(f"{name}, {measure}", here, there)
    stored = told.get("against_tuned")
    against = _stored_pair(stored) if stored is not None else None
    if rows and tuned and name != "tuned":
        again = _pair(rows, tuned, "strict")
        if against is not None and (against.won, against.lost) != (again.won, again.lost):
            here, there = (f"{one.won} won and {one.lost} lost" for one in (against, again))
            raise _contradiction(f"the adapter against {name}", here, there)
        against = again
    return Outcome(
        name=str(name),
        kind=str(told["kind"]),
        label=str(told["label"]),
        shares={**shares, **counted},
        length=sum(row["num_tokens"] for row in rows) / len(rows) if rows else told.get("length"),
        repetition=told["repetition"] if "repetition" in told else _mean_repetition(rows),
        against=against,
        p_adjusted=(stored or {}).get("p_adjusted"),
        details=told.get("details") or {},
    )


def _with_adjusted(outcomes: list[Outcome]) -> list[Outcome]:
    """result.json has no adjusted p values: those of all its conditions together, as evidence.json has them."""
    known = [one.against.p_value for one in outcomes if one.against is not None]
    if any(one.p_adjusted is not None for one in outcomes) or len(known) < len(outcomes) - 1:
        return outcomes
    adjusted = iter(adjusted_p_values(known))
    return [one if one.against is None else replace(one, p_adjusted=next(adjusted)) for one in outcomes]


def _sampled(result: Mapping[str, Any], finals: Items) -> dict[str, PairedResult]:
    found: dict[str, PairedResult] = {}
    for measure, key in (("strict", "sampled"), ("value_only", "sampled_value_only")):
        if finals.get("base_sampled") and finals.get("tuned_sampled"):
            found[measure] = _pair(finals["base_sampled"], finals["tuned_sampled"], measure)
        elif key in result:
            found[measure] = _stored_pair(result[key])
    return found


def _side_effects(told: Mapping[str, Any]) -> SideEffects:
    def sides(name: str) -> dict[str, float | None]:
        found = told.get(name) or {}
        return {side: found.get(side) for side in ("base", "tuned")}

    tasks = []
    for one in told.get("tasks") or ():
        known = [measure for measure in ("strict", "value_only") if one.get(measure)]
        tasks.append(
            OtherTask(
                task=str(one["task"]),
                num_items=int(one["num_items"]),
                paired={measure: _stored_pair(one[measure]) for measure in known},
                p_adjusted={measure: one[measure].get("p_adjusted") for measure in known},
            )
        )
    return SideEffects(
        kl_per_token=told.get("kl_per_token"),
        num_tokens=told.get("num_tokens"),
        perplexity=sides("perplexity"),
        length=sides("length"),
        repetition=sides("repetition"),
        tasks=tuple(tasks),
    )


def _pair(base: list[Row], tuned: list[Row], measure: str) -> PairedResult:
    if [row["item_id"] for row in base] != [row["item_id"] for row in tuned]:
        raise UserError(f"{base[0]['condition']} and the adapter have answered other items; {AGAIN}")
    before, after = (np.array([float(row[measure]) >= 1 for row in side]) for side in (base, tuned))
    return paired_result(before, after)


def _stored_pair(told: Mapping[str, Any]) -> PairedResult:
    return paired_from_counts("a comparison", told)


def _share(rows: Sequence[Row], measure: str) -> Share:
    return Share(sum(float(row[measure]) >= 1 for row in rows), len(rows))


def _mean_repetition(rows: Sequence[Row]) -> float | None:
    return sum(repetition(str(row["text"])) for row in rows) / len(rows) if rows else None


def _reply(row: Row) -> dict[str, Any]:
    return {"strict": row["strict"], "stopped": bool(row["stopped"]), "answered": bool(row["answered"])}


def _contradiction(what: str, told: str, counted: str) -> UserError:
    return UserError(f"it says {told} for {what}, its items say {counted}; they do not belong together; {AGAIN}")
