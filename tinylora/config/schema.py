"""The settings' dataclasses to and from TOML tables; their annotations are the only schema there is."""

import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

from tinylora.config.run import RunConfig
from tinylora.errors import UserError


def is_section(annotation: Any) -> bool:
    """Whether a field's type is a dataclass, so that its table is one of settings."""
    return isinstance(annotation, type) and is_dataclass(annotation)


@cache
def hints_of(cls: Any) -> dict[str, Any]:
    """Field name to its type, in the order of the source."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def build_section(cls: Any, table: Mapping[str, Any], prefix: str) -> Any:
    """A dataclass from a TOML table. Raises: UserError for an unknown key, a wrong type or a value out of range."""
    hints = hints_of(cls)
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in hints:
            raise unknown_key(name, prefix, hints)
        values[name] = _convert(value, hints[name], f"{prefix}.{name}" if prefix else name)
    return cls(**values)


def _convert(value: Any, annotation: Any, key: str) -> Any:
    """`value`, as TOML gave it, in the type that `annotation` asks for. Raises: UserError naming key, type, value."""
    origin, args = get_origin(annotation), get_args(annotation)
    if is_section(annotation):
        if isinstance(value, dict):
            return build_section(annotation, value, key)
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
            if abs(value) <= sys.float_info.max or isinstance(value, float):
                return float(value)
            raise UserError(
                f"recipe key {key} must be a number that a float holds, got one of {len(str(value))} digits"
            )
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
    if is_section(annotation):
        return f"a section with keys {', '.join(hints_of(annotation))}"
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


def unknown_key(name: str, prefix: str, allowed: Iterable[str]) -> UserError:
    """The error for a section or key that there is not, with the nearest one that there is."""
    allowed = list(allowed)
    what, where = ("key", f"in section [{prefix}]") if prefix else ("section", "in the recipe")
    message = f"unknown {what} {name!r} {where}{closest(name, allowed)}; allowed: {', '.join(allowed)}"
    if prefix:
        return UserError(message)
    # A key without its section is a common slip, and so are two sections mixed up.
    homes = [section for section, cls in hints_of(RunConfig).items() if is_section(cls) and name in hints_of(cls)]
    return UserError(f"{message}{f' ({name} is a key of [{homes[0]}])' if homes else ''}")


def closest(name: str, allowed: Sequence[str]) -> str:
    """ ", did you mean 'lr'?", or nothing, to end a sentence about an unknown name."""
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


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
