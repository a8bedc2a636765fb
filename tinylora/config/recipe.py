"""Recipes: TOML in, a checked `RunConfig` out, and `--set` on top.

A recipe names only what it changes; a table of free entries (reward, task.options) is taken as written, in place of the
default one, while `--set reward.value_only=0.5` changes that one entry.
"""

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from tinylora.config.located import located
from tinylora.config.run import RunConfig
from tinylora.config.schema import (
    build_section,
    closest,
    hints_of,
    is_section,
    to_table,
    unknown_key,
)
from tinylora.config.toml_text import parse_toml, read_toml
from tinylora.errors import BACKSLASH, UserError
from tinylora.system.folders import folder_name
from tinylora.tasks.sets.public_sets import fill_in


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, then apply `--set` overrides ("section.key=value").

    Paths in a recipe are looked for beside it, then, like those of overrides, in the working folder.

    `name_or_path`: a path (ends in .toml or holds a separator), or the bare name of a recipe that the package brings.
    Raises: UserError for a missing or unreadable file, an unknown section or key, a wrong type or a value out of range.
    """
    path = _find(name_or_path)
    return apply_overrides(located(read_settings(path), path.parent), overrides)


def read_settings(path: Path) -> RunConfig:
    """The settings of a file as they stand there. Raises: UserError as `load_recipe` does."""
    return _resolve(read_toml(path, "recipe"))


def parse_recipe(text: str, source: str) -> RunConfig:
    """Settings from TOML text; `source` names it in errors. Raises: UserError as `load_recipe` does."""
    return _resolve(parse_toml(text, f"recipe {source}"))


def _resolve(table: dict[str, Any]) -> RunConfig:
    config: RunConfig = build_section(RunConfig, fill_in(table), "")
    return config


def recipe_name(name_or_path: str) -> str:
    """What runs of a recipe are called after: gsm8k-0.5b, or my-task for "folder/my task.toml"."""
    return folder_name(Path(name_or_path).name.removesuffix(".toml"))


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if name_or_path.endswith(".toml") or len(path.parts) > 1:
        if path.is_dir():
            raise UserError(f"recipe {name_or_path} is a folder; name a .toml file, such as {path / 'config.toml'}")
        if not os.path.exists(path):
            raise UserError(f"recipe {name_or_path} does not exist; give the path of a .toml file")
        return path
    from tinylora.system.paths import recipes_dir

    folder = recipes_dir()
    path = folder / f"{name_or_path}.toml"
    if not path.is_file():
        names = sorted(p.stem for p in folder.glob("*.toml"))
        raise UserError(
            f"no recipe is named {name_or_path!r}{closest(name_or_path, names)}; "
            f"there are {', '.join(names) or 'none'}, or give the path of a .toml file"
        )
    return path


def apply_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`config` with each "section.key=value" set, in order; entries of free tables too (task.options.max_terms=2).

    The value is TOML (3, 1e-2, true, ["a", "b"], {a = 1}); what is not TOML, or stands where text belongs, is text.
    Raises: UserError for an override without "=", an unknown key, a wrong type or a value out of range.
    """
    table = to_table(config)
    for override in overrides:
        key, equals, text = override.partition("=")
        key, text = key.strip(), text.strip()
        if not equals or not all(key.split(".")):
            raise UserError(f"--set needs section.key=value, got {override!r}")
        _set(table, key, text)
    changed: RunConfig = build_section(RunConfig, table, "")
    return changed


def _set(table: dict[str, Any], dotted: str, text: str) -> None:
    annotation: Any = RunConfig
    parts = dotted.split(".")
    for depth, part in enumerate(parts):
        if is_section(annotation):
            hints = hints_of(annotation)
            if part not in hints:
                raise unknown_key(part, ".".join(parts[:depth]), hints)
            annotation = hints[part]
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        if depth < len(parts) - 1:
            inner = table.setdefault(part, {})
            if not isinstance(inner, dict):
                key = ".".join(parts[: depth + 1])
                raise UserError(f"--set {dotted}: {key} is not a table, so nothing can be set in it; it is {inner!r}")
            table = inner
    if is_section(annotation):
        raise UserError(f"--set {dotted}: {dotted} is a section; set one of {', '.join(hints_of(annotation))} in it")
    value = _parse(text)
    if annotation is str and not isinstance(value, str):
        value = text  # a commit such as 1234567 or 1e5 is text because its field is
    table[parts[-1]] = value


def _parse(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # also a number too long to read
        if text[:1] == '"' == text[-1:] and "\\" in text:
            raise UserError(f"--set: {text} is no text in TOML; {BACKSLASH}") from None
        return text
    # "5\nother = 1" is no value, though it makes two lines of TOML
    return parsed["value"] if list(parsed) == ["value"] else text
