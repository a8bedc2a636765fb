"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): grade-school word problems with a number as answer.

The test split is the public test file; validation is taken from the train file by a hash of the question. Rows come
from a folder with train.jsonl and test.jsonl or from the hub, in the original form, whose answer is a solution that
ends in "#### 42", or with the final answer alone.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tinylora.errors import UserError
from tinylora.tasks.base import Item, shorten
from tinylora.tasks.jsonl import read_rows, text_field
from tinylora.tasks.split import question_id
from tinylora.tasks.split_task import SplitItems, required_splits, split_by_hash

HUB_ID = "openai/gsm8k"
Rows = Iterable[tuple[str, dict[str, Any]]]


def load(path: str, validation_share: float) -> SplitItems:
    """Items from the folder `path`, or from the hub where it is empty."""
    if path:
        folder = Path(path)
        for name in ("train.jsonl", "test.jsonl"):
            if not (folder / name).is_file():
                raise UserError(
                    f"task gsm8k: there is no {folder / name}; task.path must be a folder with train.jsonl and "
                    f"test.jsonl, or empty to load {HUB_ID} from the hub"
                )
        train, train_repeats = _distinct(read_rows(folder / "train.jsonl"))
        test, test_repeats = _distinct(read_rows(folder / "test.jsonl"))
    else:
        train, train_repeats = _distinct(_hub_rows("train"))
        test, test_repeats = _distinct(_hub_rows("test"))
    kept = [item for item in train.values() if item.id not in test]
    splits = split_by_hash(kept, validation_share, 0.0)
    splits["test"] = list(test.values())
    return SplitItems(
        splits,
        duplicates=train_repeats + test_repeats,
        overlaps=len(train) - len(kept),
        required=required_splits(validation_share, 0.0) | {"test"},
    )


def _distinct(rows: Rows) -> tuple[dict[str, Item], int]:
    """Items by id, the first of equal questions kept, and the number of others."""
    items: dict[str, Item] = {}
    repeats = 0
    for where, row in rows:
        question = text_field(row, "question", where)
        solution, marker, final = text_field(row, "answer", where).rpartition("####")
        if not final.strip():
            raise UserError(f"{where}: no answer behind '####' in {shorten(row['answer'], 60)}")
        metadata = {key: value for key, value in row.items() if key not in ("question", "answer")}
        if marker:
            metadata["solution"] = solution.strip()
        item = Item(question_id(question), question, final.strip(), metadata)
        if item.id in items:
            repeats += 1
        else:
            items[item.id] = item
    return items, repeats


def _hub_rows(split: str) -> Rows:
    next_step = "or put train.jsonl and test.jsonl into a folder and set task.path to it"
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"task gsm8k: loading {HUB_ID} needs the package datasets; run pip install 'tinylora[hub]', {next_step}"
        ) from error
    try:
        rows = datasets.load_dataset(HUB_ID, "main", split=split)
    except Exception as error:  # offline, no access, no space: the library raises many classes for them
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"task gsm8k: {HUB_ID} could not be loaded from the hub ({reason[0][:200]}); "
            f"check the connection (and HF_HUB_OFFLINE), {next_step}"
        ) from error
    return [(f"{HUB_ID}, {split} row {number}", dict(row)) for number, row in enumerate(rows)]
