"""Public benchmark sets: where the rows come from, how a row becomes an item, and what is asked by default.

Rows come from a folder with train.jsonl and test.jsonl (task.path) or from the hub. The test split is the public test
file; validation is taken from the train file by a hash of the question. Train rows whose question is in the test file
are dropped and counted. A set without a train file is for evaluation: it refuses to be trained on. The sets
themselves are in `public_sets.py`.
"""

import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinylora.errors import UserError
from tinylora.tasks.base import Item
from tinylora.tasks.sets.jsonl import read_rows
from tinylora.tasks.split_task import SplitItems, required_splits, split_by_hash

Rows = Iterable[tuple[str, dict[str, Any]]]
Options = Mapping[str, Any]


def _no_options(name: str, options: Options) -> None:
    if options:
        raise UserError(f"task.options are for reasoning-gym tasks, {name} has none; got {', '.join(options)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PublicSet:
    """One data set: its source, its rows and its defaults."""

    name: str
    about: str
    """What it is, in a few words."""
    licence: str
    """As its publisher states it, and what to know about it."""
    item: Callable[[dict[str, Any], str, Options], Item | None]
    """(row, "file, line N", task.options) to an item, or None for a row that the options leave out."""
    hub_id: str = ""
    """Empty where the set is on no hub in a form that is read here; task.path is needed then."""
    hub_config: str = ""
    hub_configs: tuple[str, ...] = ()
    """For a set in several configurations: their rows one after another, instead of those of `hub_config`."""
    hub_train: str = "train"
    hub_test: str = "test"
    test_only: bool = False
    """Evaluation only: there is no train file."""
    scorer: str = "number"
    scorer_options: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""
    template: Callable[[Options], str] = lambda options: "{question}"
    """Default user turn."""
    max_new_tokens: int = 0
    """Default budget of a reply; 0 leaves the recipe's."""
    same: Callable[[Item], str] = lambda item: item.id
    """Items of train and test with equal values are the same question."""
    select: Callable[[Item, Options], bool] = lambda item, options: True
    """Whether task.options take the item. Asked last: a train row is dropped for any test row, taken or not.

    Raises: UserError for an item that does not have what the options ask about.
    """
    check_options: Callable[[str, Options], None] = _no_options
    """Raises: UserError for options that the set does not take."""
    check_prompt: Callable[[str, Options], None] = lambda text, options: None
    """Raises: UserError for a prompt (system and template) that leaves out what the set needs in it."""

    def defaults(self, options: Options) -> dict[str, dict[str, Any]]:
        """What a recipe that only names the set gets: [task], [prompt] and [generation], for what it leaves out.

        Raises: UserError for options that the set does not take.
        """
        self.check_options(self.name, options)
        prompt = {"template": self.template(options), **({"system": self.system} if self.system else {})}
        table: dict[str, dict[str, Any]] = {
            "task": {"scorer": self.scorer, "scorer_options": dict(self.scorer_options)},
            "prompt": prompt,
        }
        if self.max_new_tokens:
            table["generation"] = {"max_new_tokens": self.max_new_tokens}
        return table


def loose_text(text: str) -> str:
    """Letters and digits alone, case ignored: what two spellings of one sentence have in common."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum()) or text


def load(public: PublicSet, path: str, options: Options, validation_share: float) -> SplitItems:
    """Items from the folder `path`, or from the hub where it is empty.

    Raises: UserError for a missing file, package or field, and for options that the set does not take.
    """
    public.check_options(public.name, options)
    path = os.path.expanduser(path)
    if path:
        _check_folder(public, Path(path))
    elif not public.hub_id:
        raise UserError(f"task {public.name} is not loaded from the hub; set task.path to {_folder_words(public)}")

    def distinct(split: str) -> tuple[dict[str, Item], int]:
        """Items by id, the first of equal questions kept, and the number of others."""
        items: dict[str, Item] = {}
        repeats = 0
        hub_split = public.hub_train if split == "train" else public.hub_test
        for where, row in read_rows(_file(Path(path), split)) if path else _hub_rows(public, hub_split):
            item = public.item(row, where, options)
            if item is not None:
                repeats += item.id in items
                items.setdefault(item.id, item)
        return items, repeats

    if public.test_only:
        test, repeats = distinct("test")
        chosen = [item for item in test.values() if public.select(item, options)]
        return SplitItems({"test": chosen}, repeats, required=frozenset({"test"}), test_only=True, published=True)
    train, train_repeats = distinct("train")
    test, test_repeats = distinct("test")
    in_test = {public.same(item) for item in test.values()}
    kept = [item for item in train.values() if item.id not in test and public.same(item) not in in_test]
    splits = split_by_hash([item for item in kept if public.select(item, options)], validation_share, 0.0)
    splits["test"] = [item for item in test.values() if public.select(item, options)]
    return SplitItems(
        splits,
        duplicates=train_repeats + test_repeats,
        overlaps=len(train) - len(kept),
        required=required_splits(validation_share, 0.0) | {"test"},
        published=True,
    )


def _file(folder: Path, split: str) -> Path:
    """The rows of a split: packed by gzip only where there is no other."""
    plain = folder / f"{split}.jsonl"
    return plain if plain.exists() else folder / f"{split}.jsonl.gz"


def _folder_words(public: PublicSet) -> str:
    return "a folder with test.jsonl" if public.test_only else "a folder with train.jsonl and test.jsonl"


def _check_folder(public: PublicSet, folder: Path) -> None:
    for split in ("test",) if public.test_only else ("train", "test"):
        name = f"{split}.jsonl"
        if not _file(folder, split).is_file():
            hub = f", or empty to load {public.hub_id} from the hub" if public.hub_id else ""
            raise UserError(
                f"task {public.name}: there is no {folder / name}; task.path must be {_folder_words(public)}{hub}"
            )


def _hub_rows(public: PublicSet, split: str) -> Rows:
    files = "test.jsonl" if public.test_only else "train.jsonl and test.jsonl"
    next_step = f"or put {files} into a folder and set task.path to it"
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"task {public.name}: loading {public.hub_id} needs the package datasets; "
            f"run pip install 'tinylora[hub]', {next_step}"
        ) from error
    try:
        parts = [
            (config, datasets.load_dataset(public.hub_id, config or None, split=split))
            for config in public.hub_configs or (public.hub_config,)
        ]
    except Exception as error:  # offline, no access, no space: the library raises many classes for them
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"task {public.name}: {public.hub_id} could not be loaded from the hub ({reason[0][:200]}); "
            f"check the connection (and HF_HUB_OFFLINE), {next_step}"
        ) from error
    return [
        (f"{public.hub_id}{f' ({config})' if public.hub_configs else ''}, {split} row {number}", dict(row))
        for config, rows in parts
        for number, row in enumerate(rows)
    ]
