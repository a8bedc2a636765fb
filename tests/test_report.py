"""The page: every number against the items by other code, hostile text, what is missing, and misuse."""

import csv
import json
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint
from typer.testing import CliRunner

from tinylora.cli import app
from tinylora.evaluation.account import Account, Prices
from tinylora.evaluation.conditions import Condition
from tinylora.evaluation.evaluate import ItemResult
from tinylora.evaluation.evidence import assemble
from tinylora.reporting.page import NOT_EVALUATED, write_report
from tinylora.reporting.samples import shown
from tinylora.training.config import RunConfig, TaskConfig, TrainConfig
from tinylora.training.recipe import dump_config

HOSTILE = "<script>alert(1)</script> & \x07 \u202e right-to-left \x1b[31m"


class Keys(HTMLParser):
    """The text of every element with a data-key, and every address that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self._open: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        if tag in ("script", "link", "iframe", "object", "embed") or "src" in named:
            self.fetched.append(named.get("src") or named.get("href") or tag)
        if "data-key" in named:
            self._open.append((tag, named["data-key"]))
            self.found[named["data-key"]] = ""

    def handle_data(self, data: str) -> None:
        for _, key in self._open:
            self.found[key] += data

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1][0] == tag:
            self._open.pop()


def items(rng: random.Random, right: float, text: str = "a reply") -> list[ItemResult]:
    results = []
    for i in range(40):
        stopped, strict = rng.random() < 0.9, float(rng.random() < right)
        value = max(strict, float(rng.random() < 0.2))
        results.append(
            ItemResult(f"{i:064x}", f"What is {i}?", str(i), f"{text} {i}", strict * stopped, value, stopped,
                       rng.randint(2, 30), {"strict": strict}, answered=rng.random() < 0.8)
        )  # fmt: skip
    return results


def make_run(path: Path, *, numbers: int = 13, seed: int = 0, evidence: bool = True, text: str = "a reply") -> Path:
    """A run folder written by hand: two validation points, three steps, the answers of four conditions."""
    path.mkdir(parents=True)
    rng = random.Random(seed)
    config = RunConfig(task=TaskConfig(name="jsonl", path="mine.jsonl"), train=TrainConfig(seed=seed))
    (path / "config.toml").write_text(dump_config(config))
    (path / "environment.json").write_text(json.dumps({"python": "3.12", "argv": ["<b>"]}))
    rows: list[dict[str, Any]] = [{"step": 0, "validation_strict": 0.2, "validation_value_only": 0.3}]
    for step in range(1, 4):
        names = ("reward", "strict", "value_only", "answered", "truncated", "zero_variance_groups", "v_norm", "seconds")
        row: dict[str, Any] = {"step": step, "tokens_sampled": 100, "prompts_sampled": 4}
        rows.append(row | {name: rng.random() for name in names} | {"v": [rng.gauss(0, 1) for _ in range(numbers)]})
    rows[-1] |= {"validation_strict": 0.4, "validation_value_only": 0.45}
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not evidence:
        return path
    kinds = {"untrained": 0.3, "tuned": 0.6, "random_0": 0.3, "constant": 0.1}  # and how often each is right
    cost = Account(tokens_sampled=1, prompt_tokens=1, seconds=1.0, flops=1.0)
    conditions = [
        Condition(
            name=name,
            kind=name.partition("_")[0],
            label=f"label of {name}",
            results=tuple(items(rng, right, text)),
            account=cost,
            details={},
        )
        for name, right in kinds.items()
    ]
    side = {
        "kl_per_token": 0.01, "perplexity": {"base": 10.0, "tuned": 10.5}, "num_tokens": 900, "tasks": [],
        "length": {"base": 5.0, "tuned": 6.0}, "repetition": {"base": 0.0, "tuned": 0.1},
    }  # fmt: skip
    account = {"training": Account(tokens_sampled=300, prompt_tokens=None, seconds=9.0, flops=None).to_json()}
    meta = {"trained_numbers": numbers, "num_items": 40, "model": "m", "task": "jsonl"}
    found = assemble(conditions, meta=meta, side_effects=side, account=account, prices=Prices())
    found["curve"] = [
        {"distinct_problems": n, "validation_strict": 0.2, "validation_value_only": 0.3} for n in (0, 12)
    ]  # fmt: skip
    (path / "evidence.json").write_text(json.dumps(found))
    with (path / "evidence_items.jsonl").open("w") as lines:
        for one in conditions:
            for result in one.results:
                row = {"condition": one.name, **{name: getattr(result, name) for name in ItemResult.__slots__}}
                lines.write(json.dumps(row) + "\n")
    return path


def page_of(*runs: Path, out: Path | None = None, **options: Any) -> tuple[str, Keys]:
    done = write_report(runs, out, **options)
    text = done.path.read_text(encoding="utf-8")
    assert done.num_bytes == len(text.encode())
    keys = Keys()
    keys.feed(text)
    return text, keys


def test_every_number_can_be_computed_again_from_the_items(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo-001")
    _, keys = page_of(run)
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in (run / "evidence_items.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["condition"], []).append(row)
    for measure in ("strict", "value_only", "stopped"):
        base, tuned = (np.array([row[measure] >= 1 for row in rows[name]]) for name in ("untrained", "tuned"))
        names = ("base.correct", "tuned.correct", "won", "lost", "p")
        found = {name: keys.found[f"demo-001.{measure}.{name}"] for name in names}
        table = [[(base & tuned).sum(), (base & ~tuned).sum()], [(~base & tuned).sum(), (~base & ~tuned).sum()]]
        assert [int(found[n]) for n in ("base.correct", "tuned.correct", "won", "lost")] == [
            base.sum(), tuned.sum(), table[1][0], table[0][1],
        ]  # fmt: skip
        assert float(found["p"]) == pytest.approx(mcnemar(table, exact=True).pvalue, rel=0.05)
        assert float(keys.found[f"demo-001.{measure}.difference"]) == pytest.approx(
            100 * (tuned.mean() - base.mean()), abs=0.051
        )
    for name, answers in rows.items():
        assert int(keys.found[f"demo-001.conditions.{name}.strict"]) == sum(row["strict"] >= 1 for row in answers)
    parts = sum(float(keys.found[f"demo-001.gain.{part}"]) for part in ("value", "format", "stops"))
    strict = [np.mean([row["strict"] >= 1 for row in rows[name]]) for name in ("untrained", "tuned")]
    assert parts == pytest.approx(100 * (strict[1] - strict[0]), abs=0.16)
    with (run / "report_files" / "conditions.csv").open() as file:
        table_rows = list(csv.DictReader(file))
    for row, answers in zip(table_rows, rows.values(), strict=True):
        right = sum(answer["strict"] >= 1 for answer in answers)
        assert (int(row["correct"]), int(row["total"])) == (right, 40)
        assert (float(row["low"]), float(row["high"])) == pytest.approx(proportion_confint(right, 40, method="wilson"))


def test_figures_hold_the_metrics(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo-001")
    text, _ = page_of(run)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = run / "report_files"
    names = {path.stem for path in files.glob("*.csv")}
    assert names == {path.stem for path in files.glob("*.png")} >= {"training", "held_out", "health", "norm", "paths"}
    assert text.count("<svg") == len(names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files.glob("*.png"))
    table = csv.reader((files / "paths.csv").read_text().splitlines())
    paths = [[float(x) for x in row] for row in list(table)[1:]]
    assert paths == [[row["step"], *row["v"]] for row in metrics[1:]]
    held_out = list(csv.DictReader((files / "held_out.csv").read_text().splitlines()))
    assert [float(row["validation_strict"]) for row in held_out] == [0.2, 0.4]


def test_the_page_asks_no_network_and_escapes_everything(tmp_path: Path) -> None:
    text, keys = page_of(make_run(tmp_path / "demo-001", text=HOSTILE), samples=40)
    assert keys.fetched == [] and "script" not in keys.tags
    assert "&lt;script&gt;alert(1)" in text
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202e]", text)
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", text)


def test_a_megabyte_of_one_letter_stays_small(tmp_path: Path) -> None:
    text, _ = page_of(make_run(tmp_path / "demo-001", text="x" * 1_000_000))
    assert len(text) < 400_000 and "characters ...]" in text
    assert shown("ab" * 5, most=4) == "ab [... 6 characters ...] ab"
    assert shown("a\x00b\ud800") == "a\u2400b[U+D800]"


@pytest.mark.parametrize("numbers", [1, 200])
def test_other_counts_of_numbers(tmp_path: Path, numbers: int) -> None:
    text, _ = page_of(make_run(tmp_path / "demo-001", numbers=numbers))
    assert f"{numbers} numbers of" in text


def test_what_was_not_measured_is_called_so(tmp_path: Path) -> None:
    text, keys = page_of(make_run(tmp_path / "demo-001", evidence=False))
    assert keys.found["demo-001.verdict"] == NOT_EVALUATED
    assert "Controls were not run." in text and "tinylora eval demo-001 --controls" in text
    assert "demo-001.strict.won" not in keys.found


def test_several_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"demo-00{i}", seed=i) for i in range(3)]
    _, keys = page_of(*runs, out=tmp_path / "all.html")
    assert keys.found["pooled"].startswith("Pooled by item, strict: 3 seeds on the same 40 items")
    for run in runs:
        rows = map(json.loads, (run / "evidence_items.jsonl").read_text().splitlines())
        strict = [row for row in rows if row["condition"] == "tuned"]
        assert int(keys.found[f"runs.{run.name}.tuned.correct"]) == sum(row["strict"] >= 1 for row in strict)
        assert (tmp_path / "report_files" / f"conditions_{run.name}.png").exists()
    other = make_run(tmp_path / "other-001")
    config = RunConfig(task=TaskConfig(name="gsm8k"))
    (other / "config.toml").write_text(dump_config(replace(config, train=TrainConfig(seed=5))))
    _, keys = page_of(runs[0], other, out=tmp_path / "two.html")
    assert "not pooled" in keys.found["pooled"]


def test_samples_are_drawn_by_the_seed_and_regressions_are_lost_items(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo-001")
    one, _ = page_of(run, samples=3, seed=1)
    assert one == page_of(run, samples=3, seed=1)[0]
    assert one != page_of(run, samples=3, seed=2)[0]
    none, _ = page_of(run, samples=0)
    assert "drawn at random (seed" not in none


@pytest.mark.parametrize(
    ("breaks", "sentence"),
    [
        (lambda run: (run / "config.toml").unlink(), "is no run folder"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 0}\n'), "no finished step yet"),
        (lambda run: (run / "evidence.json").write_text("{"), "cannot be read"),
        (lambda run: (run / "evidence.json").write_text("[]"), "must be a JSON object"),
        (lambda run: (run / "metrics.jsonl").write_text("x\n{}\n"), "line 1 is not JSON"),
    ],
)
def test_a_broken_run_is_one_sentence(tmp_path: Path, breaks: Any, sentence: str) -> None:
    run = make_run(tmp_path / "demo-001")
    breaks(run)
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 2 and sentence in done.output
    assert not (run / "report.html").exists()


def test_the_command(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo-001")
    done = CliRunner().invoke(app, ["report", str(run), "--json"])
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    assert said["report"] == str(run / "report.html") and said["bytes"] == (run / "report.html").stat().st_size
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "x.html", tmp_path):
        done = CliRunner().invoke(app, ["report", str(run), "--out", str(out)])
        assert done.exit_code == 2 and "cannot be written" in done.output
    done = CliRunner().invoke(app, ["report", str(run), str(run)])
    assert done.exit_code == 2 and "different names" in done.output
