"""JSON inside text, compared by value. Numbers are read as Decimals, so that 0.1 is 0.1."""

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from tinylora.system.strict_json import no_constant


class Written(float):
    """A number of a file that no float holds; it counts as the nearest one, and is written as it stood there."""

    text: str


def exact_float(text: str) -> float:
    """For `parse_float`: a float, which remembers the text where it is another number."""
    number = float(text)
    if math.isfinite(number) and Decimal(repr(number)) == Decimal(text):
        return number
    written = Written(number)
    written.text = text
    return written


def as_written(value: Any) -> str:
    """JSON text of a value that was read with `exact_float`: no digit is lost."""
    if isinstance(value, Written):
        return value.text
    if isinstance(value, dict):
        inner = (f"{json.dumps(key, ensure_ascii=False)}: {as_written(one)}" for key, one in value.items())
        return "{" + ", ".join(inner) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_written, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


_JSON = json.JSONDecoder(parse_float=Decimal, parse_int=Decimal, parse_constant=no_constant)

_BEGINNING = re.compile(r'\{[ \t\r\n]*["}]')
"""How an object begins. Looked for first, because an error of the decoder counts all lines before it: a reply of a
million braces would take minutes."""


def read_json(text: str, start: int = 0) -> tuple[Any, int] | None:
    """The JSON value that begins at `start` and where it ends, or None where there is none."""
    try:
        return _JSON.raw_decode(text, start)
    except (ValueError, ArithmeticError, RecursionError):  # broken, out of a Decimal's range, nested too deep
        return None


def json_objects(text: str) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Every outermost JSON object in a text with its start and end; numbers are Decimals, NaN is not JSON."""
    found = _BEGINNING.search(text)
    while found:
        read = read_json(text, found.start())
        if read is not None:
            yield read[0], found.start(), read[1]
        found = _BEGINNING.search(text, found.start() + 1 if read is None else read[1])


def json_equal(a: Any, b: Any) -> bool:
    """Equal as JSON: numbers by value (1 is 1.0), true is not 1, lists in order, objects by key."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(json_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(json_equal, a, b))
    return type(a) is type(b) and bool(a == b)
