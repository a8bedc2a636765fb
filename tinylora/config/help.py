"""What every setting is: its type in words, its default, and the string under its field; and what a section is."""

import ast
import inspect
import itertools
import json
import math
import sys
import types
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any

from tinylora.config.run import RunConfig
from tinylora.config.schema import (
    describe_type,
    hints_of,
    is_section,
)


@dataclass(frozen=True, slots=True)
class FieldHelp:
    """One setting, for `tinylora settings` and docs/settings.md."""

    key: str
    """Dotted, as --set takes it."""
    type: str
    """In words, with the allowed values."""
    default: str
    """As TOML."""
    help: str
    """The string under the field in the source; empty where there is none."""


@dataclass(frozen=True, slots=True)
class SectionHelp:
    """One section with its settings."""

    name: str
    """As a recipe writes it in brackets."""
    about: str
    """The first paragraph of its docstring, on one line; where its keys are free, the string under its field."""
    settings: tuple[FieldHelp, ...]
    """In the order of the source. A section whose keys are free is a single setting, of its own name."""


def describe_sections() -> list[SectionHelp]:
    """Every section there is, in the order of `RunConfig`."""
    hints = hints_of(RunConfig)
    sections = []
    for name, rows in itertools.groupby(describe_fields(), key=lambda row: row.key.partition(".")[0]):
        settings = tuple(rows)
        about = (inspect.getdoc(hints[name]) or "") if is_section(hints[name]) else settings[0].help
        sections.append(SectionHelp(name, " ".join(about.partition("\n\n")[0].split()), settings))
    return sections


def describe_fields() -> list[FieldHelp]:
    """Every setting there is, in the order of `RunConfig`."""
    rows: list[FieldHelp] = []

    def walk(cls: Any, prefix: str) -> None:
        helps, hints = _field_helps(cls), hints_of(cls)
        for f in fields(cls):
            key = f"{prefix}.{f.name}" if prefix else f.name
            if is_section(hints[f.name]):
                walk(hints[f.name], key)
                continue
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            rows.append(FieldHelp(key, describe_type(hints[f.name]), _toml_value(default), helps.get(f.name, "")))

    walk(RunConfig, "")
    return rows


@cache
def _field_helps(cls: Any) -> dict[str, str]:
    """Field name to the string literal under it. Read from the source, because Python keeps no trace of it."""
    module: types.ModuleType = sys.modules[cls.__module__]
    tree = ast.parse(inspect.getsource(module))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    helps: dict[str, str] = {}
    for field_node, below in itertools.pairwise(body):
        if (
            isinstance(field_node, ast.AnnAssign)
            and isinstance(field_node.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            helps[field_node.target.id] = inspect.cleandoc(below.value.value)
    return helps


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml_value(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False)
