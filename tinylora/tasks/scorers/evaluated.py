"""Replies that a library's rule would evaluate as Python: let through where they are plain values or plain mathematics.

reasoning-gym's rules call `eval` or sympy's `parse_expr` (which is `eval`, too) on the answer of some tasks. Such an
answer is a program that nobody has read, in this process. What is let through is a list of forms, not of dangers.
"""

import ast
import inspect
import re
from functools import cache
from typing import Any, Literal

Kind = Literal["", "values", "mathematics"]
LONGEST = 10_000
"""Characters; a longer answer is let through to no such rule."""
HIGHEST_EXPONENT = 1000
DEEPEST_POWER = 2
"""Powers within powers: 9**9**9 alone has more digits than there is memory."""

_VALUES = (
    ast.Expression, ast.Constant, ast.Name, ast.Load, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.UnaryOp, ast.UAdd,
    ast.USub, ast.BinOp, ast.Add, ast.Sub,
)  # fmt: skip
_MATHEMATICS = (
    ast.Expression, ast.Constant, ast.Name, ast.Load, ast.UnaryOp, ast.UAdd, ast.USub, ast.BinOp, ast.Add, ast.Sub,
    ast.Mult, ast.Div, ast.Pow, ast.BitXor, ast.Call,
)  # fmt: skip
FUNCTIONS = frozenset({
    "Abs", "abs", "acos", "acosh", "acot", "acoth", "acsc", "asec", "asin", "asinh", "atan", "atanh", "cos", "cosh",
    "cot", "coth", "csc", "csch", "erf", "exp", "ln", "log", "sec", "sech", "sign", "sin", "sinh", "sqrt", "tan",
    "tanh",
})  # fmt: skip
"""What may be called in mathematics."""


@cache
def how_evaluated(rule: Any) -> Kind:
    """What a rule (a function) does with an answer: evaluates it as values or as mathematics, or neither."""
    try:
        source = inspect.getsource(rule)
    except (OSError, TypeError):
        return "mathematics"  # cannot be read, so the stricter list
    if re.search(r"\b(parse_expr|sympify|parse_latex)\(|\bS\(|\bexec\(", source):
        return "mathematics"
    return "values" if re.search(r"(?<![\w.])eval\(", source) else ""


def may_be_evaluated(text: str, kind: Kind) -> bool:
    """Whether a rule of that kind may have the text.

    >>> [may_be_evaluated(t, "values") for t in ("[[0, 1]]", "1 2 3", "__import__('os').abort()")]
    [True, True, False]
    >>> [may_be_evaluated(t, "mathematics") for t in ("(3 + x)**2/sin(x)", "9**9**9", "().__class__")]
    [True, False, False]
    """
    if not kind:
        return True
    if len(text) > LONGEST:
        return False
    try:
        tree = ast.parse(text.strip(" \t\n\r\f"), mode="eval")
    except SyntaxError:
        return kind == "values"  # eval refuses it as well; sympy rewrites it first, and into what is not known
    except (ValueError, RecursionError, MemoryError):
        return False
    nodes = list(ast.walk(tree))
    if kind == "values":
        return all(isinstance(node, _VALUES) for node in nodes)
    return all(isinstance(node, _MATHEMATICS) and _is_plain(node) for node in nodes)


def _is_plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):  # a text would be evaluated once more by what it is given to
        return isinstance(node.value, (int, float))
    if isinstance(node, ast.Name):
        return not node.id.startswith("_")
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        numbers = [one.value for one in ast.walk(node.right) if isinstance(one, ast.Constant)]
        small = all(isinstance(one, (int, float)) and abs(one) <= HIGHEST_EXPONENT for one in numbers)
        return small and _powers(node.right) == 0 and _powers(node) <= DEEPEST_POWER
    return True


def _powers(node: ast.AST) -> int:
    """How deep powers stand in each other."""
    inner = max((_powers(one) for one in ast.iter_child_nodes(node)), default=0)
    return inner + (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow))
