"""`tinylora report`: where it writes, and what it refuses in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_runs import make_run, read_lines, write_lines
from typer.testing import CliRunner

from tinylora.cli import app


def tinylora_(*args: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, args)])


@pytest.mark.usefixtures("undrawn")
def test_the_command_writes_into_the_run_or_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(tmp_path / f"demo-{i}", seed=i, num_items=12, steps=2) for i in range(2)]
    monkeypatch.chdir(tmp_path)
    result = tinylora_("demo-0")
    page = runs[0] / "report.html"
    assert result.exit_code == 0, result.output
    assert (
        result.stdout.strip()
        and f"{page.stat().st_size:,} bytes" in result.stderr
        and "demo-0/report.html" in result.stderr
    )
    assert 'href="evidence_items.jsonl"' in page.read_text(encoding="utf-8")
    told = json.loads(tinylora_(*runs, "--json").stdout)
    assert told["report"] == "report.html" and told["bytes"] == Path("report.html").stat().st_size
    assert told["files"] == "report_files" and "2 seeds" in told["verdict"]
    assert tinylora_(*runs, "--out", "deep/er/x.html").exit_code == 0
    assert Path("deep/er/x_files/differences.csv").is_file()
    assert 'href="../../demo-1/evidence_items.jsonl"' in Path("deep/er/x.html").read_text(encoding="utf-8")
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_same_report_twice_is_the_same_byte_by_byte(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"demo-{i}", seed=i, num_items=12, steps=2) for i in range(2)]
    found = []
    for _ in range(2):
        assert tinylora_(*runs, "--out", tmp_path / "x.html", "--force").exit_code == 0
        files = [tmp_path / "x.html", *(tmp_path / "x_files").iterdir()]
        found.append({path.name: path.read_bytes() for path in files})
    assert found[0] == found[1]
    assert all(found[0][name].startswith(b"\x89PNG") for name in ("differences.png", "strict.png", "paths-2.png"))


def _edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        told = json.loads((run / name).read_text())
        change(told)
        (run / name).write_text(json.dumps(told))

    return edit


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda run: (run / "config.toml").unlink(), "is no run folder"),
        (lambda run: (run / "config.toml").write_text("[train]\nstepz = 1"), "unknown key"),
        (lambda run: (run / "metrics.jsonl").unlink(), "has no finished step"),
        (lambda run: write_lines(run / "metrics.jsonl", [{"step": 0}]), "has no finished step"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n{\n{}\n'), "metrics.jsonl, line 2 is not JSON"),
        (lambda run: (run / "evidence.json").write_text('{"format": 1,'), "json cannot be read: it is not JSON"),
        (lambda run: (run / "evidence.json").write_text("[" * 100_000), "json cannot be read: it is not JSON"),
        (lambda run: (run / "evidence.json").write_text("[]"), "evidence.json must be a JSON object, got list"),
        (lambda run: (run / "evidence.json").write_bytes(b"\xff"), "evidence.json, line 1: not UTF-8 text"),
        (lambda run: (run / "environment.json").write_text("3"), "environment.json must be a JSON object"),
        (lambda run: [(run / "evidence.json").unlink(), (run / "result.json").write_text("{}")], "result.json lacks"),
        (_edit("evidence.json", lambda told: told.pop("format")), "evidence.json lacks 'format'"),
        (_edit("evidence.json", lambda told: told.update(format=2)), "has format 2, this version reads 1"),
        (_edit("evidence.json", lambda told: told.pop("verdict")), "evidence.json lacks 'verdict'"),
        (_edit("evidence.json", lambda told: told["conditions"].pop(0)), "evidence.json lacks 'untrained'"),
        (_edit("evidence.json", lambda told: told.update(v_norm=9.5)), "is of other numbers than the run's adapter."),
        (_edit("result.json", lambda told: told.update(v_norm=9.5)), "result.json is of other numbers than the run's"),
        (_edit("evidence.json", lambda told: told.update(conditions=7)), "evidence.json does not hold what it should"),
        (_edit("evidence.json", lambda told: told.update(gain=[1])), "evidence.json does not hold what it should"),
        (_edit("evidence.json", lambda told: told.update(account={"training": 1})), "evidence.json does not hold"),
        (
            _edit("evidence.json", lambda told: told["conditions"][3]["against_tuned"].update(won=99)),
            "it says 99 won and",
        ),
        (lambda run: write_lines(run / "evidence_items.jsonl", [{"condition": "x"}]), "line 1 lacks answer, item_id"),
        (
            lambda run: write_lines(run / "evidence_items.jsonl", read_lines(run / "evidence_items.jsonl")[1:]),
            "evidence.json: it says",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_reported_is_one_sentence(
    tmp_path: Path, spoil: Callable[[Path], object], sentence: str
) -> None:
    run = make_run(tmp_path / "demo-001", num_items=12, steps=2)
    spoil(run)
    result = tinylora_(run)
    assert result.exit_code == 2 and not result.stdout, (result.output, result.exception)
    (line,) = result.stderr.splitlines()
    assert line.startswith("tinylora: ") and sentence in line
    assert not (run / "report.html").exists()


@pytest.mark.usefixtures("undrawn")
def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo-001", num_items=12, steps=2)
    (tmp_path / "file").write_text("")
    for out, sentence in (
        (tmp_path, "is a folder; --out names the page"),
        (tmp_path / "file" / "x.html", "cannot write"),
    ):
        result = tinylora_(run, "--out", out)
        assert result.exit_code == 2 and sentence in result.stderr, result.stderr
    result = tinylora_(tmp_path / "nothing")
    assert result.exit_code == 2 and "is no run folder" in result.stderr
    assert tinylora_(run, "--samples", "-1").exit_code == 2
    assert tinylora_().exit_code == 2


@pytest.mark.usefixtures("undrawn")
def test_a_failed_write_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "demo-001", num_items=12, steps=2)
    assert tinylora_(run).exit_code == 0
    before = (run / "report.html").read_bytes()

    def full(source: Any, target: Any) -> None:
        if str(target).endswith(".html"):
            raise OSError(28, "No space left on device", str(target))
        Path(source).rename(target)

    monkeypatch.setattr("os.replace", full)
    result = tinylora_(run, "--seed", "1")
    assert result.exit_code == 2 and "no room to write in" in result.stderr
    assert (run / "report.html").read_bytes() == before and not list(run.glob("*.tmp"))
