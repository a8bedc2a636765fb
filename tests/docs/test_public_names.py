"""What `import tinylora` offers is there, and the pages for users need nothing else."""

import ast
import re
from pathlib import Path

import pytest

import tinylora

ROOT = Path(__file__).parents[2]


def test_every_public_name_is_there() -> None:
    assert sorted(tinylora._HOMES) == sorted(tinylora.__all__)
    for name in tinylora.__all__:
        assert getattr(tinylora, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        tinylora.nonsense  # noqa: B018


@pytest.mark.parametrize("page", ["README.md", "docs/tasks.md"])
def test_pages_take_public_names_alone(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    modules, names = set(), set()
    for node in (node for block in blocks for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(str(node.module))
            names |= {alias.name for alias in node.names if node.module == "tinylora"}
    assert {module for module in modules if module.partition(".")[0] == "tinylora"} == {"tinylora"}
    assert names <= set(tinylora.__all__)
