"""Recipes: TOML in, a checked `RunConfig` out, and back. The dataclasses' annotations are the only schema there is.

A recipe names only what it changes; a table of free entries (reward, task.options) is taken as written, in place of the
default one, while `--set reward.value_only=0.5` changes that one entry.
"""

import ast
import difflib
import inspect
import itertools
import json
import math
import sys
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.tasks.sets.public_sets import fill_in


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, then apply `--set` overrides ("section.key=value").

    `name_or_path`: a path (ends in .toml or holds a separator), or the bare name of a recipe that the package brings.
    Raises: UserError for a missing or unreadable file, an unknown section or key, a wrong type or a value out of range.
    """
    path = _find(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path} is not TOML: {error}") from error
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read: {error.strerror}") from error
    return apply_overrides(parse_recipe(text, str(path)), overrides)


def parse_recipe(text: str, source: str) -> RunConfig:
    """Settings from TOML text; `source` names it in errors. Raises: UserError as `load_recipe` does."""
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"recipe {source} is not TOML: {error}") from error
    config: RunConfig = _build(RunConfig, fill_in(table), "")
    return config


def recipe_name(name_or_path: str) -> str:
    """What runs of a recipe are called after: gsm8k-0.5b, or mine for folder/mine.toml."""
    return Path(name_or_path).name.removesuffix(".toml")


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if name_or_path.endswith(".toml") or len(path.parts) > 1:
        if path.is_dir():
            raise UserError(f"recipe {name_or_path} is a folder; name a .toml file, such as {path / 'config.toml'}")
        if not path.is_file():
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
    changed: RunConfig = _build(RunConfig, table, "")
    return changed


def _set(table: dict[str, Any], dotted: str, text: str) -> None:
    annotation: Any = RunConfig
    parts = dotted.split(".")
    for depth, part in enumerate(parts):
        if _is_section(annotation):
            hints = _hints(annotation)
            if part not in hints:
                raise _unknown(part, ".".join(parts[:depth]), hints)
            annotation = hints[part]
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        if depth < len(parts) - 1:
            inner = table.setdefault(part, {})
            if not isinstance(inner, dict):
                key = ".".join(parts[: depth + 1])
                raise UserError(f"--set {dotted}: {key} is not a table, so nothing can be set in it; it is {inner!r}")
            table = inner
    if _is_section(annotation):
        raise UserError(f"--set {dotted}: {dotted} is a section; set one of {', '.join(_hints(annotation))} in it")
    value = _parse(text)
    if annotation is str and not isinstance(value, str):
        value = text  # a commit such as 1234567 or 1e5 is text because its field is
    table[parts[-1]] = value


def _parse(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # "5\nother = 1" is no value, though it makes two lines of TOML
    return parsed["value"] if list(parsed) == ["value"] else text


# --- TOML table to dataclass ---


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and is_dataclass(annotation)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _build(cls: Any, table: Mapping[str, Any], prefix: str) -> Any:
    hints = _hints(cls)
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in hints:
            raise _unknown(name, prefix, hints)
        values[name] = _convert(value, hints[name], f"{prefix}.{name}" if prefix else name)
    return cls(**values)


def _convert(value: Any, annotation: Any, key: str) -> Any:
    """`value`, as TOML gave it, in the type that `annotation` asks for. Raises: UserError naming key, type, value."""
    origin, args = get_origin(annotation), get_args(annotation)
    if _is_section(annotation):
        if isinstance(value, dict):
            return _build(annotation, value, key)
    elif annotation is Any:
        if _is_plain(value):
            return value
    elif origin is Literal:
        # 1 == True in Python: the type must match too
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        if isinstance(value, str):
            hint = closest(value, [str(choice) for choice in args])
            raise UserError(f"recipe key {key} must be {describe_type(annotation)}, got {value!r}{hint}")
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_convert(item, args[0], f"{key}[{i}]") for i, item in enumerate(value))
    elif origin is dict:
        if isinstance(value, dict):
            return {name: _convert(item, args[1], f"{key}.{name}") for name, item in value.items()}
    elif annotation is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif annotation in (bool, int, str):
        if type(value) is annotation:
            return value
    else:  # our own mistake, in config.py
        raise TypeError(f"{key}: recipes have no rule for the annotation {annotation!r}")
    raise UserError(f"recipe key {key} must be {describe_type(annotation)}, got {value!r}")


def _is_plain(value: Any) -> bool:
    """Text, numbers, true/false, lists and tables of them: what a library's options can be. Dates are none."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return isinstance(value, (str, int, float, bool))


def describe_type(annotation: Any) -> str:
    """A field's type in words, with its allowed values: "a whole number", "one of auto, cpu, cuda, mps"."""
    if _is_section(annotation):
        return f"a section with keys {', '.join(_hints(annotation))}"
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}" if len(args) > 1 else f"{args[0]} (the only choice)"
    if origin is tuple:
        return (
            'a list of text, such as ["a", "b"]' if args[0] is str else 'a list of tables of text, such as [{a = "b"}]'
        )
    if origin is dict:
        return "a table of numbers, such as {a = 1.0}" if args[1] is float else "a table, such as {a = 1}"
    words: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text in quotes",
        Any: "text, a number, true or false, or a list or table of them",
    }
    return words[annotation]


def _unknown(name: str, prefix: str, allowed: Iterable[str]) -> UserError:
    allowed = list(allowed)
    what, where = ("key", f"in section [{prefix}]") if prefix else ("section", "in the recipe")
    message = f"unknown {what} {name!r} {where}{closest(name, allowed)}; allowed: {', '.join(allowed)}"
    if prefix:
        return UserError(message)
    # A key without its section is a common slip, and so are two sections mixed up.
    homes = [section for section, cls in _hints(RunConfig).items() if _is_section(cls) and name in _hints(cls)]
    return UserError(f"{message}{f' ({name} is a key of [{homes[0]}])' if homes else ''}")


def closest(name: str, allowed: Sequence[str]) -> str:
    """ ", did you mean 'lr'?", or nothing, to end a sentence about an unknown name."""
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


# --- dataclass to TOML, and differences ---


def to_table(config: Any) -> dict[str, Any]:
    """A config as the plain dicts and lists that TOML and JSON hold; a copy, free to change."""

    def plain(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value

    table: dict[str, Any] = plain(config)
    return table


def dump_config(config: RunConfig) -> str:
    """Every setting as TOML text; `load_recipe` of it gives an equal config, to the last bit of every float.

    Raises: UserError for an option that TOML cannot hold (None, or an object given from Python).
    """
    table = to_table(config)
    for section, values in table.items():
        for name, value in values.items():
            if not _is_plain(value):
                raise UserError(f"{section}.{name} must hold {describe_type(Any)} to be kept, got {value!r}")
    return tomli_w.dumps(table)


def diff_configs(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every setting that differs; None where a free entry is missing."""

    def walk(a: Any, b: Any, key: str) -> list[tuple[str, Any, Any]]:
        if isinstance(a, dict) and isinstance(b, dict):
            names = [*a, *(name for name in b if name not in a)]
            return [row for n in names for row in walk(a.get(n), b.get(n), f"{key}.{n}" if key else n)]
        # repr tells 1 from 1.0 and from True, 0.0 from -0.0, and finds NaN equal to itself; == does none of these.
        return [] if repr(_in_one_order(a)) == repr(_in_one_order(b)) else [(key, a, b)]

    return walk(to_table(old), to_table(new), "")


def _in_one_order(value: Any) -> Any:
    """Tables inside of lists with their entries by name: TOML keeps no order among them."""
    if isinstance(value, dict):
        return {name: _in_one_order(value[name]) for name in sorted(value)}
    return [_in_one_order(one) for one in value] if isinstance(value, (list, tuple)) else value


# --- help ---


@dataclass(frozen=True, slots=True)
class FieldHelp:
    """One setting, for `--help-config` and the docs."""

    key: str
    """Dotted, as --set takes it."""
    type: str
    """In words, with the allowed values."""
    default: str
    """As TOML."""
    help: str
    """The string under the field in the source; empty where there is none."""


def describe_fields() -> list[FieldHelp]:
    """Every setting there is, in the order of `RunConfig`."""
    rows: list[FieldHelp] = []

    def walk(cls: Any, prefix: str) -> None:
        helps, hints = _field_helps(cls), _hints(cls)
        for f in fields(cls):
            key = f"{prefix}.{f.name}" if prefix else f.name
            if _is_section(hints[f.name]):
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
