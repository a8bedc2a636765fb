"""Paths in settings, made absolute: looked for beside the recipe, then in the working folder.

So a run goes on from anywhere, and a recipe can be named from anywhere. A name of which nothing is there stays as it
is; who reads it says what is missing.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path

from tinylora.config.run import RunConfig
from tinylora.tasks.scorers.reference import split_reference


def located(config: RunConfig, beside: Path | None = None) -> RunConfig:
    """`config` with absolute paths: task.path, a model's folder or file, the folder of a Python scorer.

    beside: a recipe's folder, the only one that is looked into; without it, the working folder is.
    """
    folder = os.path.abspath(beside if beside is not None else Path())
    task = replace(config.task, path=_path(config.task.path, folder), scorer=_scorer(config.task.scorer, folder))
    return replace(config, task=task, model=replace(config.model, name=_path(config.model.name, folder)))


def _path(name: str, folder: str) -> str:
    if not name:
        return name
    expanded = os.path.expanduser(name)
    if os.path.isabs(expanded):
        return expanded
    found = os.path.join(folder, expanded)
    if not os.path.exists(found):
        return name
    short = os.path.normpath(found)  # which is another place where a link is behind ".."
    return short if os.path.exists(short) and os.path.samefile(short, found) else found


def _scorer(name: str, folder: str) -> str:
    if ":" not in name:
        return name
    place, module, function = split_reference(name)
    if not place:
        return f"{os.path.join(folder, module)}:{function}" if _is_there(module, [folder]) else name
    place = os.path.normpath(os.path.join(folder, os.path.expanduser(place)))
    return f"{os.path.join(place, module)}:{function}" if _is_there(module, [place]) else name


def _is_there(module: str, folders: Sequence[str]) -> bool:
    """Whether one of the folders has the module, without running anything of it; a mere folder is none."""
    top, dot, rest = module.partition(".")
    try:
        spec = PathFinder.find_spec(top, list(folders))
    except (ImportError, ValueError):
        return False
    if spec is None or not dot:
        return spec is not None and spec.origin is not None
    return _is_there(rest, list(spec.submodule_search_locations or ()))
