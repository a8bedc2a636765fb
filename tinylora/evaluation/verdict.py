"""What the numbers of evidence.json allow one to say, in plain words and no more."""

from collections.abc import Mapping
from typing import Any

from tinylora.evaluation.lengths import randoms_in_words
from tinylora.talk import shell_line

LEVEL = 0.05


def evidence_verdict(evidence: Mapping[str, Any]) -> str:
    """One sentence on the gain with its uncertainty, then one for each thing that speaks against crediting it.

    A control "does as well" if the adapter is not better than it on the same items beyond chance (adjusted p < 0.05).
    """
    conditions = {one["name"]: one for one in evidence["conditions"]}
    primary = conditions["untrained"]["against_tuned"]
    low, high = primary["interval"]
    span = (
        f"{100 * primary['difference']:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f}, "
        f"p = {primary['p_value']:.2g})"
    )
    count = evidence["trained_numbers"]
    numbers = f"{count} trained number{'s' if count != 1 else ''}"
    what = f"with {numbers} strict accuracy on {evidence['num_items']:,} held-out items"
    if primary["p_value"] >= LEVEL:
        text = f"No gain shown: {what} differs by {span}, which chance can explain."
        return text + " " + _sentence(evidence["smallest_effect"]["text"])
    if primary["difference"] < 0:
        return f"Worse: {what} fell by {span}."
    equal = [
        one["label"]
        for one in conditions.values()
        if one["name"] not in ("untrained", "tuned", "zero") and not _beaten(one["against_tuned"])
    ]
    head = "Better" if not equal else "Better than the untrained model, and not shown to be better than every control"
    text = f"{head}: {what} rose by {span}. {_where(evidence)}"
    if equal:
        text += f" It is not shown to be better than: {'; '.join(equal)}."
    else:
        text += " It beats every control that was run beyond chance."
    if conditions.get("zero", {}).get("details", {}).get("texts_that_differ"):
        differ = conditions["zero"]["details"]["texts_that_differ"]
        text += f" Mind that v = 0 through the adapter path changed {differ} replies, which it must not."
    return text


def _where(evidence: Mapping[str, Any]) -> str:
    gain, value = evidence["gain"], evidence["value_only"]
    parts = ", ".join(
        f"{_points(gain[name])} {label}"
        for name, label in (("value", "right values"), ("format", "format"), ("stops", "stopping in time"))
    )
    rises = value["p_value"] < LEVEL and value["difference"] > 0
    tail = (
        "the value-only score rises too, so it is more than format or stopping"
        if rises
        else "the value-only score does not rise beyond chance, so do not call it skill"
    )
    return f"Of that: {parts}; {tail}."


def _points(share: float) -> str:
    """Signed, in points; what rounds to nothing is 0.0, without a sign."""
    return f"{100 * share:+.1f}" if abs(share) >= 0.0005 else "0.0"


def _beaten(paired: Mapping[str, Any]) -> bool:
    return paired["difference"] > 0 and paired["p_adjusted"] < LEVEL


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def format_evidence(evidence: Mapping[str, Any]) -> str:
    """The evidence as lines for people."""
    width = max(len(one["label"]) for one in evidence["conditions"])
    lines = [
        f"{evidence['model']}, {evidence['task']}: {evidence['num_items']:,} held-out items, greedy, at most "
        f"{evidence['decoding']['max_new_tokens']} tokens",
        "",
        f"{'':<{width}}  {'strict':>22}  {'value only':>10}  {'stopped':>7}  the adapter against it",
    ]
    for one in evidence["conditions"]:
        low, high = one["strict"]["interval"]
        share = lambda s: f"{100 * s['correct'] / s['total']:.1f} %"  # noqa: E731
        strict = f"{share(one['strict'])} ({100 * low:.1f} to {100 * high:.1f})"
        against = one["against_tuned"]
        beside = ""
        if against is not None:
            beside = (
                f"{100 * against['difference']:+.1f} points, {against['won']} won, {against['lost']} lost, "
                f"adjusted p = {against['p_adjusted']:.2g}"
            )
        value, stopped = share(one["value_only"]), share(one["stopped"])
        lines.append(f"{one['label']:<{width}}  {strict:>22}  {value:>10}  {stopped:>7}  {beside}")
    gain, side = evidence["gain"], evidence["side_effects"]
    lines += [
        "",
        f"gain {_points(gain['total'])} points = right values {_points(gain['value'])}, format "
        f"{_points(gain['format'])}, stopping {_points(gain['stops'])} (Shapley shares of the three)",
        f"value only: {evidence['value_only']['text']}",
        evidence["smallest_effect"]["text"],
        f"side effects on {side['num_tokens']:,} tokens of neutral text: KL {side['kl_per_token']:.2e} nats a token, "
        f"perplexity {side['perplexity']['base']:.2f} -> {side['perplexity']['tuned']:.2f}; length "
        f"{side['length']['base']:.1f} -> {side['length']['tuned']:.1f} tokens, repetition "
        f"{side['repetition']['base']:.3f} -> {side['repetition']['tuned']:.3f}",
    ]
    for one in side["tasks"]:
        lines.append(f"  {one['task']}: {one['strict']['text']}; adjusted p = {one['strict']['p_adjusted']:.2g}")
    for who, account in evidence["account"].items():
        if account is not None:
            lines.append(f"{who}: {_account(account)}")
    lines += [
        "95 % Wilson intervals; exact McNemar on the same items; p adjusted by Benjamini-Hochberg",
        "",
        evidence["verdict"],
    ]
    return "\n".join(lines)


def _account(account: Mapping[str, Any]) -> str:
    parts = [f"{account['tokens_sampled']:,} tokens sampled"]
    if account["distinct_problems"] is not None:
        parts.append(f"{account['distinct_problems']:,} distinct problems")
    if account["seconds"]:
        parts.append(f"{account['seconds'] / 60:.1f} minutes")
    if account["cpu_hours"]:
        parts.append(f"{account['cpu_hours']:.2f} core hours")
    if account["gpu_hours"]:
        parts.append(f"{account['gpu_hours']:.2f} GPU hours")
    if account["flops"]:
        parts.append(f"{account['flops']:.2e} operations")
    if account["peak_memory_bytes"]:
        parts.append(f"{account['peak_memory_bytes'] / 2**20:,.0f} MiB at most")
    if account["energy_kwh"] is not None:
        parts.append(f"about {account['energy_kwh']:.3g} kWh at {account['prices']['watts']:g} W a core or GPU")
    if account["money"] is not None:
        parts.append(f"{account['money']:.2f} {account['prices']['currency']}")
    return ", ".join(parts)


MOST_NUMBERS = 4096
"""Trained numbers that are written out in result.json; of more, only the norm."""


def verdict(result: dict[str, Any]) -> str:
    """What the numbers allow one to say, in plain words."""
    primary, value = result["primary"], result["value_only"]
    low, high = primary["interval"]
    span = (
        f"{100 * primary['difference']:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f}, "
        f"p = {primary['p_value']:.2g})"
    )
    numbers = result["trained_numbers"]
    if primary["p_value"] >= 0.05:
        return (
            f"No gain shown: training {numbers} numbers changed the primary measure by {span}; chance can explain that."
        )
    if primary["difference"] < 0:
        return f"Training {numbers} numbers made the model worse on the primary measure: {span}."
    text = f"Training {numbers} numbers raised the primary measure by {span}."
    if value["p_value"] < 0.05 and value["difference"] > 0:
        text += " The value-only score rises too, so the gain is more than format or stopping."
    else:
        text += (
            " The value-only score does not rise beyond chance: the gain is in format or stopping, not in right values."
        )
    if max((r["correct"] for r in result["random"]), default=-1) >= primary["tuned"]["correct"]:
        text += " A random vector no longer than v does as well: do not credit the training."
    for key, name in (("best_prompt", "the best prompt found"), ("larger_budget", "a larger token budget")):
        against = result[key]["against_tuned"]
        if against["difference"] <= 0 or against["p_value"] >= 0.05:
            text += f" Against the untrained model with {name}, no gain is shown."
    return text


def format_result(result: dict[str, Any]) -> str:
    """The result as the lines that a run prints at its end."""
    from tinylora.rollouts.prompts import BUDGET_FACTOR  # here, as all else in this file needs no torch

    share = lambda s: f"{100 * s['correct'] / s['total']:.1f} %"  # noqa: E731
    stopped, best, larger = result["stopped"], result["best_prompt"], result["larger_budget"]
    lines = [
        f"{result['trained_numbers']} trained numbers on {result['primary']['base']['total']:,} distinct held-out "
        f"questions (seed {result['seed']})",
        f"primary measure, declared beforehand: {result['decoding']}",
        "",
        f"  greedy, strict        {result['primary']['text']}",
        f"  greedy, value-only    {result['value_only']['text']}",
        f"  sampled, strict       {result['sampled']['text']}",
        f"  sampled, value-only   {result['sampled_value_only']['text']}",
        f"  stopped in time       {100 * stopped['base']:.1f} -> {100 * stopped['tuned']:.1f} % (mean length "
        f"{result['length']['base']:.1f} -> {result['length']['tuned']:.1f} tokens)",
        f"  untrained, {larger.get('in_words', f'{BUDGET_FACTOR} x the tokens')}   {share(larger)}; "
        f"trained against it: {larger['against_tuned']['text']}",
        f"  untrained, best of {len(best['validation'])} prompts ({best['name']!r}, chosen on validation)   "
        f"{share(best)}; "
        f"trained against it: {best['against_tuned']['text']}",
        f"  random vectors        {randoms_in_words(result['random']) or 'none'}",
        "",
    ]
    for example in result["examples"]:
        lines += [
            f"  {example['kind']}: {example['question']}  (gold {example['gold']})",
            f"    before {example['before']!r}",
            f"    after  {example['after']!r}",
        ]
    lines += [
        "",
        f"the {result['trained_numbers']:,} numbers (norm {result['v_norm']:.3f}): {_numbers(result['v'])}",
        f"run folder: {result['run']}",
        "",
        result["verdict"],
    ]
    if result["primary"]["p_value"] < 0.05 and result["primary"]["difference"] > 0:
        lines.append(
            "Not yet held against the best of many random vectors, which may do as well: "
            + shell_line("tinylora", "eval", result["run"], "--controls")
        )
    return "\n".join(lines)


def _numbers(v: list[float] | None) -> str:
    """The first ones; None where there are too many to be written down."""
    if v is None:
        return "in the adapter's file"
    return " ".join(f"{x:+.4f}" for x in v[:64]) + (f" and {len(v) - 64:,} more" if len(v) > 64 else "")
