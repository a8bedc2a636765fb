"""A Python function as reward: `module:function`, called as `function(item, text, **scorer_options)`.

`item` is a dict with id, question, answer and metadata; `text` is the reply. It returns a number in [0, 1], which is
then the score `reward` and also `strict` and `value_only`, or a dict of named numbers, which must hold `strict` in
[0, 1]; `value_only` is `strict` unless it is given, and any other name may have any finite value (a shaped reward,
say), to be weighed by the recipe's [reward]. Anything else, and anything it raises, stops the run with the item shown.
"""

import copy
import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from tinylora.errors import UserError
from tinylora.tasks.base import Item, shorten
from tinylora.tasks.scorers.code import code_digest
from tinylora.tasks.scorers.reference import split_reference
from tinylora.tasks.scorers.text import Scorer


class PythonScorer(Scorer):
    """Scores by the user's function. The answer may be missing: such a reward need not have one."""

    needs_answer = False

    def __init__(
        self, function: Callable[..., Any], options: Mapping[str, Any] | None = None, module: str = ""
    ) -> None:
        """module: where the function comes from, under the name that it was imported by."""
        self.function = function
        self.module = module
        self.options = dict(options or {})

    def parse(self, text: str) -> str | None:
        """The whole reply, or None if it is blank."""
        return text.strip() or None

    def reads(self, item: Item) -> Any:
        """All that the function is given."""
        return dict(item.metadata)

    def code(self) -> str:
        """Of the function's file and of those beside it that it imports."""
        return code_digest(self.module)

    def score_item(self, item: Item, text: str) -> dict[str, float]:
        """Raises: whatever the function raises, and UserError for a result that is not a score."""
        item_dict = {
            "id": item.id,
            "question": item.question,
            "answer": item.answer,
            "metadata": copy.deepcopy(dict(item.metadata)),
        }
        result = self.function(item_dict, text, **self.options)
        if not isinstance(result, Mapping):
            value = _number("the reward", result)
            if not 0 <= value <= 1:
                raise UserError(
                    f"a reward returned as one number must lie in [0, 1], got {value}; for another range return a "
                    'dict such as {"reward": 2.5, "strict": 1.0} and weigh "reward" in the recipe'
                )
            return {"reward": value, "strict": value, "value_only": value}
        if "strict" not in result:
            raise UserError(f"a reward returned as a dict must hold 'strict', got the keys {sorted(map(str, result))}")
        scores = {"value_only": result["strict"], **result}
        return {str(name): _number(f"the score {name!r}", value) for name, value in scores.items()}


def _number(what: str, value: Any) -> float:
    """A float of what counts as a number: also bool and 0-dimensional arrays and tensors, but no string."""
    if not hasattr(value, "__float__"):
        raise UserError(f"{what} must be a number, got {shorten(repr(value), 60)} of type {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number):
        raise UserError(f"{what} must be finite, got {number}")
    return number


def _check_place(reference: str, folder: str, module: ModuleType) -> None:
    """Raises: UserError where Python has a module of that name from elsewhere, as it has only one of each."""
    file = getattr(module, "__file__", None)
    if folder and (file is None or Path(folder).resolve() not in Path(file).resolve().parents):
        raise UserError(
            f"scorer {reference!r}: Python has another module of that name ({file or 'built in'}); rename the file"
        )


def load_function(reference: str) -> Callable[..., Any]:
    """The function that `module:function` or `FOLDER/module:function` names. The folder, else the current one, is put
    on the import path first, and stays.

    Raises: UserError when the module is not found or fails to import, or has no such function.
    """
    folder, module_name, function_name = split_reference(reference)
    place = os.path.abspath(os.path.expanduser(folder))
    if place not in sys.path:
        sys.path.insert(0, place)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UserError(
                f"scorer {reference!r}: there is no module {module_name!r}; run from the folder that holds "
                f"{module_name.split('.')[0]}.py, or install it (looked in {place} and the Python path)"
            ) from error
        raise UserError(f"scorer {reference!r}: importing {module_name!r} failed ({error})") from error
    except Exception as error:
        raise UserError(
            f"scorer {reference!r}: importing {module_name!r} failed ({type(error).__name__}: {error})"
        ) from error
    _check_place(reference, folder and place, module)
    function = getattr(module, function_name, None)
    if function is None:
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        close = get_close_matches(function_name, names, n=3, cutoff=0.5) or sorted(names)[:5]
        raise UserError(
            f"scorer {reference!r}: {module_name} has no {function_name!r}; "
            + (f"it has {', '.join(close)}" if close else "it has no function")
        )
    if not callable(function):
        raise UserError(f"scorer {reference!r}: {function_name} is a {type(function).__name__}, not a function")
    return function
