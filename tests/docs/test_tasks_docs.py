"""Every example of docs/tasks.md runs: files are written, recipes build their task, Python is executed."""

import re
import sys
from pathlib import Path

from tinylora.config.recipe import load_recipe
from tinylora.tasks import build_task

DOCS = Path(__file__).parents[2] / "docs" / "tasks.md"


def test_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    blocks = re.findall(r"```(\w+)\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    tasks = []
    for language, text in blocks:
        if language == "json":
            Path("capitals.jsonl").write_text(text, encoding="utf-8")
        elif language == "toml":
            Path("recipe.toml").write_text(text, encoding="utf-8")
            config = load_recipe("recipe.toml")
            tasks.append((build_task(config.task, config.prompt), config))
        elif text.startswith("# file: "):
            Path(text.split()[2]).write_text(text, encoding="utf-8")
        else:
            exec(compile(text, str(DOCS), "exec"), {})
    sys.modules.pop("my_reward", None)
    assert len(tasks) == 3
    for task, config in tasks:
        scores = task.score(task.items("train")[0], "Paris")
        assert set(config.reward) <= set(scores)
    polite = tasks[2][0]
    item = polite.items("train")[0]
    assert polite.score(item, f"{item.answer}, please") == {"strict": 1.0, "value_only": 1.0, "reward": 1.25}


def test_every_scorer_is_in_the_table():
    from tinylora.tasks.build import SCORERS

    rows = re.findall(r"^\| `([\w:-]+)` \|", DOCS.read_text(encoding="utf-8").partition("## Scorers")[2], re.MULTILINE)
    assert set(rows) == {*SCORERS, "reasoning-gym", "module:function"}
