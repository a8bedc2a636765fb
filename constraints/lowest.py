"""Write lowest.txt: the lowest versions that pyproject.toml allows, which `make test-lowest` installs.

torch is left out: its build is chosen by cpu.txt, and older builds for the CPU alone are not on every package index.
"""

import re
import tomllib
from pathlib import Path

HEAD = """\
# The lowest versions that pyproject.toml allows, for make test-lowest. torch is in cpu.txt.
# Made by: python constraints/lowest.py
"""
FROM_ELSEWHERE = {"torch"}


def lowest(pyproject: Path) -> str:
    """The file's text: NAME==VERSION of every dependency of the package itself that has a lower bound."""
    wanted = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    bounds = [re.match(r"([\w.-]+)>=([\w.]+)", requirement) for requirement in wanted]
    return HEAD + "".join(f"{one[1]}=={one[2]}\n" for one in bounds if one and one[1] not in FROM_ELSEWHERE)


if __name__ == "__main__":
    here = Path(__file__).parent
    (here / "lowest.txt").write_text(lowest(here.parent / "pyproject.toml"), encoding="utf-8")
