"""The user's own JSONL file: one object a line with `prompt` or `question`, and `answer`; other keys are metadata.

Other tools' forms of a row are read by forms.py.
"""

import json
import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from tinylora.errors import UserError
from tinylora.system.reading import read_lines, read_text
from tinylora.system.strict_json import distinct_keys, no_constant, parse_json
from tinylora.talk import shell_line
from tinylora.tasks.base import SPLITS, Item, Split, is_blank, shorten
from tinylora.tasks.scorers.json_text import as_written, exact_float
from tinylora.tasks.sets.forms import as_question
from tinylora.tasks.split import question_id
from tinylora.tasks.split_task import SplitItems, required_splits, split_by_hash

THEN = "set task.path to a JSONL file"
MOST_LIST_BYTES = 2**30
"""Of a file that is one JSON list: it is read at once."""
_LIST = re.compile(rb"\s*\[\s*(\{|$)")
_DECODER = json.JSONDecoder(parse_float=exact_float, parse_constant=no_constant, object_pairs_hook=distinct_keys)
_SPACE = re.compile(r"[ \t\r\n]*")


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, line N", object) for every line that is not blank. UTF-8, with or without a byte order mark, packed by
    gzip or not; a file that is one JSON list gives its objects, each with the line on which it begins.

    Raises: UserError with file and line number for a line that is no JSON object or has a key twice; for a missing or
    empty file, and for one that is no text file.
    """
    if path.suffix.lower() in (".csv", ".tsv"):
        raise UserError(f"{path} is a table; {_from_table(path)}")
    lines = read_lines(path, THEN)
    first = next(lines, None)
    if first is None:
        raise UserError(f"{path} is empty; it needs one JSON object a line, with 'question' and 'answer'")
    if _LIST.match(first[1]):
        lines.close()
        rows = _list_of_rows(path)
    else:
        rows = ((where, _parse(where, line)) for where, line in chain([first], lines))
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: must be a JSON object such as {{...}}, got {shorten(json.dumps(row), 60)}")
        yield where, row


def _from_table(path: Path) -> str:
    code = (
        "import csv, json, sys; f = open(sys.argv[1], encoding='utf-8-sig', newline=''); "
        "[print(json.dumps(row)) for row in csv.DictReader(f, delimiter="
        + ("','" if path.suffix.lower() == ".csv" else "chr(9)")
        + ")]"
    )
    return f"write it as JSONL, such as by: {shell_line('python', '-c', code, path)} > {path.stem}.jsonl"


def _parse(where: str, line: bytes) -> Any:
    try:
        return parse_json(line.decode("utf-8"), parse_float=exact_float)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}); each line must be one JSON object") from error


def _list_of_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The elements of a file that is one JSON list."""
    text = read_text(path, THEN, MOST_LIST_BYTES)
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}, line {line}"
        if text.startswith("]", at):
            if text[at + 1 :].strip():
                raise UserError(f"{where}: there is more behind the list's end; keep one list, or one object a line")
            return
        try:
            row, at = _DECODER.raw_decode(text, at)
            at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
            if text.startswith(",", at):
                at += 1
            elif not text.startswith("]", at):
                raise ValueError("there is no comma or ] behind it")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON ({error}); the file must be one list of objects") from error
        yield where, row


def text_field(row: dict[str, Any], name: str, where: str) -> str:
    """A text that is not blank. Raises: UserError that names file, line and field."""
    if name not in row or row[name] is None:
        raise UserError(
            f"{where}: there is no {name!r}; the line has {', '.join(row) or 'no keys'}"
            + ("; call the two 'question' and 'answer'" if name in ("question", "answer") else "")
        )
    value = row[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} must be a text, got {shorten(json.dumps(value), 60)}; put it in quotes")
    if is_blank(value):
        held = f" (it holds {value!a}, which nobody sees)" if value.strip() else ""
        raise UserError(f"{where}: {name!r} is blank{held}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {name!r} holds half a character (a lone surrogate), no tokenizer takes it"
        ) from error
    return value


def load(
    path: str,
    validation_share: float,
    test_share: float,
    *,
    needs_answer: bool = True,
    json_answers: bool = False,
    system: str = "",
) -> SplitItems:
    """Items of one file. `json_answers`: an answer may be a JSON object (for the scorer json-fields). `system`: the
    recipe's system prompt, which rows of messages may repeat (see forms.py).

    A repeated question counts once; with two different answers it is an error. If the rows have `split`, all must, and
    that holds, except that validation is taken from train by hash where the file has none.
    """
    if not path:
        raise UserError("task jsonl needs task.path, a JSONL file with 'question' and 'answer' on every line")
    items: dict[str, Item] = {}
    splits: dict[str, Split | None] = {}
    places: dict[str, str] = {}
    first_place, duplicates = "", 0
    for where, row in read_rows(Path(os.path.expanduser(path))):
        item, split = _item(as_question(row, where, system), where, needs_answer, json_answers)
        if first_place and (split is None) != (next(iter(splits.values())) is None):
            raise UserError(f"{where}: either every line has 'split' or none; {first_place} differs from this one")
        first_place = first_place or where
        known = items.get(item.id)
        if known is None:
            items[item.id], splits[item.id], places[item.id] = item, split, where
        elif splits[item.id] != split:
            raise UserError(
                f"{where}: the question of {places[item.id]} again, in {split} instead of {splits[item.id]}; "
                "no question may stand in two splits"
            )
        elif known.answer != item.answer:
            raise UserError(
                f"{where}: the question of {places[item.id]} again with another answer, "
                f"{shorten(item.answer, 60)} instead of {shorten(known.answer, 60)}; keep one of the two"
            )
        else:
            duplicates += 1
    if next(iter(splits.values())) is None:
        by_hash = split_by_hash(list(items.values()), validation_share, test_share)
        return SplitItems(by_hash, duplicates, required=required_splits(validation_share, test_share))
    given: dict[Split, list[Item]] = {
        name: [item for item in items.values() if splits[item.id] == name] for name in SPLITS
    }
    required = frozenset(name for name in SPLITS if given[name])
    if given["train"] and not given["validation"]:
        by_hash = split_by_hash(given["train"], validation_share, 0.0)
        given["train"], given["validation"] = by_hash["train"], by_hash["validation"]
        required |= required_splits(validation_share, 0.0)
    return SplitItems(given, duplicates, required=required)


def _item(row: dict[str, Any], where: str, needs_answer: bool, json_answers: bool) -> tuple[Item, Split | None]:
    if "prompt" in row and "question" in row:
        raise UserError(f"{where}: has both 'prompt' and 'question'; keep the one that is the question")
    name = "prompt" if "prompt" in row else "question"
    question = text_field(row, name, where)
    if json_answers and isinstance(row.get("answer"), dict):
        answer = as_written(row["answer"])
    elif row.get("answer") is None and not needs_answer:
        answer = ""
    else:
        answer = text_field(row, "answer", where)
    split = row.get("split")
    if split is not None and split not in SPLITS:
        raise UserError(f"{where}: 'split' must be one of {', '.join(SPLITS)}, got {shorten(json.dumps(split), 60)}")
    metadata = {key: value for key, value in row.items() if key not in (name, "answer", "split")}
    return Item(question_id(question), question, answer, metadata), split
