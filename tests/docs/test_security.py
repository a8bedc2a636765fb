"""docs/security.md: each promise names tests that are there, and the site has the page."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def test_each_promise_names_tests_that_attack_it() -> None:
    section = PAGE.partition("## What is promised\n")[2].partition("\n## ")[0]
    promises = [one for one in section.strip().split("\n\n") if one.startswith("**")]
    assert len(promises) >= 8
    for promise in promises:
        _, attacked, names = promise.rpartition("Attacked by ")
        files = re.findall(r"`(tests/[^`]+\.py)`", names)
        assert attacked and files, promise
        for file in files:
            assert "def test_" in (ROOT / file).read_text(encoding="utf-8"), file


def test_files_that_the_page_names_are_there() -> None:
    for file in re.findall(r"`((?:tests|tinylora)/[^`]+)`", PAGE):
        assert (ROOT / file).exists(), file


def test_the_site_has_the_page() -> None:
    assert "security.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
