"""docs/settings.md and the help in docs/cli.md are what docs/generate.py writes, and what the program prints."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer

from tinylora.cli import app
from tinylora.cli.common import _InOrderOfUse
from tinylora.config.help import describe_fields

DOCS = Path(__file__).parents[2] / "docs"
VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load()


@pytest.mark.parametrize("page", ["cli.md", "settings.md"])
def test_the_page_is_what_the_generator_writes(page: str) -> None:
    written = generate.pages()[DOCS / page]
    assert (DOCS / page).read_text(encoding="utf-8") == written, "run python docs/generate.py"


def test_a_page_that_is_old_is_written_anew_between_the_markers_alone() -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    old = re.sub(r"(?s)(<!-- help: .*? -->).*(<!-- /help -->)", r"\1\nold\n\2", page)
    assert "tinylora train [OPTIONS]" in page and "tinylora train [OPTIONS]" not in old
    assert generate.cli_page(old) == page
    mine = page.replace("# The command line", "# By hand").replace("## In detail", "## By hand, too")
    assert generate.cli_page(mine) == mine != page


def test_help_is_what_a_terminal_of_80_columns_shows() -> None:
    for words in ((), ("eval",)):
        done = subprocess.run(
            [sys.executable, "-m", "tinylora", *words, "--help"],
            env={**os.environ, "COLUMNS": "80"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0 and done.stdout.rstrip() == generate.help_of(*words).rstrip()


def test_every_verb_stands_in_one_group_in_the_order_of_use() -> None:
    named = [verb for names in generate.GROUPS.values() for verb in names]
    assert sorted(named) == sorted(VERBS) == sorted(_InOrderOfUse.ORDER)
    for names in generate.GROUPS.values():
        assert list(names) == sorted(names, key=_InOrderOfUse.ORDER.index)
    assert set(generate.MORE) <= set(VERBS)


def test_links_within_the_page_lead_to_a_heading() -> None:
    for page in ("cli.md", "settings.md"):
        text = (DOCS / page).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
        assert len(slugs) == len(headings), f"{page} has a heading twice"
        assert {link for link in re.findall(r"\]\(#([\w-]+)\)", text)} <= slugs


def test_every_setting_has_a_row() -> None:
    rows = re.findall(
        r"^\| `([\w.]+)` \| (.+?) \| `(.*?)` \| (.+) \|$", (DOCS / "settings.md").read_text(), re.MULTILINE
    )
    assert [row[0] for row in rows] == [row.key for row in describe_fields()]
    for line in (DOCS / "settings.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 5, f"a cell is cut: {line}"
