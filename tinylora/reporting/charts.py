"""Which figures a report has, and what each is drawn from. A figure without data is left out."""

from collections.abc import Sequence
from typing import Any

from tinylora.reporting.figures import DASHES, INK, LIGHT, PAPER, SOFT, Figure, draw_figure, short
from tinylora.reporting.outcomes import Evaluation
from tinylora.reporting.report import Pool, RunFacts, finite

MEAN_STEPS = 10
"""Steps over which the thick line of a curve is a trailing mean, where a run has three times as many."""
MOST_PATHS = 64
"""Numbers of v whose paths are drawn; the CSV has all of them."""


def figures_of(runs: Sequence[RunFacts], pools: Sequence[Pool] = ()) -> list[Figure]:
    """All figures that the runs have data for, in the order in which the page shows them."""
    held_out = "Points: held-out validation items, greedy, at step 0 the untrained model. "
    line = "Line: completions sampled for training"
    made: list[Figure | None] = [
        _differences(runs, pools),
        _curve(runs, "strict", "Strict score", held_out + line + ".", held_out="validation_strict"),
        _curve(runs, "value_only", "Value-only score", held_out + line + ".", held_out="validation_value_only"),
        _curve(runs, "reward", "Reward", held_out + line + ".", held_out="validation_reward", unit=""),
        _curve(runs, "length", "Length of replies", held_out + line + "; the stop token counts.",
               held_out="validation_length", unit="tokens"),
        _curve(runs, "truncated", "Cut off at the token budget", "Share of completions sampled for training."),
        _curve(runs, "zero_variance_groups", "Prompts that teach nothing",
               "Share of prompts all of whose completions got the same reward: they have no gradient.",
               unit="% of prompts"),
        _problems(runs),
    ]  # fmt: skip
    for index, run in enumerate(runs):
        suffix = f"-{index + 1}" if len(runs) > 1 else ""
        made += [_paths(run, suffix), _norm(run, suffix)]
        if run.evaluation is not None:
            made += [_gain(run.evaluation, run, suffix), _conditions(run.evaluation, run, suffix)]
    return [figure for figure in made if figure is not None]


def section_of(name: str, run: RunFacts) -> str:
    """Key of a place on the page: one figure group of one run."""
    return f"{name}/{run.label}"


def _curve(
    runs: Sequence[RunFacts], key: str, title: str, caption: str, *, held_out: str = "", unit: str = "% of replies"
) -> Figure | None:
    rows = []
    for run in runs:
        for row in run.metrics:
            values = [finite(row.get(name)) for name in (key, held_out) if name]
            if any(value is not None for value in values):
                rows.append((run.label, row["step"], *values))
    if not rows:
        return None
    share = unit.startswith("%")
    scale = 100 if share else 1
    means = any(sum(row[0] == run.label for row in rows) >= 3 * MEAN_STEPS for run in runs)

    def draw(axes: Any) -> None:
        for index, run in enumerate(runs):
            colour, dash = LIGHT[index % len(LIGHT)], DASHES[index // len(LIGHT) % len(DASHES)]
            own = [row for row in rows if row[0] == run.label]
            line = [(row[1], scale * row[2]) for row in own if row[2] is not None]
            points = [(row[1], scale * row[3]) for row in own if held_out and row[3] is not None]
            several = len(runs) > 1
            if line:
                steps, values = zip(*line, strict=True)
                smooth = len(line) >= 3 * MEAN_STEPS
                axes.plot(steps, values, color=colour, linestyle=dash, linewidth=0.8 if smooth else 1.4,
                          alpha=0.35 if smooth else 1.0, label="" if smooth or several else "training")  # fmt: skip
                if smooth:
                    axes.plot(steps, _trailing_means(values), color=colour, linestyle=dash, linewidth=1.6,
                              label="" if several else f"training, mean of {MEAN_STEPS} steps")  # fmt: skip
            if points:
                point_colour = colour if several else LIGHT[1]
                axes.plot(*zip(*points, strict=True), color=point_colour, linestyle=(0, (2, 2)), linewidth=0.7,
                          marker="o", markersize=5, markerfacecolor=PAPER, markeredgewidth=1.5,
                          label="" if several else "held-out, greedy")  # fmt: skip
            if several:
                axes.plot([], [], color=colour, linestyle=dash, linewidth=1.6, label=short(run.label))
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.margins(x=0.02)
        low, high = axes.get_ylim()
        if share:
            axes.set_ylim(max(0.0, low) if low > 15 else 0.0, min(102.0, high) if high > low else low + 1)

    mean_words = f" The thick line is the mean of the last {MEAN_STEPS} steps." if means else ""
    columns = ("run", "step", key, *((held_out,) if held_out else ()))
    has_legend = len(runs) > 1 or bool(held_out)
    return draw_figure(key, title, caption + mean_words, "curves", columns, rows, draw, has_legend=has_legend)


def _trailing_means(values: Sequence[float]) -> list[float]:
    windows = (values[max(0, i + 1 - MEAN_STEPS) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _norm(run: RunFacts, suffix: str) -> Figure | None:
    rows = [(row["step"], norm) for row in run.steps if (norm := finite(row.get("v_norm"))) is not None]
    if not rows:
        return None

    def draw(axes: Any) -> None:
        axes.plot(*zip(*rows, strict=True), color=LIGHT[0], linewidth=1.6)
        _mark_kept(axes, run)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.02)

    return draw_figure(
        f"norm{suffix}", "Length of v", "Euclidean norm |v| after each step." + _kept_words(run),
        section_of("numbers", run), ("step", "v_norm"), rows, draw,
    )  # fmt: skip


def _paths(run: RunFacts, suffix: str) -> Figure | None:
    steps = [row for row in run.steps if isinstance(row.get("v"), list) and row["v"]]
    if not steps:
        return None
    size = len(steps[0]["v"])
    rows = [(row["step"], *(finite(x) for x in row["v"])) for row in steps if len(row["v"]) == size]
    drawn = min(size, MOST_PATHS)

    def draw(axes: Any) -> None:
        axes.axhline(0, color=SOFT, linewidth=0.7)
        for i in range(drawn):
            points = [(row[0], row[1 + i]) for row in rows if row[1 + i] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=LIGHT[i % len(LIGHT)], label=f"v{i + 1}",
                          linestyle=DASHES[i // len(LIGHT) % len(DASHES)],
                          linewidth=1.3 if drawn <= 16 else 0.9)  # fmt: skip
        _mark_kept(axes, run)
        axes.set_xlabel("step")
        axes.margins(x=0.02)
        if 1 < drawn <= 16:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.4, labelspacing=0.25)

    count = f"All {size} numbers" if drawn == size else f"The first {drawn} of {size} numbers (all are in the CSV)"
    if size == 1:
        count = "The one number"
    return draw_figure(
        f"paths{suffix}", "Path of each number", f"{count} after each step; they start at 0." + _kept_words(run),
        section_of("numbers", run), ("step", *(f"v{i + 1}" for i in range(size))), rows, draw, height=2.95,
    )  # fmt: skip


def _mark_kept(axes: Any, run: RunFacts) -> None:
    if run.adapter.step is not None:
        axes.axvline(run.adapter.step, color=SOFT, linewidth=0.9, linestyle=(0, (3, 3)))


def _kept_words(run: RunFacts) -> str:
    return f" Dashed: step {run.adapter.step}, whose v is the adapter." if run.adapter.step is not None else ""


def _problems(runs: Sequence[RunFacts]) -> Figure | None:
    keys = ("distinct_problems", "validation_strict", "validation_value_only")
    rows = [
        (run.label, *(finite(point.get(key)) for key in keys))
        for run in runs
        for point in (run.evaluation.curve if run.evaluation is not None else ())
    ]
    rows = [row for row in rows if None not in row]
    if len(rows) < 2:
        return None

    def draw(axes: Any) -> None:
        for index, run in enumerate(runs):
            own: list[tuple[Any, ...]] = [row for row in rows if row[0] == run.label]
            for column, label, marker in ((2, "strict", "o"), (3, "value only", "s")):
                if not own:
                    continue
                colour = LIGHT[(index if len(runs) > 1 else column - 2) % len(LIGHT)]
                named = label if len(runs) == 1 else f"{short(run.label)}, {label}"
                axes.plot([row[1] for row in own], [100 * row[column] for row in own], color=colour, marker=marker,
                          markersize=4.5, markerfacecolor=PAPER, linewidth=1.1, label=named)  # fmt: skip
        axes.set_xlabel("distinct training problems seen")
        axes.set_ylabel("% of replies")
        axes.set_ylim(
            0, 1.08 * max(1.0, *(100 * float(value) for row in rows for value in row[2:] if value is not None))
        )

    caption = "Held-out validation items, greedy, against how many different problems training had seen."
    title, columns = "What problems bought", ("run", *keys)
    return draw_figure("problems", title, caption, "curves", columns, rows, draw, has_legend=True)


def _gain(evaluation: Evaluation, run: RunFacts, suffix: str) -> Figure | None:
    if evaluation.gain is None:
        return None
    parts = (("value", "right values"), ("format", "format"), ("stops", "stopping"), ("total", "all"))
    rows = [(label, 100 * evaluation.gain[name]) for name, label in parts]

    def draw(axes: Any) -> None:
        places = range(len(rows))[::-1]
        axes.barh(list(places), [row[1] for row in rows], color=[LIGHT[2], LIGHT[1], LIGHT[3], SOFT], height=0.55)
        axes.axvline(0, color=INK, linewidth=0.8)
        for place, (_, points) in zip(places, rows, strict=True):
            axes.annotate(f"{points:+.1f}" if abs(points) >= 0.05 else "0.0", (points, place), fontsize=8,
                          xytext=(4 if points >= 0 else -4, 0), textcoords="offset points", va="center",
                          ha="left" if points >= 0 else "right")  # fmt: skip
        axes.set_yticks(list(places), [row[0] for row in rows])
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.2)
        axes.set_xlabel("points of the strict share")

    caption = "The gain over the untrained model, shared out among what a right reply needs; the parts add up to all."
    section, columns = section_of("gain", run), ("part", "points")
    title = "Parts of the gain"
    return draw_figure(f"gain{suffix}", title, caption, section, columns, rows, draw, height=1.9)


def _conditions(evaluation: Evaluation, run: RunFacts, suffix: str) -> Figure:
    rows = []
    for one in evaluation.outcomes:
        for measure in ("strict", "value_only"):
            if (share := one.shares.get(measure)) is not None:
                rows.append((one.name, one.label, measure, share.correct, share.total, share.value, *share.interval()))
    names = list(dict.fromkeys(row[0] for row in rows))

    def draw(axes: Any) -> None:
        untrained = next(row for row in rows if row[0] == "untrained" and row[2] == "strict")
        axes.axvline(100 * untrained[5], color=SOFT, linewidth=0.9, linestyle=(0, (3, 3)))
        for row in rows:
            place = len(names) - 1 - names.index(row[0])
            strict = row[2] == "strict"
            colour = {"tuned": LIGHT[2], "untrained": LIGHT[0]}.get(row[0], SOFT)
            share, low, high = (100 * value for value in row[5:8])
            y = place - (0.0 if strict else 0.24)
            axes.plot([low, high], [y, y], color=colour, linewidth=1.5 if strict else 0.8)
            axes.plot([share], [y], color=colour, marker="o" if strict else "s", markersize=5.5 if strict else 4,
                      markerfacecolor=colour if strict else PAPER, linestyle="none")  # fmt: skip
            if strict:
                _label_above(axes, place, row[1])
        _rows_only(axes, len(names))
        axes.set_xlabel("% of the same test items, with 95 % Wilson intervals")

    caption = (
        "Full circles: strict. Open squares: value only. Green: the adapter; blue, and the dashed line: the untrained "
        "model; grey: controls."
    )
    columns = ("condition", "label", "measure", "correct", "total", "share", "low", "high")
    section, height = section_of("controls", run), 0.75 + 0.44 * len(names)
    return draw_figure(f"conditions{suffix}", "All conditions", caption, section, columns, rows, draw, height=height)


def _label_above(axes: Any, place: float, label: str) -> None:
    """A label above its row: beside it a phone has no room for one."""
    paper = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.8}
    across = axes.get_yaxis_transform()
    axes.text(0.0, place + 0.36, short(label), transform=across, fontsize=8, va="center", bbox=paper)


def _rows_only(axes: Any, count: int) -> None:
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.set_ylim(-0.6, count - 0.3)
    axes.spines["left"].set_visible(False)


def _differences(runs: Sequence[RunFacts], pools: Sequence[Pool]) -> Figure | None:
    rows: list[tuple[Any, ...]] = []
    for run in runs:
        if run.evaluation is not None:
            strict = run.evaluation.paired["strict"]
            rows.append(("run", run.label, strict.difference, *strict.interval))
    for pool in pools:
        pooled = pool.results["strict"]
        ends = pooled.interval or (None, None)
        rows.append(("pooled", f"{len(pool.labels)} runs pooled", pooled.difference, *ends))
    if len(runs) < 2 or not rows:
        return None

    def draw(axes: Any) -> None:
        axes.axvline(0, color=INK, linewidth=0.8)
        for index, (kind, label, difference, low, high) in enumerate(rows):
            place, colour = len(rows) - 1 - index, LIGHT[0] if kind == "run" else LIGHT[2]
            if low is not None:
                axes.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=1.5)
            axes.plot([100 * difference], [place], color=colour, marker="o" if kind == "run" else "D", markersize=5.5)
            _label_above(axes, place, label)
        _rows_only(axes, len(rows))
        axes.set_xlabel("points over the untrained model, strict, with 95 % intervals")

    columns, height = ("kind", "run", "difference", "low", "high"), 0.75 + 0.44 * len(rows)
    caption = "Circles: runs; diamonds: runs pooled by item."
    return draw_figure("differences", "Gain of each run", caption, "runs", columns, rows, draw, height=height)


__all__ = ["figures_of", "section_of"]
