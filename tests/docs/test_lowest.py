"""constraints/lowest.txt is what constraints/lowest.py writes, from the bounds in pyproject.toml."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
lowest = runpy.run_path(str(ROOT / "constraints" / "lowest.py"))["lowest"]


def test_the_lowest_versions_are_those_of_pyproject() -> None:
    written = (ROOT / "constraints" / "lowest.txt").read_text(encoding="utf-8")
    assert written == lowest(ROOT / "pyproject.toml"), "run python constraints/lowest.py"


def test_only_lower_bounds_of_the_package_itself_are_taken(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["a>=1.2", "b-c>=3,<4", "pinned==5", "any", "torch>=2.11"]\n'
        '[project.optional-dependencies]\nextra = ["d>=6"]\n'
    )
    lines = lowest(tmp_path / "pyproject.toml").splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["a==1.2", "b-c==3"]
