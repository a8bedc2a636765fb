"""The report's figures: each is a table and a drawing of it, as SVG for the page and as PNG and CSV beside it.

Text and axes are of a grey that can be read on white and on black; the background is left open.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tinylora.reporting.run_facts import RunFacts

GREY = "#808890"
COLOURS = ("#3b7dd8", "#d9772b", "#2f9e6e", "#b54fb0", "#c0392b", "#8c7a2f", "#1aa3b8", "#7a6ff0")
MOST_PATHS = 40
"""Numbers of v whose paths are drawn; a table holds all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A table with a name, and how it looks."""

    name: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    svg: str
    png: bytes

    def csv(self) -> str:
        """The table, with a line of names."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([self.columns, *self.rows])
        return text.getvalue()


def figures_of(runs: Sequence[RunFacts]) -> list[Figure]:
    """All figures that the runs have data for."""
    made = [_training(runs), _held_out(runs), _health(runs), _norm(runs)]
    if len(runs) == 1:
        made += [_paths(runs[0]), _problems(runs[0])]
    made += [figure for run in runs for figure in (_conditions(run, len(runs)), _gain(run, len(runs)))]
    return [figure for figure in made if figure is not None]


def _figure(
    name: str, title: str, caption: str, columns: Sequence[str], rows: Sequence[Sequence[Any]],
    draw: Callable[[Any], None], height: float = 3.2,
) -> Figure:  # fmt: skip
    import matplotlib
    from cycler import cycler

    style = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "font.family": "sans-serif",
        "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GREY, "grid.alpha": 0.2,
        "legend.frameon": False, "axes.prop_cycle": cycler(color=COLOURS),
    }  # fmt: skip
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    with matplotlib.rc_context(style):
        drawing = Drawing(figsize=(6.4, height), layout="constrained")
        FigureCanvasAgg(drawing)
        draw(drawing.add_subplot())
        svg, png = io.StringIO(), io.BytesIO()
        drawing.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        drawing.savefig(png, format="png", dpi=160, facecolor="white")
    text = svg.getvalue()
    return Figure(
        name=name, title=title, caption=caption, columns=tuple(columns), rows=tuple(tuple(row) for row in rows),
        svg=text[text.index("<svg") :], png=png.getvalue(),
    )  # fmt: skip


def _curves(
    name: str, title: str, caption: str, runs: Sequence[RunFacts], keys: dict[str, str], *, held_out: bool = False,
    share: bool = True,
) -> Figure | None:  # fmt: skip
    rows = [
        (run.name, row["step"], *(row.get(key) for key in keys))
        for run in runs
        for row in (run.metrics if held_out else run.steps)
        if any(row.get(key) is not None for key in keys)
    ]
    if not rows:
        return None

    def draw(axes: Any) -> None:
        for number, run in enumerate(runs):
            for index, label in enumerate(keys.values()):
                points = [(row[1], row[2 + index]) for row in rows if row[0] == run.name and row[2 + index] is not None]
                if not points:
                    continue
                colour = COLOURS[(number if len(runs) > 1 else index) % len(COLOURS)]
                style = "-" if len(runs) == 1 else ("-", "--", ":", "-.")[index % 4]
                axes.plot(
                    *zip(*points, strict=True), style, color=colour, marker="o" if held_out else None, markersize=4,
                    label=label if len(runs) == 1 else f"{run.name}: {label}", linewidth=1.4,
                )  # fmt: skip
        axes.set_xlabel("step")
        if share:
            axes.set_ylim(bottom=0)
        if 1 < len(keys) * len(runs) <= 12:
            axes.legend(fontsize=8)

    return _figure(name, title, caption, ("run", "step", *keys), rows, draw)


def _training(runs: Sequence[RunFacts]) -> Figure | None:
    keys = {"reward": "reward", "strict": "strict", "value_only": "value only"}
    return _curves(
        "training", "Training samples", "Means over each step's samples, at the run's temperature.", runs, keys
    )


def _held_out(runs: Sequence[RunFacts]) -> Figure | None:
    keys = {"validation_strict": "strict", "validation_value_only": "value only"}
    caption = "Greedy, on validation questions that training never sees; step 0 is the untrained model."
    return _curves("held_out", "Held-out points", caption, runs, keys, held_out=True)


def _health(runs: Sequence[RunFacts]) -> Figure | None:
    keys = {"zero_variance_groups": "groups without variance", "truncated": "cut off", "answered": "format readable"}
    caption = "Groups whose rewards are all equal teach nothing; cut-off replies count as wrong."
    return _curves("health", "Can it learn?", caption, runs, keys)


def _norm(runs: Sequence[RunFacts]) -> Figure | None:
    caption = "Euclidean norm of the trained numbers after each step."
    return _curves("norm", "Length of v", caption, runs, {"v_norm": "|v|"})


def _paths(run: RunFacts) -> Figure | None:
    steps = [row for row in run.steps if isinstance(row.get("v"), list)]
    if not steps:
        return None
    size = len(steps[0]["v"])
    rows = [(row["step"], *row["v"]) for row in steps]

    def draw(axes: Any) -> None:
        for i in range(min(size, MOST_PATHS)):
            axes.plot([row[0] for row in rows], [row[1 + i] for row in rows], linewidth=1.1)
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set_xlabel("step")

    drawn = f"{size} numbers" if size <= MOST_PATHS else f"the first {MOST_PATHS} of {size} numbers"
    columns = ("step", *(f"v_{i}" for i in range(size)))
    return _figure("paths", "Paths of the numbers", f"{drawn}, one line each.", columns, rows, draw)


def _problems(run: RunFacts) -> Figure | None:
    curve = (run.evidence or {}).get("curve") or []
    if len(curve) < 2:
        return None
    keys = ("distinct_problems", "validation_strict", "validation_value_only")
    rows = [tuple(point[key] for key in keys) for point in curve]

    def draw(axes: Any) -> None:
        for index, label in ((1, "strict"), (2, "value only")):
            axes.plot([row[0] for row in rows], [row[index] for row in rows], marker="o", markersize=4, label=label)
        axes.set_xlabel("distinct problems seen")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)

    return _figure("problems", "Gain against problems seen", "Held-out validation, greedy.", keys, rows, draw)


def _suffix(run: RunFacts, count: int) -> tuple[str, str]:
    return ("", "") if count == 1 else (f"_{run.name}", f": {run.name}")


def _conditions(run: RunFacts, count: int) -> Figure | None:
    if run.evidence is None:
        return None
    rows = [
        (one["label"], one["strict"]["correct"], one["strict"]["total"], *one["strict"]["interval"])
        for one in run.evidence["conditions"]
    ]
    kinds = [one["kind"] for one in run.evidence["conditions"]]

    def draw(axes: Any) -> None:
        for place, (row, kind) in enumerate(zip(rows[::-1], kinds[::-1], strict=True)):
            share = row[1] / row[2]
            colour = {"tuned": COLOURS[2], "untrained": COLOURS[0]}.get(kind, GREY)
            errors = [[100 * (share - row[3])], [100 * (row[4] - share)]]
            axes.errorbar([100 * share], [place], xerr=errors, fmt="o", color=colour, capsize=3, markersize=5)
        axes.set_yticks(range(len(rows)), [_short(row[0]) for row in rows[::-1]])
        axes.set_xlabel("strict, % of the test items, with 95 % Wilson intervals")

    suffix, title = _suffix(run, count)
    caption = "The same items under every condition; the adapter is green, the untrained model blue."
    columns = ("condition", "correct", "total", "low", "high")
    return _figure(f"conditions{suffix}", f"Controls{title}", caption, columns, rows, draw, 0.9 + 0.26 * len(rows))


def _short(label: str, most: int = 52) -> str:
    return label if len(label) <= most else label[: most - 3] + "..."


def _gain(run: RunFacts, count: int) -> Figure | None:
    if run.evidence is None:
        return None
    gain = run.evidence["gain"]
    rows = [
        (label, gain[name]) for name, label in (("value", "right values"), ("format", "format"), ("stops", "stopping"))
    ]

    def draw(axes: Any) -> None:
        axes.barh([row[0] for row in rows[::-1]], [100 * row[1] for row in rows[::-1]], color=COLOURS[0], height=0.6)
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.set_xlabel("points of the strict share")

    suffix, title = _suffix(run, count)
    caption = "The gain over the untrained model, shared out among what a right reply needs."
    return _figure(f"gain{suffix}", f"Where the gain comes from{title}", caption, ("part", "share"), rows, draw, 1.7)
