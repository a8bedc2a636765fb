"""MBPP (Austin et al. 2021, arXiv:2108.07732): short Python tasks with tests, scored by running the reply.

The tests are part of the question, as in the paper: without them nobody knows the function's name. So a reply can also
pass by writing down the values that they expect, which no score here can tell from a solution. `sandbox.py` says what
the code can and cannot do while it runs.
"""

import ast
import builtins
import re
import textwrap
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from tinylora.errors import UserError
from tinylora.tasks.base import Item, shorten
from tinylora.tasks.sandbox.run import LEAST_MEMORY_MB, check_isolation, read_test, run_python
from tinylora.tasks.scorers.text import Scorer
from tinylora.tasks.sets.jsonl import text_field
from tinylora.tasks.split import question_id

TEMPLATE = """You are an expert Python programmer, and here is your task: {question}
Reply with the code in one block that begins with ```python."""
LONGEST_CODE = 100_000
"""Characters of code that are run; longer code is wrong unrun."""
# A fence may be indented, quoted, or stand behind a list's mark. Its run of signs is taken whole (`++`) and one repeat
# ends the line: else a long line without an end would take quadratic time.
_FENCE = r"^((?:[ \t]*(?:>|[-*+]|[0-9]{1,9}[.)]))*[ \t]*)(`{3,}+|~{3,}+)([^\n]*)\n"
_BLOCK = re.compile(_FENCE + r"(.*?)^(?:[ \t]*>)*[ \t]*\2", re.DOTALL | re.MULTILINE)
_OPEN_BLOCK = re.compile(_FENCE + r"(.*)\Z", re.DOTALL | re.MULTILINE)
_PYTHON = re.compile(r"(python3?|py)\b", re.IGNORECASE)


def to_item(row: dict[str, Any], where: str, options: Mapping[str, Any]) -> Item:
    """One row: `text`, `code`, `test_list`, and `test_setup_code`, which runs between the reply and the tests.

    Raises: UserError for a missing field and a test that is no Python.
    """
    text = text_field(row, "text", where)
    tests = row.get("test_list")
    if not isinstance(tests, (list, tuple)) or not tests or not all(isinstance(test, str) for test in tests):
        raise UserError(f"{where}: 'test_list' must be a list of texts, one at least, got {shorten(repr(tests), 60)}")
    setup = str(row.get("test_setup_code") or "")
    for source in (setup, *tests):
        try:
            read_test(source)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    question = f"{text.strip()}\nYour code should pass these tests:\n" + "\n".join(test.strip() for test in tests)
    metadata = {"task_id": row.get("task_id"), "text": text, "tests": list(tests), "setup": setup}
    return Item(question_id(question), question, str(row.get("code") or "").replace("\r\n", "\n"), metadata)


class PythonTestsScorer(Scorer):
    """The reply's code passes the item's `tests` (and `setup`), in the sandbox.

    strict: the code is the last closed ```python block. value_only: strict, or all blocks together pass, or one that
    was not closed, or, where there is no block, the whole reply. timed_out: 1 if a run took longer than
    `timeout_seconds`, which ends the scoring of the reply. Code in which a name that the tests use stands nowhere is
    wrong unrun. Runs up to four programs one after the other.

    Raises: UserError where the machine cannot shut the code in, unless `unsafe_without_namespaces` is true.
    """

    needs_answer = False

    def __init__(
        self, timeout_seconds: float = 10.0, memory_mb: int = 512, unsafe_without_namespaces: bool = False
    ) -> None:
        for name, value, least in (
            ("timeout_seconds", timeout_seconds, 0.1),
            ("memory_mb", memory_mb, LEAST_MEMORY_MB),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < 1e6:
                raise UserError(f"scorer python-tests: {name} must be a number of at least {least}, got {value!r}")
        if not isinstance(unsafe_without_namespaces, bool):
            raise UserError(
                "scorer python-tests: unsafe_without_namespaces must be true or false, "
                f"got {unsafe_without_namespaces!r}"
            )
        self.timeout_seconds, self.memory_mb = float(timeout_seconds), int(memory_mb)
        self.isolate = not unsafe_without_namespaces
        if self.isolate:
            check_isolation()

    def parse(self, text: str) -> str | None:
        """The last closed ```python block, or None."""
        blocks = [_code(block) for block in _BLOCK.finditer(text) if _PYTHON.match(block[3].strip())]
        return blocks[-1] or None if blocks else None

    def reads(self, item: Item) -> Any:
        """The tests and what runs before them."""
        return [item.metadata.get(name) for name in ("tests", "setup")]

    def score_item(self, item: Item, text: str) -> dict[str, float]:
        """Scores as the class says. Raises: UserError for an item without tests, and what `run_python` raises."""
        tests = item.metadata.get("tests")
        if not isinstance(tests, list) or not tests:
            raise UserError("scorer python-tests needs a list 'tests' of assertions beside the question")
        setup = str(item.metadata.get("setup") or "")
        names = _names_of(tuple(map(str, tests)), setup)
        strict_code = self.parse(text)
        for code in dict.fromkeys(code for code in (strict_code, *_lenient(text)) if code):
            if len(code) > LONGEST_CODE or ("import *" not in code and not all(name in code for name in names)):
                continue
            outcome = run_python(
                code, [*map(str, tests)], setup,
                timeout_seconds=self.timeout_seconds, memory_mb=self.memory_mb, isolate=self.isolate,
            )  # fmt: skip
            if outcome.passed:
                return {"strict": float(code == strict_code), "value_only": 1.0, "timed_out": 0.0}
            if outcome.timed_out:
                return {"strict": 0.0, "value_only": 0.0, "timed_out": 1.0}
        return {"strict": 0.0, "value_only": 0.0, "timed_out": 0.0}


def _lenient(text: str) -> list[str]:
    blocks = [_code(block) for block in _BLOCK.finditer(text)]
    rest = _OPEN_BLOCK.search(_BLOCK.sub("", text))
    bare = "" if blocks or rest else textwrap.dedent(text).strip()
    return ["\n".join(blocks).strip(), _code(rest) if rest else "", bare]


def _code(block: re.Match[str]) -> str:
    """What a fence holds, without the quotation marks and the indentation that it all has in common."""
    lines = block[4].replace("\r\n", "\n").split("\n")
    if ">" in block[1]:
        lines = [re.sub(r"^[ \t]*>[ \t]?", "", line) for line in lines]
    return textwrap.dedent("\n".join(lines)).strip()


@lru_cache(maxsize=4096)
def _names_of(tests: tuple[str, ...], setup: str) -> tuple[str, ...]:
    """Names that the tests read and neither they, nor the setup, nor Python bring along: they must be the code's."""
    for source in (setup, *tests):
        read_test(source)  # raises UserError
    trees = [ast.parse(source) for source in (setup, *tests)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {node.id for tree in trees[1:] for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if any(isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)) for node in nodes):
        return ()
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    return tuple(sorted(read - bound - set(dir(builtins))))
