"""What a sweep is: a TOML file read, checked and written out in full. Nothing here runs anything.

    recipe = "demo"                    what every cell starts from
    set = ["train.steps=40"]           changes of every cell
    seeds = [0, 1, 2]                  train.seed
    projection_seeds = [0]             adapter.seed
    [evaluate]
    num_items = 500
    [choose]                           keys whose value validation chooses, for each cell
    "optim.lr" = [1e-3, 4e-3]
    seed = 0
    [[cell]]                           in order of worth; name, set, seeds, projection_seeds, choose
    name = "thirteen"

A cell's settings are checked by the recipe's own rules, every candidate and seed of them, before anything is trained.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import tomli_w

from tinylora.config.located import located
from tinylora.config.recipe import apply_overrides, load_recipe, recipe_name
from tinylora.config.run import RunConfig
from tinylora.config.schema import closest, diff_configs, dump_config
from tinylora.config.toml_text import read_toml
from tinylora.errors import UserError
from tinylora.system.folders import check_name

Value = str | int | float | bool
TOP = ("recipe", "set", "seeds", "projection_seeds", "evaluate", "choose", "cell")
OF_CELL = ("name", "set", "seeds", "projection_seeds", "choose")
OURS = {
    "train.seed": "seeds",
    "adapter.seed": "projection_seeds",
    "train.num_threads": "--jobs",
    "eval.num_test": "evaluate.num_items",
}
"""Settings that a sweep makes itself, and by what."""
MEASURES = ("reward.", "task.", "train.control", "grpo.truncated", "eval.num_validation")
"""Settings (or the beginnings of their names) that decide what validation measures, so it cannot choose among them."""
ITEMS = "items.jsonl"
"""In the folder of a run, cells/CELL/RUN: every answer of its evaluation. It is there if the run is evaluated."""
LONGEST_NAME = 200
"""Characters of a folder's name; file systems take 255 bytes at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One row of the grid, with everything that it takes from the sweep filled in."""

    name: str
    set: tuple[str, ...]
    seeds: tuple[int, ...]
    projection_seeds: tuple[int, ...]
    choose: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    """Key to values; empty where nothing is chosen."""
    choose_seed: int = 0

    def candidates(self) -> "list[Run]":
        """The runs between which validation chooses, in the order in which they are written; one where none does."""
        seed = self.choose_seed if self.choose else self.seeds[0]
        combinations = product(*([(key, value) for value in values] for key, values in self.choose.items()))
        return [Run(self, seed, self.projection_seeds[0], chosen) for chosen in combinations]

    def runs(self, chosen: "Choice") -> "list[Run]":
        """The runs that count: every seed under every projection seed, with the chosen values."""
        return [Run(self, seed, p, chosen) for seed in self.seeds for p in self.projection_seeds]

    def num_trainings(self) -> int:
        """Runs to train, candidates included; a candidate that is one of the runs that count is trained once."""
        candidates = self.candidates()
        there = candidates[0].seed in self.seeds
        return len(candidates) + len(self.seeds) * len(self.projection_seeds) - there


Choice = tuple[tuple[str, Value], ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One training: a cell, its seeds, and the values that are tried or were chosen."""

    cell: Cell
    seed: int
    projection_seed: int
    chosen: Choice = ()

    @property
    def path(self) -> str:
        """Its folder below the sweep's."""
        values = "".join(f"_{key.rpartition('.')[2]}-{_text(value).strip(chr(34))}" for key, value in self.chosen)
        plain = re.sub(r"[^A-Za-z0-9._-]", "-", f"seed-{self.seed}_projection-{self.projection_seed}{values}")
        return f"cells/{self.cell.name}/{plain}"

    def settings(self) -> list[str]:
        """Its changes to the sweep's recipe, as --set takes them."""
        chosen = [f"{key}={_text(value)}" for key, value in self.chosen]
        return [*self.cell.set, *chosen, f"train.seed={self.seed}", f"adapter.seed={self.projection_seed}"]

    def describe(self) -> str:
        """In words, for a line of progress."""
        words = [self.cell.name, f"seed {self.seed}"]
        if len(self.cell.projection_seeds) > 1 or self.projection_seed:
            words.append(f"projection seed {self.projection_seed}")
        return " ".join([*words, *(f"{key}={_text(value)}" for key, value in self.chosen)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A whole sweep."""

    name: str
    """The recipe's, after which the run folders are named."""
    base: RunConfig
    """The recipe with the sweep's `set`: what every cell starts from."""
    num_items: int
    cells: tuple[Cell, ...]
    set: tuple[str, ...] = ()
    """The changes of every cell, which `base` has already."""

    def config(self, run: Run) -> RunConfig:
        """A run's settings. Raises: UserError as a recipe's own reading does."""
        return apply_overrides(self.base, run.settings())

    def on_day(self, date: str) -> "Sweep":
        """The sweep whose prompts show that day, where they show one and the recipe names none."""
        prompt = replace(self.base.prompt, date=self.base.prompt.date or date)
        return replace(self, base=replace(self.base, prompt=prompt))

    def recipe_text(self) -> str:
        """`base` as TOML, for the children to start from: a recipe that changes meanwhile changes nothing."""
        return dump_config(self.base)

    def text(self) -> str:
        """The normalised file: a sweep over the recipe beside it, every default written out."""
        cells = [
            {
                "name": cell.name, "set": list(cell.set), "seeds": list(cell.seeds),
                "projection_seeds": list(cell.projection_seeds),
                "choose": {**{key: list(values) for key, values in cell.choose.items()},
                           **({"seed": cell.choose_seed} if cell.choose else {})},
            }
            for cell in self.cells
        ]  # fmt: skip
        table = {"recipe": f"{self.name}.toml", "evaluate": {"num_items": self.num_items}, "cell": cells}
        return tomli_w.dumps(table)


def load_sweep(path: Path) -> Sweep:
    """Read and check a sweep file. Raises: UserError, one sentence, for whatever could not work."""
    table = read_toml(path, "sweep")
    try:
        return _sweep(table, path)
    except UserError as error:
        raise UserError(f"sweep {path}: {error}") from error


def _sweep(table: dict[str, Any], path: Path) -> Sweep:
    _only(table, TOP, "key")
    recipe = table.get("recipe")
    if not isinstance(recipe, str) or not recipe:
        raise UserError(f'recipe must name a recipe, such as recipe = "demo", got {recipe!r}')
    changes = _settings(table.get("set", []), "set")
    beside = path.parent / recipe  # a recipe's path may be meant from the sweep's own folder
    base = load_recipe(str(beside if recipe.endswith(".toml") and beside.is_file() else recipe), changes)
    num_items = _evaluate(table.get("evaluate", {}), base)
    sweep_wide = {
        "seeds": table.get("seeds", [base.train.seed]),
        "projection_seeds": table.get("projection_seeds", [base.adapter.seed]),
        "choose": table.get("choose", {}),
    }
    tables = table.get("cell")
    if not isinstance(tables, list) or not tables or not all(isinstance(one, dict) for one in tables):
        raise UserError("a sweep needs at least one [[cell]] with a name")
    cells = tuple(_cell(one, sweep_wide, number) for number, one in enumerate(tables, 1))
    seen: set[str] = set()
    for cell in cells:
        if cell.name.casefold() in seen:  # folders of one name, on some disks
            raise UserError(f"two cells are named {cell.name!r}; a cell's name is its folder, so give each its own")
        seen.add(cell.name.casefold())
    name = recipe_name(recipe)  # run folders are called after it; "sweep.toml" is the folder's own
    sweep = Sweep(
        name="sweep-recipe" if name == "sweep" else name, base=base, num_items=num_items, cells=cells, set=changes
    )
    for cell in cells:
        _check_cell(sweep, cell)
    return sweep


def _check_cell(sweep: Sweep, cell: Cell) -> None:
    """Every run that may come about has settings that a recipe could have, and a folder of its own."""
    candidates = cell.candidates()
    folders = {run.path.casefold() for run in candidates}
    if len(folders) < len(candidates):
        raise UserError(f"cell {cell.name!r}: choose has values that cannot be told apart in a folder's name")
    for run in [*candidates, *cell.runs(candidates[0].chosen)]:
        if len(folder := Path(run.path).name) > LONGEST_NAME:
            raise UserError(
                f"cell {cell.name!r}: values under choose name a folder, and {folder[:60]}... has {len(folder)} "
                f"characters, of {LONGEST_NAME} at most; make two cells of it, with set in place of choose"
            )
        try:
            sweep.config(run)
        except UserError as error:
            raise UserError(f"cell {cell.name!r}: {error}") from error


def _cell(table: dict[str, Any], sweep_wide: dict[str, Any], number: int) -> Cell:
    name = table.get("name")
    if not isinstance(name, str):
        raise UserError(f"cell {number} needs a name of letters, digits, '.', '_' or '-', got {name!r}")
    check_name(name, f"the name of cell {number}")
    where = f"cell {name!r}: "
    try:
        _only(table, OF_CELL, "key")
        changes = _settings(table.get("set", []), "set")
        seeds = _seeds(table.get("seeds", sweep_wide["seeds"]), "seeds")
        projection_seeds = _seeds(table.get("projection_seeds", sweep_wide["projection_seeds"]), "projection_seeds")
        shared = _table(sweep_wide["choose"], "choose")
        own = _table(table["choose"], "choose") if "choose" in table else shared
        choose, seed = _choose(own, shared.get("seed", seeds[0]))
    except UserError as error:
        raise UserError(f"{where}{error}") from error
    return Cell(
        name=name, set=changes, seeds=seeds, projection_seeds=projection_seeds, choose=choose, choose_seed=seed
    )  # fmt: skip


def _evaluate(value: Any, base: RunConfig) -> int:
    table = _table(value, "evaluate")
    _only(table, ("num_items",), "key", " in [evaluate]")
    num_items = table.get("num_items", base.eval.num_test)
    if type(num_items) is not int or num_items < 1:
        raise UserError(f"evaluate.num_items must be a whole number of test items, at least 1, got {num_items!r}")
    return num_items


def _choose(table: dict[str, Any], seed: Any) -> tuple[dict[str, tuple[Value, ...]], int]:
    flat: dict[str, Any] = {}

    def walk(inner: dict[str, Any], prefix: str) -> None:  # optim.lr without quotes is a table in a table
        for key, value in inner.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = value

    walk(table, "")
    seed = flat.pop("seed", seed)
    if type(seed) is not int or seed < 0:
        raise UserError(f"choose.seed must be a whole number, at least 0, got {seed!r}")
    for key, values in flat.items():
        _not_ours(key, "choose")
        if key.startswith(MEASURES):
            raise UserError(
                f"choose {key}: its values would be judged by validations that are not alike, as it decides which "
                "questions validation asks or what they are worth; make each value a cell of its own"
            )
        plain = isinstance(values, list) and all(isinstance(one, (str, int, float)) for one in values)
        if not plain or not values:
            raise UserError(f"choose {key} must be a list of values with at least one in it, got {values!r}")
        if any(isinstance(one, float) and not math.isfinite(one) for one in values):
            raise UserError(f"choose {key} must have finite values, got {values!r}")
        if len({repr(one) for one in values}) < len(values):
            raise UserError(f"choose {key} has a value twice: {values!r}")
    return {key: tuple(values) for key, values in flat.items()}, seed


def _settings(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise UserError(f'{name} must be a list of settings in quotes, such as ["train.steps=40"], got {value!r}')
    for one in value:
        _not_ours(one.partition("=")[0].strip(), name)
    return tuple(value)


def _not_ours(key: str, where: str) -> None:
    if key in OURS:
        raise UserError(f"{key} stands in {where}, but a sweep sets it by {OURS[key]}; leave it out there")


def _seeds(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(one) is int and one >= 0 for one in value):
        raise UserError(f"{name} must be a list of whole numbers, 0 or more, with at least one in it, got {value!r}")
    if len(set(value)) < len(value):
        raise UserError(f"{name} has a number twice: {value!r}")
    return tuple(value)


def _table(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{name} must be a table, such as [{name}], got {value!r}")
    return value


def _only(table: Mapping[str, Any], allowed: Sequence[str], what: str, where: str = "") -> None:
    for key in table:
        if key not in allowed:
            raise UserError(f"unknown {what} {key!r}{where}{closest(key, allowed)}; allowed: {', '.join(allowed)}")


def _text(value: Value) -> str:
    """A value as TOML."""
    return json.dumps(value, ensure_ascii=False)


# --- the copy in the folder ---


def find_sweep(name_or_path: str) -> Path:
    """A path, or the bare name of a sweep that comes with tinylora. Raises: UserError if there is none."""
    path = Path(name_or_path)
    if name_or_path.endswith(".toml") or len(path.parts) > 1:
        if not os.path.exists(path):
            raise UserError(f"sweep {name_or_path} does not exist; give the path of a .toml file")
        return path
    from tinylora.system.paths import recipes_dir

    folder = recipes_dir() / "sweeps"
    path = folder / f"{name_or_path}.toml"
    if not path.is_file():
        names = sorted(one.stem for one in folder.glob("*.toml"))
        raise UserError(
            f"no sweep is named {name_or_path!r}{closest(name_or_path, names)}; there are "
            f"{', '.join(names) or 'none'}, or give the path of a .toml file"
        )
    return path


def check_same(sweep: Sweep, folder: Path) -> Sweep | None:
    """The sweep that the folder holds, which is this very one; None if it holds none.

    The number of test items may be another one as long as nothing is evaluated: no training depends on it.
    Raises: UserError, which says what differs, if it holds another sweep.
    """
    stored = folder / "sweep.toml"
    if not stored.is_file():
        return None
    other = load_sweep(stored)
    sweep = sweep.on_day(other.base.prompt.date)  # that of its first start
    differences = [
        f"{key} ({old!r} there, {new!r} here)"
        for key, old, new in diff_configs(located(other.base), located(sweep.base))
    ]
    if other.num_items != sweep.num_items and any(folder.glob(f"cells/*/*/{ITEMS}")):
        differences.append(f"evaluate.num_items ({other.num_items} there, {sweep.num_items} here)")
    theirs, ours = ({cell.name: cell for cell in one.cells} for one in (other, sweep))
    differences += [f"cell {name!r} (only there)" for name in theirs if name not in ours]
    differences += [f"cell {name!r} (only here)" for name in ours if name not in theirs]
    for name in theirs.keys() & ours.keys():
        for key in ("set", "seeds", "projection_seeds", "choose", "choose_seed"):
            old, new = getattr(theirs[name], key), getattr(ours[name], key)
            if repr(old) != repr(new) and not (key == "choose_seed" and not ours[name].choose):
                differences.append(f"{key} of cell {name!r} ({_plain(old)} there, {_plain(new)} here)")
    if not differences and list(theirs) != list(ours):
        differences.append("the order of the cells")
    if differences:
        more = f", and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise UserError(
            f"{folder} holds another sweep, which differs in {', '.join(differences[:4])}{more}; "
            "name another folder with --out"
        )
    return other


def _plain(value: Any) -> str:
    return json.dumps(value, default=dict) if not isinstance(value, Mapping) else json.dumps(dict(value))
