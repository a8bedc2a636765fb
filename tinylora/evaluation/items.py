"""Replies of a comparison as JSONL, a line an item and condition: every reported number can be recomputed from it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinylora.errors import UserError
from tinylora.rollouts.replies import FIELDS, Reply, check_row
from tinylora.system.failures import writing
from tinylora.system.outputs import Output
from tinylora.system.reading import read_lines
from tinylora.system.strict_json import parse_json


def items_data(conditions: Mapping[str, Sequence[Reply]], about: Mapping[str, str]) -> bytes:
    """The lines of a file of items. `about` stands in every line, so that a line says what it belongs to."""
    lines = [
        json.dumps({"condition": name, **about, **result.row()}, ensure_ascii=False) + "\n"
        for name, results in conditions.items()
        for result in results
    ]
    return "".join(lines).encode("utf-8", errors="replace")


def write_items(path: Path, conditions: Mapping[str, Sequence[Reply]], about: Mapping[str, str]) -> None:
    """Write them as a file of their own, atomically. Raises: UserError."""
    Output.at(path, force=True).write(items_data(conditions, about))


def check_untrained(path: Path) -> None:
    """That the untrained model's replies can be read there, or written where nothing is. Raises: UserError."""
    with writing(path):
        if not path.exists():
            Output.at(path)
        elif not path.is_file():
            raise UserError(f"{path} is no file; --untrained names one that is read, or made if it is not there")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of items. Raises: UserError if it cannot be read or a line is none."""
    rows = []
    for where, line in read_lines(path, "name a file that tinylora eval --items wrote"):
        try:
            rows.append(parse_json(line))
        except ValueError as error:
            raise UserError(f"{where} is damaged ({error}); remove the file, and it is made again") from error
    if not rows or not all(isinstance(row, dict) and {"condition", *FIELDS} <= set(row) for row in rows):
        raise UserError(
            f"{path} holds no replies as tinylora eval --items writes them; remove it, or name another file"
        )
    for number, row in enumerate(rows, 1):
        try:
            check_row(row)
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}; remove the file, and it is made again") from error
    return rows


def read_items(path: Path, condition: str) -> list[Reply]:
    """One condition's replies, in their order. Raises: UserError as `read_rows`, or if there are none."""
    rows = [row for row in read_rows(path) if row["condition"] == condition]
    if not rows:
        raise UserError(f"{path} holds no replies of the condition {condition!r}")
    return [Reply.from_row(row) for row in rows]


def read_untrained(path: Path, about: Mapping[str, str], item_ids: Sequence[str]) -> tuple[Reply, ...] | None:
    """The untrained model's replies if the file is there. Raises: UserError if they are of other items or base."""
    if not path.exists():
        return None
    rows = read_rows(path)
    for key, value in about.items():
        for row in rows:
            if row.get(key) != value:
                raise UserError(
                    f"{path} holds replies to something else ({key} {row.get(key)!r} there, {value!r} here); "
                    "name another file with --untrained"
                )
    replies = tuple(read_items(path, "untrained"))
    if [reply.item_id for reply in replies] != list(item_ids):
        raise UserError(
            f"{path} does not hold one reply to each of the {len(item_ids):,} items in their order; remove it, and it "
            "is made again, or name another file with --untrained"
        )
    return replies
