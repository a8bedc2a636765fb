"""The user's own JSONL file: one object a line with `prompt` or `question`, and `answer`; other keys are metadata."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinylora.errors import UserError
from tinylora.tasks.base import SPLITS, Item, Split, shorten
from tinylora.tasks.scorers.json_text import no_constant
from tinylora.tasks.split import question_id
from tinylora.tasks.split_task import SplitItems, required_splits, split_by_hash


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, line N", object) for every line that is not blank. UTF-8, with or without a byte order mark.

    Raises: UserError with file and line number for a line that is no JSON object; for a missing or empty file.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}; set task.path to an existing JSONL file") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); task.path must name a JSONL file") from error
    num_rows = 0
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8"), parse_constant=no_constant)
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON ({error}); each line must be one JSON object") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: must be a JSON object such as {{...}}, got {shorten(line.decode(), 60)}")
        num_rows += 1
        yield where, row
    if num_rows == 0:
        raise UserError(f"{path} is empty; it needs one JSON object a line, with 'question' and 'answer'")


def text_field(row: dict[str, Any], name: str, where: str) -> str:
    """A text that is not blank. Raises: UserError that names file, line and field."""
    if name not in row or row[name] is None:
        raise UserError(f"{where}: there is no {name!r}; the line has {', '.join(row) or 'no keys'}")
    value = row[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} must be a text, got {shorten(json.dumps(value), 60)}; put it in quotes")
    if not value.strip():
        raise UserError(f"{where}: {name!r} is blank")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {name!r} holds half a character (a lone surrogate), no tokenizer takes it"
        ) from error
    return value


def load(
    path: str, validation_share: float, test_share: float, *, needs_answer: bool = True, json_answers: bool = False
) -> SplitItems:
    """Items of one file. `json_answers`: an answer may be a JSON object (for the scorer json-fields).

    A repeated question counts once; with two different answers it is an error. If the rows have `split`, all must, and
    that holds, except that validation is taken from train by hash where the file has none.
    """
    if not path:
        raise UserError("task jsonl needs task.path, a JSONL file with 'question' and 'answer' on every line")
    items: dict[str, Item] = {}
    splits: dict[str, Split | None] = {}
    places: dict[str, str] = {}
    first_place, duplicates = "", 0
    for where, row in read_rows(Path(path)):
        item, split = _item(row, where, needs_answer, json_answers)
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
        answer = json.dumps(row["answer"], ensure_ascii=False)
    elif row.get("answer") is None and not needs_answer:
        answer = ""
    else:
        answer = text_field(row, "answer", where)
    split = row.get("split")
    if split is not None and split not in SPLITS:
        raise UserError(f"{where}: 'split' must be one of {', '.join(SPLITS)}, got {shorten(json.dumps(split), 60)}")
    metadata = {key: value for key, value in row.items() if key not in (name, "answer", "split")}
    return Item(question_id(question), question, answer, metadata), split
