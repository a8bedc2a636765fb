"""A report as a browser's parser sees it, and its numbers computed again by other code than the package's."""

import re
from collections.abc import Callable
from fractions import Fraction
from html.parser import HTMLParser
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from report_runs import read_lines
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from tinylora.reporting.page import Report, write_report

VOID = {"meta", "br", "link", "img", "use", "path"}
Rows = list[dict[str, Any]]


class Page(HTMLParser):
    """The page as a browser's parser sees it: numbers by (run, key), what it would fetch, tags that do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.raw = path.read_text(encoding="utf-8")
        self.numbers: dict[tuple[str, str], tuple[str, str]] = {}
        self.text = ""
        self.tags: list[str] = []
        self.links: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self._open: list[tuple[str, tuple[str, str] | None]] = []
        self._value = ""
        self.feed(self.raw)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes += named.items()
        self.ids += [named["id"]] if "id" in named else []
        self.links += [named[name] for name in ("href", "src", "action", "data") if name in named]
        key = (named["data-run"], named["data-key"]) if "data-value" in named else None
        if key is not None:
            self._value = named["data-value"]
            _, value = self.numbers.setdefault(key, ("", self._value))
            assert value == self._value
            self.numbers[key] = ("", value)
        if tag not in VOID:
            self._open.append((tag, key))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        opened, _ = self._open.pop()
        assert opened == tag, f"<{opened}> is closed by </{tag}>"

    def handle_data(self, data: str) -> None:
        if any(tag in ("style", "script") for tag, _ in self._open):
            return
        self.text += data
        if self._open and (key := self._open[-1][1]) is not None:
            words, value = self.numbers[key]
            self.numbers[key] = (words + data, value)

    def value(self, key: str, run: str) -> float | None:
        found = self.numbers[run, key][1]
        return float(found) if found else None


def report(*runs: Path, out: Path | None = None, **options: Any) -> tuple[Page, Report]:
    done = write_report(runs, out, **options)
    return Page(done.path), done


def by_condition(path: Path) -> dict[str, Rows]:
    rows: dict[str, Rows] = {}
    for row in read_lines(path):
        rows.setdefault(row["condition"], []).append(row)
    return rows


def right(rows: Rows, measure: str = "strict") -> np.ndarray:
    return np.array([row[measure] >= 1 for row in rows])


# --- numbers again, by other code ---


def share_again(rows: Rows, measure: str) -> dict[str, float]:
    count = sum(1 for row in rows if row[measure] >= 1)
    low, high = proportion_confint(count, len(rows), method="wilson")
    return {"share": count / len(rows), "low": low, "high": high, "correct": count, "total": len(rows)}


def pair_again(base: np.ndarray, tuned: np.ndarray) -> dict[str, float]:
    """McNemar by statsmodels; Newcombe's method 10 as Newcombe 1998 writes it, with cells e, f, g, h."""
    e, f = int((base & tuned).sum()), int((tuned & ~base).sum())
    g, h = int((base & ~tuned).sum()), int((~base & ~tuned).sum())
    n = e + f + g + h
    p1, p2 = (e + f) / n, (e + g) / n
    (l1, u1), (l2, u2) = (proportion_confint(count, n, method="wilson") for count in (e + f, e + g))
    bottom = (e + f) * (g + h) * (e + g) * (f + h)
    top = e * h - f * g
    top = max(top - n / 2, 0) if top > 0 else top
    phi = top / bottom**0.5 if bottom else 0.0
    below = max((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2, 0) ** 0.5
    above = max((u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2, 0) ** 0.5
    p_value = mcnemar([[e, g], [f, h]], exact=True).pvalue if f + g else 1.0
    return {"difference": p1 - p2, "low": p1 - p2 - below, "high": p1 - p2 + above, "won": f, "lost": g, "p": p_value}


def gain_again(base: Rows, tuned: Rows) -> dict[str, float]:
    """Shapley's shares in exact fractions."""

    def shares(rows: Rows) -> dict[str, Fraction]:
        stops = [row for row in rows if row["stopped"]]
        reads = [row for row in stops if row["answered"] or row["strict"] >= 1]
        count = sum(row["strict"] >= 1 for row in reads)
        return {
            "stops": Fraction(len(stops), len(rows)), "format": Fraction(len(reads), len(stops)),
            "value": Fraction(count, len(reads)),
        }  # fmt: skip

    before, after = shares(base), shares(tuned)
    parts = dict.fromkeys(before, Fraction(0))
    for order in permutations(before):
        now = dict(before)
        for name in order:
            rest = Fraction(1)
            for other in now:
                rest *= 1 if other == name else now[other]
            parts[name] += rest * (after[name] - before[name]) / 6
            now[name] = after[name]
    return {**{name: float(part) for name, part in parts.items()}, "total": float(sum(parts.values()))}


def repetition_again(text: str) -> float:
    words = text.split()
    grams = ["\0".join(words[i : i + 4]) for i in range(len(words) - 3)]
    return sum(gram in grams[:i] for i, gram in enumerate(grams)) / len(grams) if grams else 0.0


def expected_numbers(run: Path) -> dict[str, float | None]:
    """Every number that the page of a run with evidence shows, from the JSONL files, but for what the run was told."""
    items, finals, metrics = (by_condition(run / "evidence_items.jsonl"), by_condition(run / "result_items.jsonl"),
                              read_lines(run / "metrics.jsonl"))  # fmt: skip
    found: dict[str, float | None] = {"num_items": len(items["tuned"])}

    def put(prefix: str, values: dict[str, float], names: str) -> None:
        found.update({f"{prefix}.{name}": values[name] for name in names.split()})

    others = [name for name in items if name != "tuned"]
    pairs = {name: pair_again(right(items[name]), right(items["tuned"])) for name in others}
    adjusted = multipletests([pairs[name]["p"] for name in others], method="fdr_bh")[1]
    for name, rows in items.items():
        put(f"{name}.strict", share_again(rows, "strict"), "share low high")
        for measure in ("value_only", "stopped"):
            put(f"{name}.{measure}", share_again(rows, measure), "share")
        found[f"{name}.length"] = float(np.mean([row["num_tokens"] for row in rows]))
        found[f"{name}.repetition"] = float(np.mean([repetition_again(row["text"]) for row in rows]))
    for name, p in zip(others, adjusted, strict=True):
        put(f"{name}.against", pairs[name], "difference low high won lost")
        found[f"{name}.against.p_adjusted"] = p
    for measure in ("strict", "value_only", "answered", "stopped"):
        for name in ("untrained", "tuned"):
            put(f"{name}.{measure}", share_again(items[name], measure), "share low high")
        pair = pair_again(*(right(items[name], measure) for name in ("untrained", "tuned")))
        put(f"paired.{measure}", pair, "difference low high won lost p")
    for name in ("untrained", "tuned"):
        put(f"{name}.strict", share_again(items[name], "strict"), "correct total")
    for measure in ("strict", "value_only"):
        sides = [finals[name] for name in ("base_sampled", "tuned_sampled")]
        put(
            f"sampled.{measure}",
            pair_again(*(right(side, measure) for side in sides)),
            "difference low high won lost p",
        )
        for side, rows in zip(("base", "tuned"), sides, strict=True):
            put(f"sampled.{measure}.{side}", share_again(rows, measure), "share low high")
    put("gain", gain_again(items["untrained"], items["tuned"]), "total value format stops")
    found["smallest.discordant"] = (pairs["untrained"]["won"] + pairs["untrained"]["lost"]) / len(items["tuned"])

    steps = [row for row in metrics if row["step"] > 0]
    kept = max(row["step"] for row in steps if row["step"] % 10 == 0)
    found |= {"steps": steps[-1]["step"], "kept_step": kept, "trained_numbers": len(steps[-1]["v"])}
    v = next(row["v"] for row in steps if row["step"] == kept)
    found |= {f"v.{i + 1}": x for i, x in enumerate(v)}
    found["v_norm"] = float(np.linalg.norm(v))
    return found


FORMATS: dict[str, Callable[[float], str]] = {
    r"^smallest": lambda x: f"{100 * x:.1f}",
    r"^gain\.": lambda x: f"{100 * x:+.1f}" if abs(x) >= 0.0005 else "0.0",
    r"\.(won|lost|correct|total)$|^(num_items|steps|kept_step|trained_numbers)$|num_items$": lambda x: f"{round(x):,}",
    r"^v\.": lambda x: f"{x:+.4f}",
    r"^v_norm$|repetition": lambda x: f"{x:.3f}",
    r"\.length$": lambda x: f"{x:.1f}",
    r"\.p(_adjusted)?$": lambda x: f"{x:.2g}",
    r"\.difference$|(paired|against|sampled|pooled)[\w.]*\.(low|high)$": lambda x: (
        f"{100 * x:+.1f}" if abs(x) >= 0.0005 else "0.0"
    ),
    r"\.(share|low|high)$": lambda x: f"{100 * x:.1f}",
}


def words(key: str, value: float) -> str:
    if re.match(r"sampled\.\w+\.(base|tuned)\.", key):
        return f"{100 * value:.1f}"
    return next(form(value) for pattern, form in FORMATS.items() if re.search(pattern, key))
