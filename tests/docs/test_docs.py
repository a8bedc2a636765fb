"""What README and docs/architecture.md name is there: verbs, options, files, recipes, settings, imports."""

import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import typer

import tinylora
from tinylora.cli import app
from tinylora.config.recipe import load_recipe
from tinylora.config.schema import to_table
from tinylora.tasks import build_task

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PAGES = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]
VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def commands(text: str) -> list[list[str]]:
    """Every `tinylora ...` in a code block or in backticks, as words."""
    found = re.findall(r"^(?: {4})?tinylora (.+)$", text, re.MULTILINE) + re.findall(r"`tinylora ([^`]+)`", text)
    return [shlex.split(line.partition("#")[0]) for line in found]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not link.startswith("https://"):
            assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}"


@pytest.mark.parametrize("page", PAGES)
def test_verbs_and_options_exist(page: str) -> None:
    for words in commands((ROOT / page).read_text(encoding="utf-8")):
        if words[0].startswith("-"):
            continue
        assert words[0] in VERBS, f"{page}: tinylora {words[0]}"
        options = {option for param in VERBS[words[0]].params for option in (*param.opts, *param.secondary_opts)}
        named = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert named <= options | {"--help"}, f"{page}: tinylora {shlex.join(words)}"


def test_readme_names_every_verb_and_both_commands() -> None:
    assert {words[0] for words in commands(README)} >= set(VERBS)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = set(re.findall(r"\bmake ([a-z][\w-]*)\s+#", README)) | set(re.findall(r"`make ([\w-]+)`", README))
    assert {"demo", "test"} <= named <= set(targets)


@pytest.mark.parametrize("text", [README, ARCHITECTURE], ids=["README", "architecture"])
def test_files_in_backticks_exist(text: str) -> None:
    for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|toml|json))`", text):
        assert any((ROOT / base / name).exists() for base in ("", "tinylora")), name


def test_architecture_names_every_package_and_setting_that_there_is() -> None:
    for path in (ROOT / "tinylora").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"    {path.name}/" in ARCHITECTURE, path.name
    settings = to_table(load_recipe("demo"))
    for section, key in re.findall(r"`(train|eval|grpo|optim|generation|log)\.(\w+)`", ARCHITECTURE + README):
        assert key in settings[section], f"{section}.{key}"


def test_readme_recipe_builds_its_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"question": f"Capital of land {i}?", "answer": f"Town {i}"}) for i in range(100)]
    Path("mine.jsonl").write_text("\n".join(lines), encoding="utf-8")
    recipes = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    assert len(recipes) == 1
    Path("mine.toml").write_text(recipes[0], encoding="utf-8")
    config = load_recipe("mine.toml")
    task = build_task(config.task, config.prompt)
    item = task.items("test")[0]
    assert task.score(item, item.answer)["strict"] == 1.0
    assert (config.adapter.u, config.adapter.tying) == (13, "all")


def test_readme_python_imports_what_there_is() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names = set()
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
                    names.add(alias.name)
    used = set(re.findall(r"\btinylora\.(\w+)\(", README))
    assert used >= {"load_adapter", "attach", "AdapterConfig"} and used <= set(tinylora.__all__)
    assert "train" in names


def test_no_number_stands_where_the_demo_was_not_measured() -> None:
    block = re.search(r"<!-- demo-result -->(.*?)<!-- /demo-result -->", README, re.DOTALL)
    assert block is not None
    assert "bench/results/studies/demo.json" in block[1]
    if not (ROOT / "bench" / "results" / "studies" / "demo.json").exists():
        assert not re.search(r"\d", block[1])
