"""How a Python function is named: module:function, or FOLDER/module:function for a module of that folder."""

import os
from typing import NamedTuple

from tinylora.errors import UserError


class Reference(NamedTuple):
    """The parts of a name; `folder` is empty where the module is looked for on the Python path."""

    folder: str
    module: str
    function: str


def split_reference(reference: str) -> Reference:
    """The parts. A file's name stands for its module: lib/reward.py:score is lib/reward:score.

    Raises: UserError for a name that is none.
    """
    place, _, function = reference.rpartition(":")
    folder, module = os.path.split(place)
    module = module.removesuffix(".py")
    if not module or not function or not all(module.split(".")):
        raise UserError(f"a Python scorer is written module:function, or FOLDER/module:function, got {reference!r}")
    return Reference(folder if folder or not place.endswith(".py") else ".", module, function)


def bare_reference(reference: str) -> str:
    """module:function, without the folder, which is another one on another machine; other names as they are."""
    if ":" not in reference:
        return reference
    place, _, function = reference.rpartition(":")
    return f"{os.path.split(place)[1].removesuffix('.py')}:{function}"
