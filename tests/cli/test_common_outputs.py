"""Verbs that write: FIFOs and devices are written to, a user's files are replaced with --force alone, and a stranger's
folder with planted links leads nowhere."""

import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from report_runs import make_run
from safetensors import safe_open
from tiny_run import adapter_run
from typer.testing import CliRunner

from tinylora.cli import app
from tinylora.evaluation.resumable import EVIDENCE_FILE

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="FIFOs and links are POSIX"),
    pytest.mark.usefixtures("undrawn"),
]


def tinylora_(*args: object) -> Any:
    return CliRunner().invoke(app, [str(one) for one in args])


def through_fifo(folder: Path, *args: object) -> bytes:
    """What a verb writes into a FIFO that is read meanwhile; it must still be one afterwards."""
    fifo, read = folder / "fifo", list[bytes]()
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()), daemon=True)
    reader.start()
    result = tinylora_(*args, fifo)
    assert result.exit_code == 0, (result.output, result.exception)
    reader.join(timeout=60)
    assert stat.S_ISFIFO(os.lstat(fifo).st_mode)
    fifo.unlink()
    return read[0]


def assert_kept(file: Path, *args: object) -> None:
    """That a verb refuses to write over a file before it does anything, and says how it would."""
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    result = tinylora_(*args, file)
    assert result.exit_code == 2 and not result.stdout, result.output
    assert "exists; " in result.stderr and "--force" in result.stderr
    assert file.read_text() == "mine" and os.listdir(file.parent) == [file.name]


def test_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo-001", num_items=12, steps=2)
    page = through_fifo(tmp_path, "report", run, "--out").decode()
    assert page.startswith("<!doctype html>") and "_files/" not in page
    assert tinylora_("report", run, "--out", "/dev/null").exit_code == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and not os.path.lexists("/dev/null_files")
    assert_kept(tmp_path / "kept" / "mine.py", "report", run, "--out")
    assert tinylora_("report", run).exit_code == tinylora_("report", run).exit_code == 0  # its own page, again
    (tmp_path / "x_files").mkdir()
    (tmp_path / "x_files" / "numbers.csv").write_text("mine")
    result = tinylora_("report", run, "--out", tmp_path / "x.html")
    assert result.exit_code == 2 and "x_files exists" in result.stderr and not (tmp_path / "x.html").exists()
    assert (tmp_path / "x_files" / "numbers.csv").read_text() == "mine"
    assert tinylora_("report", run, "--out", tmp_path / "x.html", "--force").exit_code == 0


def test_a_stranger_s_run_folder_leads_nowhere(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo-001", num_items=12, steps=2)
    victim, folder = tmp_path / "victim", tmp_path / "victims"
    victim.write_text("mine")
    folder.mkdir()
    (run / "report_files").mkdir()
    for name in ("report.html", "report.html.tmp", "report_files/numbers.csv", "report_files/numbers.csv.tmp"):
        (run / name).symlink_to(victim)
    assert tinylora_("report", run).exit_code == 0
    assert victim.read_text() == "mine"
    (run / "files").mkdir()
    for path in (run / "report_files").iterdir():
        path.rename(run / "files" / path.name)
    (run / "report_files").rmdir()
    (run / "report_files").symlink_to(folder)
    result = tinylora_("report", run)
    assert result.exit_code == 2 and "report_files is a link, which is not followed" in result.stderr
    assert not list(folder.iterdir())
    (run / "report_files").unlink()
    (run / "report.html").unlink()
    os.mkfifo(run / "report.html")
    result = tinylora_("report", run)  # which would be waited for without an end
    assert result.exit_code == 2 and "report.html is a FIFO" in result.stderr


@pytest.fixture
def run(tiny_folder: Path, fresh_cache: Path, tmp_path: Path) -> Path:
    return adapter_run(tiny_folder, tmp_path)


def test_eval_items(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("eval", run, "--num-items", "2")
    rows = [json.loads(line) for line in through_fifo(tmp_path, *words, "--items").splitlines()]
    assert [row["condition"] for row in rows] == ["untrained"] * 2 + ["adapter"] * 2
    monkeypatch.setattr("tinylora.rollouts.runtime.open_runtime", lambda *args, **options: pytest.fail("loaded"))
    assert_kept(tmp_path / "kept" / "mine.py", *words, "--items")
    os.mkfifo(tmp_path / "fifo")
    for no_file in (tmp_path / "fifo", Path("/dev/null")):  # which is read and written
        result = tinylora_(*words, "--untrained", no_file)
        assert result.exit_code == 2 and f"{no_file} is no file; --untrained names one" in result.stderr
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / EVIDENCE_FILE).write_text("mine")
    result = tinylora_("eval", run, "--controls", "--out", folder)
    assert result.exit_code == 2 and "exists; choose another file, or replace it with --force" in result.stderr
    assert (folder / EVIDENCE_FILE).read_text() == "mine"


def test_verbs_of_adapters(run: Path, tmp_path: Path) -> None:
    with_factors = tmp_path / "factors.safetensors"
    assert tinylora_("encode", run, "--with-factors", "-o", with_factors).exit_code == 0
    with safe_open(with_factors, framework="pt") as handle:
        assert "v" in handle.keys()  # noqa: SIM118 (not a dict)
    code = tinylora_("encode", run).stdout.strip()
    for words in (
        ("encode", run, "-o"),
        ("encode", run, "--with-factors", "-o"),
        ("decode", code, "-o"),
        ("mix", code, code, "-o"),
        ("export", run, "--to", "gguf", "-o"),
    ):
        file = tmp_path / "kept" / "mine.py"
        assert_kept(file, *words)
        assert len(through_fifo(tmp_path, *words)) > 30
        assert tinylora_(*words, file, "--force").exit_code == 0 and file.read_bytes() != b"mine"
        file.unlink()
        file.parent.rmdir()


def test_folders_are_refused_before_a_model_is_loaded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinylora.models.load.load_base_model", lambda *args, **options: pytest.fail("loaded"))
    full, file, link = tmp_path / "full", tmp_path / "file", tmp_path / "link"
    full.mkdir()
    (full / "x").write_text("mine")
    file.write_text("mine")
    link.symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "fifo")
    for to in ("lora", "peft", "merged"):
        for out in (full, file, link, tmp_path / "fifo", Path("/dev/null")):
            result = tinylora_("export", run, "--to", to, "-o", out)
            assert result.exit_code == 2 and "exists and is not an empty folder" in result.stderr, result.output
    result = tinylora_("push", run, "me/it", "--dry-run", full)
    assert result.exit_code == 2 and "exists and is not an empty folder" in result.stderr
    assert file.read_text() == (full / "x").read_text() == "mine"
