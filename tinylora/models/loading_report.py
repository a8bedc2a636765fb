"""What transformers says of a load: weights that it lacked, that did not fit, and that it had no place for.

transformers goes on where weights are missing, with random numbers in their place, so each load asks.
"""

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tinylora.errors import UserError
from tinylora.talk import say_to_stderr

_SHOWN = 3
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_ROW = re.compile(r"^(\S.*?)\s*\|\s*(MISMATCH|CONVERSION)\s*\|", re.MULTILINE)


def refuse_missing(name: str, report: Mapping[str, Any]) -> None:
    """Raises: UserError that names the weights which a load lacked. A head that is tied to the embeddings is none."""
    if missing := sorted(report["missing_keys"], key=_in_order):
        raise UserError(f"the weights of {name} lack {len(missing)} tensors, {some_of(missing)}; fetch it again, whole")


def say_unexpected(name: str, report: Mapping[str, Any]) -> None:
    """Say which weights the model has no place for: a config.json with fewer layers makes another model of them."""
    if over := sorted(report["unexpected_keys"], key=_in_order):
        say_to_stderr(f"{name} as its config.json has it takes no notice of {len(over)} tensors, {some_of(over)}")


def some_of(names: Collection[str]) -> str:
    """The names, or the first of them: "such as a, b and 7 more"."""
    shown = list(names)[:_SHOWN]
    if len(names) <= _SHOWN:
        return ", ".join(shown)
    return f"such as {', '.join(shown)}"


def _in_order(name: str) -> list[tuple[int, str]]:
    """Layer 10 behind layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


@contextmanager
def heard_misfits(found: list[str]) -> Iterator[None]:
    """Add the tensors that transformers names in its log as of other shapes, or as impossible to put together.

    It logs them as a table, and raises an error that refers to it.
    """

    class Listens(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.extend(match[1] for match in _ROW.finditer(_COLOUR.sub("", record.getMessage())))

    logger, handler = logging.getLogger("transformers.modeling_utils"), Listens(logging.WARNING)
    level, passed_on = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = passed_on
