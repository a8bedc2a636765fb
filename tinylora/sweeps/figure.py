"""The figure of a sweep: accuracy against the number of trained numbers, from results.json alone.

Small open marks are runs, one a seed; full ones the mean of a cell, joined by a line where a method has several sizes.
Colour is the algorithm, shape the method. Two panels share the axis: strict, and value only. What was not run is named
below and has its line in the CSV.

A cell is what has the same name, settings and untrained model, in one file or several: its seeds that stand in another
file belong to it; another learning rate, or the arithmetic of another machine, makes another cell.
"""

import json
import textwrap
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylora.config.algorithms import ALGORITHMS as FACTS
from tinylora.errors import UserError
from tinylora.reporting.figures import DASHES, LIGHT, PAPER, SOFT, Figure, draw_figure, short, standalone_svg
from tinylora.sweeps.recount import recounted
from tinylora.system.outputs import Output
from tinylora.system.reading import MOST_DATA_BYTES
from tinylora.system.strict_json import read_json

PANELS = (("strict", "strict"), ("value_only", "value only"))
ALGORITHMS: dict[str, tuple[str, str]] = {
    name: (facts.short, LIGHT[i]) for i, (name, facts) in enumerate(FACTS.items())
}
"""Name and colour. Blue, orange and green of different lightness; the line's dashes tell them apart, too."""
SHAPES = {
    "tinylora": "o", "lora-xs": "s", "lora": "^", "qlora": "P", "dora": "v", "vera": "<", "ia3": ">", "adapter": "D",
    "full": "*",
}  # fmt: skip
NAMES = {
    "tinylora": "TinyLoRA", "lora-xs": "LoRA-XS", "lora": "LoRA", "qlora": "QLoRA", "dora": "DoRA", "vera": "VeRA",
    "ia3": "IA3", "adapter": "adapter layers", "full": "all weights",
}  # fmt: skip
ASIDE = 1.1
"""Algorithms at the same size stand beside each other, this factor to the left and right."""
FURTHER = 1.3
"""The runs stand this factor further out than their mean, so that none hides behind it."""
FORMS = (".png", ".svg", ".csv")
COLUMNS = (
    "results", "cell", "method", "label", "algorithm", "state", "seed", "projection_seed", "chosen", "trained_numbers",
    "untrained", "strict_correct", "value_only_correct", "total", "settings",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Dial:
    """What was written."""

    files: tuple[Path, ...]
    caption: str
    not_run: tuple[str, ...]


def write_dial(paths: Sequence[Path], out: Path | None = None, *, force: bool = False) -> Dial:
    """Draw the results of one sweep or several, as PNG, SVG and CSV beside each other (figure.* beside the first).

    force: over files that are there. To a device or FIFO goes one form, by its suffix, else the PNG.
    A run that several files have (cells of one name, method and algorithm, the same seeds) is taken from the first.
    Raises: UserError for files that are no results, or in which no cell has been run yet.
    """
    outputs = _places(out, paths[0], force=force)
    loaded, checked = [_load(path) for path in paths], list[dict[str, Any]]()
    for path, results in zip(paths, loaded, strict=True):
        try:
            _rows([path], [results])
            _missing([results])
            checked.append(recounted(path, results))
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else f"does not hold what it should ({error})"
            again = "let the sweep write it again: tinylora sweep SWEEP.toml --out FOLDER"
            raise UserError(f"{path} {what}: it is damaged, or of another version; {again}") from error
    loaded = checked
    rows, untrained = _rows(paths, loaded), _untrained(loaded)
    if not any(row[5] == "done" for row in rows):
        raise UserError(f"nothing has been evaluated yet in {', '.join(map(str, paths))}; run the sweep first")
    not_run = tuple(dict.fromkeys(_missing(loaded)))
    figure = _draw(rows, untrained, not_run)
    forms = {".png": figure.png, ".svg": standalone_svg(figure).encode(), ".csv": figure.csv().encode()}
    files = tuple(output.write(forms[suffix]) for suffix, output in outputs.items())
    return Dial(files=files, caption=figure.caption, not_run=not_run)


def _places(out: Path | None, beside: Path, *, force: bool) -> dict[str, Output]:
    """By the suffix of a form, where it goes: three files beside each other, or to a device or FIFO one form alone.

    Raises: UserError, before anything is written.
    """
    target = out if out is not None else beside.with_name("figure.png")
    if out is not None and not out.is_dir():
        form = out.suffix if out.suffix in FORMS else FORMS[0]
        if (output := Output.at(out, force=True)).is_stream:
            return {form: output}
    stem = target.with_suffix("") if target.suffix in FORMS else target
    files = {form: stem.with_name(stem.name + form) for form in FORMS}
    return {form: Output.own(file) if out is None else Output.at(file, force=force) for form, file in files.items()}


def _load(path: Path) -> dict[str, Any]:
    results = read_json(path, "give the results.json of a sweep", MOST_DATA_BYTES)
    known = isinstance(results, dict) and results.get("version") == 1 and {"cells", "untrained"} <= set(results)
    if not known:
        raise UserError(f"{path} is no results.json of a sweep as this version writes them")
    return dict(results)


def _key(cell: dict[str, Any], run: dict[str, Any]) -> tuple[Any, ...]:
    """By which a run of one file is known in another."""
    return cell["name"], cell["method"], cell["algorithm"], run["seed"], run["projection_seed"]


def _settings(results: dict[str, Any], cell: dict[str, Any], run: dict[str, Any]) -> str:
    """What a run changes in its recipe, whether it was set or chosen: `optim.lr=0.016 train.steps=40`."""
    found = dict(one.partition("=")[::2] for one in [*results.get("set", ()), *cell.get("set", ())])
    found = {key.strip(): _plain(value) for key, value in found.items()} | (run["chosen"] or {})
    return " ".join(f"{key}={json.dumps(found[key])}" for key in sorted(found))


def _plain(value: str) -> Any:
    """A value as TOML has it, or the text itself, as --set takes both."""
    try:
        return tomllib.loads(f"x = {value}")["x"]
    except ValueError:
        return value.strip()


def _rows(paths: Sequence[Path], loaded: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Each run once: from the first file in which it is done, else from the first that names it."""
    rows = []
    seen = {False: set[tuple[Any, ...]](), True: set[tuple[Any, ...]]()}
    in_some = _done(loaded)
    for path, results in zip(paths, loaded, strict=True):
        for cell in results["cells"]:
            for run in cell["runs"]:
                done, key = run["state"] == "done", _key(cell, run)
                if key in seen[done] or (not done and key in in_some):
                    continue
                seen[done].add(key)
                chosen = " ".join(f"{key}={value}" for key, value in (run["chosen"] or {}).items())
                rows.append((
                    path.parent.name, cell["name"], cell["method"], cell["label"], cell["algorithm"], run["state"],
                    run["seed"], run["projection_seed"], chosen,
                    run["trained_numbers"] if done else cell["trained_numbers"],
                    run["untrained"] if done else None,
                    *(run[score]["tuned"]["correct"] if done else None for score, _ in PANELS),
                    run["strict"]["tuned"]["total"] if done else None,
                    _settings(results, cell, run),
                ))  # fmt: skip
    return rows


def _untrained(loaded: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {key: one for results in loaded for key, one in results["untrained"].items()}


def _done(loaded: Sequence[dict[str, Any]]) -> set[tuple[Any, ...]]:
    """Keys of the runs that some file has a result of."""
    return {_key(cell, run) for results in loaded for cell in results["cells"] for run in cell["runs"]
            if run["state"] == "done"}  # fmt: skip


def _missing(loaded: Sequence[dict[str, Any]]) -> list[str]:
    """Cells, or seeds of them, that have no result in any of the files, with the reason."""
    done = _done(loaded)
    words = []
    for results in loaded:
        for cell in results["cells"]:
            open_ = [run for run in cell["runs"] if _key(cell, run) not in done]
            if not open_:
                continue
            states = "/".join(dict.fromkeys(run["state"] for run in open_))
            seeds = ", ".join(str(run["seed"]) for run in open_)
            which = "" if len(open_) == len(cell["runs"]) else f" seed {seeds}"
            words.append(f"{cell['name']}{which}" + ("" if states == "not run" else f" ({states})"))
    return words


def _draw(rows: list[tuple[Any, ...]], untrained: dict[str, dict[str, Any]], not_run: Sequence[str]) -> Figure:
    done = [dict(zip(COLUMNS, row, strict=True)) for row in rows if row[5] == "done"]
    algorithms = [name for name in ALGORITHMS if any(row["algorithm"] == name for row in done)]
    methods = [name for name in SHAPES if any(row["method"] == name for row in done)]

    def aside(algorithm: str) -> tuple[float, float]:
        place = algorithms.index(algorithm) - (len(algorithms) - 1) / 2
        return ASIDE ** (2 * place), ASIDE ** (2 * place) * FURTHER ** (1 if place > 0 else -1)

    def draw(panels: Any) -> None:
        for axes, (score, name) in zip(panels, PANELS, strict=True):
            _draw_untrained(axes, untrained, score)
            for algorithm in algorithms:
                colour, dash = ALGORITHMS[algorithm][1], DASHES[algorithms.index(algorithm)]
                for method in methods:
                    own = [row for row in done if (row["algorithm"], row["method"]) == (algorithm, method)]
                    _draw_series(axes, own, f"{score}_correct", aside(algorithm), colour, dash, SHAPES[method])
            axes.set_xscale("log")
            axes.set_ylabel(f"{name}, % of test items")
            axes.margins(x=0.05, y=0.08)
            axes.minorticks_off()
        axes = panels[-1]
        axes.set_xlabel(_below(not_run), linespacing=1.5)
        axes.xaxis.set_major_formatter(lambda value, _: _short_number(value))
        _name_everything(panels[0], algorithms, methods)

    totals = sorted({row["total"] for row in done})
    items = " or ".join(f"{total:,}" for total in totals)
    caption = (
        f"Accuracy on {items} held-out test items, greedy, against the number of trained numbers. Small open marks: "
        "runs, one a seed; full ones and lines: their mean. Grey line and band: the untrained model with its 95 % "
        f"Wilson interval.{' Not run: ' + ', '.join(not_run) + '.' if not_run else ''}"
    )
    title = "Accuracy against trained numbers"
    return draw_figure(
        "dial", title, caption, "sweep", COLUMNS, rows, draw, height=6.0, width=5.4, panels=2, has_legend=True
    )


def _draw_series(
    axes: Any, rows: Sequence[dict[str, Any]], key: str, places: tuple[float, float], colour: str, dash: Any, shape: str
) -> None:
    """One method by one algorithm; `places`: the factors by which means and runs stand beside their size.

    The line goes through the first cell of each size; another one of that size stands alone, with its name.
    """
    larger = 1.5 if shape == "*" else 1.0  # a star of the same size looks smaller
    means: dict[int, tuple[float, float]] = {}
    mean_mark = {"color": colour, "marker": shape, "markersize": 6.2 * larger, "markeredgecolor": PAPER,
                 "markeredgewidth": 0.7, "zorder": 4}  # fmt: skip
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}  # in the order of their first rows
    for row in rows:
        cells.setdefault((row["cell"], row["settings"], row["untrained"], row["trained_numbers"]), []).append(row)
    for (name, *_, size), own in sorted(cells.items(), key=lambda one: int(one[0][-1])):
        shares = [100 * row[key] / row["total"] for row in own]
        if len(shares) > 1:
            axes.plot([size * places[1]] * len(shares), shares, color=colour, linestyle="none", marker=shape,
                      markersize=3.4 * larger, markerfacecolor="none", markeredgewidth=0.9, zorder=3)  # fmt: skip
        mean = (size * places[0], sum(shares) / len(shares))
        if size in means:
            axes.plot(*mean, linestyle="none", **mean_mark)
            axes.annotate(short(name), mean, xytext=(6, 0), textcoords="offset points", fontsize="x-small",
                          va="center", color=colour,
                          bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 1})  # fmt: skip
        else:
            means[size] = mean
    if means:
        axes.plot(*zip(*means.values(), strict=True), linestyle=dash, linewidth=1.2, **mean_mark)


def _draw_untrained(axes: Any, untrained: dict[str, dict[str, Any]], score: str) -> None:
    for one in untrained.values():
        share = one[score]
        low, high = share["interval"]
        axes.axhspan(100 * low, 100 * high, color=SOFT, alpha=0.14, linewidth=0, zorder=0)
        axes.axhline(100 * share["correct"] / share["total"], color=SOFT, linewidth=1.0, zorder=1)


def _name_everything(axes: Any, algorithms: Sequence[str], methods: Sequence[str]) -> None:
    """Lines of the legend: what a colour means, what a shape means, the untrained model."""
    for index, algorithm in enumerate(algorithms):
        name, colour = ALGORITHMS[algorithm]
        axes.plot([], [], color=colour, linestyle=DASHES[index], linewidth=2.2, label=name)
    axes.plot([], [], color=SOFT, linewidth=1.0, label="untrained, 95 % interval")
    for method in methods:
        axes.plot([], [], color=SOFT, linestyle="none", marker=SHAPES[method], markersize=6, label=NAMES[method])


def _below(not_run: Sequence[str]) -> str:
    label = "trained numbers"
    if not_run:
        label += "\n" + textwrap.fill("Not run: " + ", ".join(short(one) for one in not_run), 88)
    return label


def _short_number(value: float) -> str:
    """1, 10, 1 000 as 1k, 10M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
