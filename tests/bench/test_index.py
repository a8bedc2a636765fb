"""bench/README.md is what `python -m bench.index` writes, and every result says what wrote it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"
pytestmark = pytest.mark.skipif(not BENCH.exists(), reason="bench/ comes with the repository alone")


def test_the_page_is_what_the_script_writes() -> None:
    """A new script, result or mention in a page changes it: run `python -m bench.index`."""
    from bench import index

    assert index.PAGE.read_text(encoding="utf-8") == index.page()


def test_every_result_is_in_the_index_and_its_script_is_there() -> None:
    from bench import index

    there = {path.relative_to(index.RESULTS).with_suffix("").as_posix() for path in index.RESULTS.rglob("*.json")}
    entries = index.entries()
    assert {entry.name for entry in entries} == there
    for entry in entries:
        assert entry.script.is_file(), entry.command
        if "bench" in entry.script.parts:
            assert entry.script.parent.name == entry.file.parent.name, f"{entry.name} lies beside another script"


def test_every_number_is_read_from_its_result() -> None:
    from bench import index

    for entry in index.entries():
        assert "{" in entry.number, entry.name
        assert not re.search(r"[{}]", index.number(entry)), entry.name


def test_the_page_has_every_script_and_its_links_lead_to_files() -> None:
    from bench import index

    page = index.page()
    for folder in index.FOLDERS:
        for script in (BENCH / folder).glob("[!_]*.py"):
            assert f"({folder}/{script.name})" in page
            assert index.usage(script).startswith(f"python -m bench.{folder}.{script.stem}"), script
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (BENCH / link).exists(), link


def test_key_paths() -> None:
    from bench.index import lookup, said

    result = {"cells": [{"name": "a", "share": 0.5}, {"name": "b", "share": 0.25}], "runs": [[1, 2]]}
    assert lookup(result, "cells/b/share") == 0.25
    assert lookup(result, "runs/0/1") == 2
    for wrong in ("cells/c/share", "runs/0/2", "shares"):
        with pytest.raises((KeyError, IndexError, ValueError)):
            lookup(result, wrong)
    assert said(0.125, "points") == "+12.5 points"
    assert said(0.125, ".1%") == "12.5 %"
