"""The law of the house: imports point down, none in a circle, small files and functions, and no wait without a limit.

The list of packages is read from docs/architecture.md, so that the page and this test cannot part.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tinylora"
AT_THE_ROOT = {"__init__.py", "__main__.py", "errors.py", "talk.py"}
LONG_FUNCTIONS = {
    "training/objective.py:policy_loss": "the loss in one piece; 40 of its lines are the formula, shapes and sources",
}
"""Functions of over 80 lines, each with its reason."""


@dataclass(frozen=True)
class Import:
    """One name that a file takes from another module of the package."""

    file: str
    line: int
    module: str
    at_top: bool
    """Outside of functions and of `if TYPE_CHECKING`, so that it runs when the file is imported."""


def floors() -> list[str]:
    """The packages from top to bottom, as the page lists them."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("## Packages\n")[2].partition("\n## ")[0]
    return re.findall(r"^    (\w+)/ ", section, re.MULTILINE)


def module_of(path: Path, package: Path) -> str:
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, package: Path, modules: set[str]) -> Iterator[Import]:
    """What a file takes from the package, at its top, in functions and for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    name = str(path.relative_to(package))
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append(inner if inner in modules else node.module)
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        for module in found:
            if module.partition(".")[0] == package.name:
                yield Import(name, node.lineno, module, id(node) not in later)


def all_imports(package: Path) -> list[Import]:
    paths = sorted(package.rglob("*.py"))
    modules = {module_of(path, package) for path in paths}
    return [one for path in paths for one in imports_of(path, package, modules)]


def upward(imports: list[Import], order: list[str]) -> list[str]:
    """Imports from a package above, of one that the list lacks, and of the root's own names."""
    floor = {name: i for i, name in enumerate(order)}
    wrong = []
    for one in imports:
        above, _, rest = one.file.partition("/")
        if not rest:
            continue  # a file at the root: below all, or what users meet first
        target = one.module.split(".")[1] if "." in one.module else ""
        if target in {"errors", "talk"} or (not target and above == "cli"):
            continue
        if above not in floor or target not in floor or floor[target] < floor[above]:
            wrong.append(f"{one.file}:{one.line} takes {one.module}")
    return wrong


def circles(imports: list[Import], package: Path) -> list[list[str]]:
    """Sets of files that reach each other by their imports at the top: Tarjan's strongly connected components."""
    edges: dict[str, set[str]] = {}
    for one in imports:
        if one.at_top:
            edges.setdefault(module_of(package / one.file, package), set()).add(one.module)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(edges.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            members = []
            while not members or members[-1] != node:
                members.append(stack.pop())
            if len(members) > 1:
                found.append(sorted(members))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def functions(package: Path) -> Iterator[tuple[str, int]]:
    """Every function with its lines."""
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                yield f"{path.relative_to(package)}:{node.name}", node.end_lineno - node.lineno + 1


def test_the_page_lists_the_packages_that_there_are() -> None:
    here = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(floors()) == here and len(floors()) == len(here)


def test_no_import_points_up() -> None:
    assert upward(all_imports(PACKAGE), floors()) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles(all_imports(PACKAGE), PACKAGE) == []


def test_at_the_root_are_four_files_at_most() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} <= AT_THE_ROOT


def test_no_function_is_longer_than_a_look_without_a_reason() -> None:
    long = {name: lines for name, lines in functions(PACKAGE) if lines > 80}
    assert long.keys() == LONG_FUNCTIONS.keys(), long
    assert all(LONG_FUNCTIONS.values())


def test_the_law_finds_what_it_forbids(tmp_path: Path) -> None:
    package = tmp_path / "tinylora"
    for name, text in {
        "__init__.py": "from tinylora.high.a import f",
        "low/__init__.py": "",
        "low/b.py": "def g():\n    from tinylora.high import a",
        "low/c.py": "from tinylora.low import d",
        "low/d.py": "import tinylora.low.c",
        "high/__init__.py": "",
        "high/a.py": "from tinylora.low.b import g\nfrom tinylora.errors import UserError",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    imports = all_imports(package)
    assert upward(imports, ["high", "low"]) == ["low/b.py:2 takes tinylora.high.a"]
    assert len(upward(imports, ["low", "high"])) == 1  # a takes b, and b is now above it
    assert circles(imports, package) == [["tinylora.low.c", "tinylora.low.d"]]


def test_tests_mirror_the_packages() -> None:
    """tests/<package>/test_<module>.py, perhaps with a word more; test_<package>.py is of the package as a whole."""
    for path in sorted((ROOT / "tests").glob("*/test_*.py")):
        package = PACKAGE / path.parent.name
        if not package.is_dir():
            continue  # of bench/ and docs/
        names = {one.stem for one in package.rglob("*.py")} | {one.name for one in package.rglob("*") if one.is_dir()}
        names = {name for name in names if not name.startswith("_")} | {package.name}
        name = path.stem.removeprefix("test_")
        assert any(name == one or name.startswith(f"{one}_") for one in names), f"{path}: of which module is it?"
    packages = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert packages - {"bench", "docs"} <= set(floors())


WAITS = {"wait", "join", "communicate", "get"}
RUNS = {"run", "check_output", "check_call", "call"}


def endless(tree: ast.AST) -> Iterator[int]:
    """Lines of calls that wait for a process, a thread, a barrier or a queue without a limit."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        limited = any(word.arg == "timeout" for word in node.keywords)
        of_subprocess = isinstance(node.func.value, ast.Name) and node.func.value.id == "subprocess"
        waits = node.func.attr in WAITS and not node.args
        if not limited and (waits or (of_subprocess and node.func.attr in RUNS)):
            yield node.lineno


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_no_test_waits_without_a_limit(path: Path) -> None:
    """Such a test hung for ever in the background of a script, where a child ignored Ctrl-C as its parent did."""
    assert list(endless(ast.parse(path.read_text(encoding="utf-8")))) == []


def test_endless_waits_are_seen() -> None:
    code = "p.wait()\nt.join()\np.communicate()\nq.get()\nsubprocess.run([])\n' '.join(x)\np.wait(timeout=1)\nd.get(1)"
    assert list(endless(ast.parse(code))) == [1, 2, 3, 4, 5]
