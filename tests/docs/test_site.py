"""The site of `make docs`: its links, and that it has every page. mkdocs itself is not needed."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
REPO = "https://example.org/tinylora"


def rewritten(text: str, page: str, repo_url: str = "") -> str:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    at = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    changed: str = hooks.on_page_markdown(text, at, SimpleNamespace(repo_url=repo_url), None)
    return changed


@pytest.mark.parametrize(
    ("page", "link", "without", "on_the_hub"),
    [
        ("index.md", "[a](docs/tasks.md#x)", "[a](tasks.md#x)", "[a](tasks.md#x)"),
        ("index.md", "![a](docs/studies/b.png)", "![a](studies/b.png)", "![a](studies/b.png)"),
        ("index.md", "[a](LICENSE)", "a", f"[a]({REPO}/blob/HEAD/LICENSE)"),
        ("methods.md", "[a](../bench/b.json)", "a", f"[a]({REPO}/blob/HEAD/bench/b.json)"),
        ("methods.md", "[a](../README.md#c)", "a", f"[a]({REPO}/blob/HEAD/README.md#c)"),
        ("studies/b.md", "[`a`](../../bench/b.json)", "`a`", f"[`a`]({REPO}/blob/HEAD/bench/b.json)"),
        ("studies/b.md", "[a](../tasks.md)", "[a](../tasks.md)", "[a](../tasks.md)"),
        ("studies/b.md", "[a](b/c.png)", "[a](b/c.png)", "[a](b/c.png)"),
        ("methods.md", "[a](studies)", "a", f"[a]({REPO}/blob/HEAD/docs/studies)"),  # a folder is no page
        ("methods.md", "[a](#b) [c](https://d.e/f)", "[a](#b) [c](https://d.e/f)", "[a](#b) [c](https://d.e/f)"),
    ],
)
def test_links_lead_to_pages_or_to_the_repository(page: str, link: str, without: str, on_the_hub: str) -> None:
    assert rewritten(f"see {link}.", page) == f"see {without}."
    assert rewritten(f"see {link}.", page, REPO + "/") == f"see {on_the_hub}."


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = re.findall(r"- (?:.*: )?([\w./-]+\.md)$", nav, re.MULTILINE)
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert len(named) == len(set(named)) and pages <= set(named)


def test_the_site_loads_nothing_from_elsewhere() -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.search(r"^  font: false$", settings, re.MULTILINE)
    assert not re.search(r"^(?!repo_url|site_url).*https?://", settings, re.MULTILINE)
    assert "http" not in (ROOT / "docs" / "site.css").read_text(encoding="utf-8")
