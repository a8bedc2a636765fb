"""The report's page: figures, text that is not ours, samples, several runs."""

import base64
import csv
import random
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from report_page import by_condition, report, right, share_again
from report_runs import make_run, read_lines, write_lines

import tinylora.reporting.page as page_module
from tinylora.errors import UserError
from tinylora.reporting.page import NOT_EVALUATED, write_report
from tinylora.reporting.report import differing_settings, pools, read_runs
from tinylora.reporting.samples import random_pairs, regressions, shown

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> & \" ' \x07\x1b[31m \u202e{{ 7 * 7 }} \ud83d"


# --- figures ---


def test_every_figure_is_in_the_page_as_svg_and_beside_it_as_png_and_csv(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo-001")
    page, done = report(run)
    names = set(re.findall(r'<figure id="figure-([\w-]+)">', page.raw))
    assert names == {
        "strict", "value_only", "reward", "length", "truncated", "zero_variance_groups", "problems", "paths", "norm",
        "gain", "conditions",
    }  # fmt: skip
    assert page.tags.count("svg") == len(names) == page.raw.count('role="img"')
    embedded = {}
    for link in page.links:
        if link.startswith("data:text/csv"):
            text = base64.b64decode(link.partition("base64,")[2]).decode()
            embedded[text] = list(csv.DictReader(text.splitlines()))
    for name in names:
        assert f"report_files/{name}.png" in page.links and f"report_files/{name}.csv" in page.links
        assert (done.files / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert (done.files / f"{name}.csv").read_text() in embedded

    def table(name: str) -> list[dict[str, str]]:
        return embedded[(done.files / f"{name}.csv").read_text()]

    metrics = read_lines(run / "metrics.jsonl")
    for key in ("strict", "value_only", "reward", "length"):
        rows = table(key)
        assert [float(row[key]) for row in rows if row[key]] == [row[key] for row in metrics if key in row]
        held_out = [(int(r["step"]), float(r[f"validation_{key}"])) for r in rows if r[f"validation_{key}"]]
        assert held_out == [(r["step"], r[f"validation_{key}"]) for r in metrics if f"validation_{key}" in r]
    paths = [[float(row[f"v{i + 1}"]) for i in range(13)] for row in table("paths")]
    assert paths == [row["v"] for row in metrics[1:]]
    items = by_condition(run / "evidence_items.jsonl")
    for row in table("conditions"):
        assert int(row["correct"]) == right(items[row["condition"]], row["measure"]).sum()
    assert sum(float(row["points"]) for row in table("gain")[:3]) == pytest.approx(float(table("gain")[3]["points"]))
    # Colours are the page's, so that one drawing suits light and dark; text is text.
    svg = re.findall(r"<svg.*?</svg>", page.raw, re.DOTALL)
    assert all("var(--" in one and "<text" in one for one in svg)
    assert not {c for one in svg for c in re.findall(r"(?:fill|stroke): (#\w+)", one)}


@pytest.mark.parametrize("numbers", [1, 200])
def test_any_count_of_numbers(tmp_path: Path, numbers: int) -> None:
    run = make_run(tmp_path / "demo-001", numbers=numbers, steps=12, num_items=20)
    page, done = report(run)
    assert page.value("trained_numbers", "demo-001") == numbers
    header = (done.files / "paths.csv").read_text().splitlines()[0].split(",")
    assert header == ["step", *(f"v{i + 1}" for i in range(numbers))]
    assert done.num_bytes < 1_500_000
    assert ("and 136 more" in page.text) == (numbers == 200)


@pytest.mark.usefixtures("undrawn")
def test_a_long_table_is_beside_the_page_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "MOST_EMBEDDED_BYTES", 3000)
    page, done = report(make_run(tmp_path / "demo-001"))
    embedded = sum(link.startswith("data:") for link in page.links)
    assert 0 < embedded < page.tags.count("figure")
    assert (done.files / "paths.csv").stat().st_size > 3000


# --- text that is not ours ---


def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo-001", text=HOSTILE, label="<b>$x$ \x00 ")
    page, _ = report(run)
    assert "script" not in page.tags and "img" not in page.tags and "b" in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "<script>alert(1)</script>" in page.text and "{{ 7 * 7 }}" in page.text
    assert "\u2407\u241b[31m [U+202E]" in page.text and "[U+D83D]" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", page.raw)
    assert "<b>$x$ \u2400 untrained model" in page.text
    assert "<i>7</i>" in page.text and "tinylora train <b>" in page.text


@pytest.mark.usefixtures("undrawn")
def test_a_megabyte_of_one_letter_stays_small(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo-001", num_items=20, evidence=False)
    _, plain = report(run, samples=20)
    rows = read_lines(run / "result_items.jsonl")
    for row in rows:
        if row["condition"] in ("base_greedy", "tuned_greedy") and int(row["item_id"], 16) < 2:
            row["text"] = row["question"] = "a" * 2**20
    write_lines(run / "result_items.jsonl", rows)
    page, done = report(run, samples=20)
    assert done.num_bytes < plain.num_bytes + 20_000
    assert f"[... {2**20 - 1200:,} characters left out ...]" in page.text


def test_shown() -> None:
    assert shown("one\ntwo\tthree") == "one\ntwo\tthree"
    assert shown("\r\n \r") == "\n \u240d"
    assert shown("\x00\x7f\x85\u200b\u2028\ufeff") == "\u2400\u2421[U+0085][U+200B][U+2028][U+FEFF]"
    family = "\U0001f468\u200d\U0001f469"
    assert shown(family) == family
    assert shown("ab" * 10, 9) == "ababab [... 11 characters left out ...] bab"
    assert len(shown("x" * 10**6, 1200)) < 1250


def test_the_page_asks_for_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page, _ = report(make_run(tmp_path / "demo-001"))
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & set(page.tags)
    outside = [link for link in page.links if re.match(r"\w+:|//", link) and not link.startswith("data:text/csv")]
    assert outside == ["https://arxiv.org/abs/2602.04118"]
    assert "http" not in page.raw.replace("https://arxiv.org", "").replace("http-equiv", "")
    assert not re.search(r"url\((?!#)|@import", page.raw)
    assert "default-src 'none'" in page.raw
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


# --- samples ---


@pytest.mark.usefixtures("undrawn")
def test_samples_are_drawn_by_seed_and_regressions_by_how_bad_they_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo-001", evidence=False, num_items=200, steps=2)
    items = by_condition(run / "result_items.jsonl")
    sides = (items["base_greedy"], items["tuned_greedy"])
    drawn = [pair.item_id for pair in random_pairs(sides, 5, 3)]
    assert len(set(drawn)) == 5
    order = list(range(200))
    random.Random(1).shuffle(order)
    mixed = ([sides[0][i] for i in order], [sides[1][i] for i in order])
    assert [pair.item_id for pair in random_pairs(mixed, 5, 3)] == drawn
    assert [pair.item_id for pair in random_pairs(sides, 5, 4)] != drawn
    assert len(random_pairs(sides, 999, 0)) == 200

    worst = regressions(sides, 999)
    lost = {b["item_id"] for b, t in zip(*sides, strict=True) if b["strict"] == 1 and t["strict"] == 0}
    assert {pair.item_id for pair in worst} == lost and len(lost) > 3
    keys = [(pair.after.stopped, -pair.after.num_tokens) for pair in worst]
    assert keys == sorted(keys)
    cut = [{**row, "stopped": row["item_id"] != worst[-1].item_id} for row in sides[1]]  # the shortest never stops
    assert regressions((sides[0], cut), 1)[0].item_id == worst[-1].item_id
    assert [pair.item_id for pair in regressions(sides, 2)] == [pair.item_id for pair in worst[:2]]

    page, _ = report(run, samples=5, seed=3)
    shown_items = [value for name, value in page.attributes if name == "data-item"]
    assert shown_items == [*drawn, *(pair.item_id for pair in worst[:5])]
    assert "5 of 200 items, drawn with seed 3" in page.text
    page, _ = report(run, samples=0)
    assert not [name for name, _ in page.attributes if name == "data-item"]


# --- several runs ---


@pytest.mark.usefixtures("undrawn")
def test_runs_of_several_seeds_are_pooled_by_item(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"demo-{i:03d}", seed=i, num_items=24, steps=5) for i in range(3)]
    rows = read_lines(runs[1] / "evidence_items.jsonl")
    random.Random(0).shuffle(rows)  # another order of items, the same one in every condition
    place = {row["item_id"]: i for i, row in enumerate(row for row in rows if row["condition"] == "tuned")}
    write_lines(runs[1] / "evidence_items.jsonl", sorted(rows, key=lambda row: place[row["item_id"]]))
    page, done = report(*runs, out=tmp_path / "all.html")
    assert done.files == tmp_path / "all_files" and (done.files / "differences.png").exists()

    per_item: dict[str, list[int]] = {}
    for run in runs:
        items = by_condition(run / "evidence_items.jsonl")
        for before, after in zip(items["untrained"], items["tuned"], strict=True):
            per_item.setdefault(before["item_id"], []).append(int(after["strict"]) - int(before["strict"]))
    sums = [sum(changes) for changes in per_item.values()]
    # Sign flips by hand: how many of the 2^24 sums of +-d_i are at least as far from 0.
    ways = {0: 1}
    for d in sums:
        new: dict[int, int] = {}
        for total, count in ways.items():
            for sign in (-d, d):
                new[total + sign] = new.get(total + sign, 0) + count
        ways = new
    p = Fraction(sum(count for total, count in ways.items() if abs(total) >= abs(sum(sums))), 2**24)
    assert page.value("pooled.1.strict.p", "") == pytest.approx(float(p), rel=1e-9)
    assert page.value("pooled.1.strict.difference", "") == pytest.approx(sum(sums) / 24 / 3)
    changes = [change for item in per_item.values() for change in item]
    assert page.value("pooled.1.strict.won", "") == changes.count(1)
    assert page.value("pooled.1.strict.lost", "") == changes.count(-1)
    draws = np.random.default_rng(5).choice(np.array(sums) / 3, size=(20000, 24)).mean(axis=1)
    ends = [page.value(f"pooled.1.strict.{end}", "") for end in ("low", "high")]
    assert ends == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.02)
    assert "demo-000, demo-001, demo-002: 3 seeds on the same 24 items" in done.verdict

    assert {run for run, _ in page.numbers} == {"", "demo-000", "demo-001", "demo-002"}
    for i, run in enumerate(runs):
        again = share_again(by_condition(run / "evidence_items.jsonl")["tuned"], "strict")
        assert page.value("tuned.strict.correct", f"demo-{i:03d}") == again["correct"]
    curves = list(csv.DictReader((done.files / "strict.csv").read_text().splitlines()))
    assert {row["run"] for row in curves} == {"demo-000", "demo-001", "demo-002"}
    assert len(set(page.ids)) == len(page.ids) and (done.files / "paths-3.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_what_is_not_the_same_is_not_pooled(tmp_path: Path) -> None:
    plain = make_run(tmp_path / "plain", num_items=12, steps=2)
    again = make_run(tmp_path / "again", num_items=12, steps=2)
    seed = make_run(tmp_path / "seed", num_items=12, steps=2, seed=1)
    control = make_run(tmp_path / "control", num_items=12, steps=2, seed=2, control="shuffled")
    fewer = make_run(tmp_path / "fewer", num_items=11, steps=2, seed=3)
    other = make_run(tmp_path / "other", num_items=12, steps=2, seed=4, task="gsm8k")
    bare = make_run(tmp_path / "bare", num_items=12, steps=2, seed=5, evidence=False, result=False)
    (pool,) = pools(read_runs([plain, again, seed, control, fewer, other, bare]))
    assert (pool.labels, pool.repeated) == (("plain", "seed"), ("again",))  # the same run twice is not two seeds
    assert not pools(read_runs([plain, again]))
    page, done = report(plain, other, bare, out=tmp_path / "x.html")
    assert "different tasks (jsonl, gsm8k): they stand side by side and cannot be paired" in page.text
    assert "nothing is pooled" in page.text and NOT_EVALUATED in done.verdict
    page, _ = report(seed, control, out=tmp_path / "y.html")
    assert "This run is a control." in page.text and "control: shuffled" in page.text
    differing = dict(differing_settings(read_runs([seed, control])))
    assert differing == {"train.seed": [1, 2], "train.control": ["none", "shuffled"]}


@pytest.mark.usefixtures("undrawn")
def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "demo-001", seed=i, num_items=12, steps=2) for i, name in enumerate("ab")]
    page, _ = report(*runs, out=tmp_path / "x.html")
    assert {run for run, _ in page.numbers} == {"", *map(str, runs)}
    with pytest.raises(UserError, match="every run can be named once"):
        write_report([runs[0], tmp_path / "a" / ".." / "a" / "demo-001"])
