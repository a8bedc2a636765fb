"""`tinylora report`: one page that opens from a file and asks no network for anything.

Every number that was measured is written by `Numbers`, which gives it a stable key and keeps it for numbers.csv. All
text goes through the template's escaping; the only markup made here is that of numbers and of figures.
"""

import base64
import csv
import io
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tinylora.errors import UserError
from tinylora.reporting.charts import figures_of
from tinylora.reporting.figures import DARK, LIGHT, Figure, cell
from tinylora.reporting.outcomes import LABELS, MEASURES
from tinylora.reporting.report import Pool, RunFacts, differing_settings, finite, pools, read_runs
from tinylora.reporting.run_files import AGAIN
from tinylora.reporting.samples import Pair, random_pairs, regressions, shown
from tinylora.system.failures import writing
from tinylora.system.files import write_atomically
from tinylora.system.outputs import Output
from tinylora.talk import format_duration, shell_line

NOT_EVALUATED = "Nothing was evaluated on held-out test items, so nothing can be said about a gain."
NOT_MEASURED = "not measured"
ELSEWHERE = "choose another place with --out"
MOST_EMBEDDED_BYTES = 400_000
"""Of a figure's CSV that is carried inside of the page, too; a longer one lies beside it only."""
_STYLES: dict[str, Callable[[float], str]] = {
    "count": lambda x: f"{x:,.0f}",
    "percent": lambda x: f"{100 * x:.1f}",
    "points": lambda x: f"{100 * x:+.1f}" if abs(x) >= 0.0005 else "0.0",
    "p": lambda x: f"{x:.2g}",
    "one": lambda x: f"{x:,.1f}",
    "three": lambda x: f"{x:.3f}",
    "digits": lambda x: f"{x:.3g}",
    "v": lambda x: f"{x:+.4f}",
    "duration": format_duration,
    "mib": lambda x: f"{x / 2**20:,.0f}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Where the page lies and what it says first."""

    path: Path
    verdict: str
    num_bytes: int
    files: Path | None
    """The folder with figures and data; None beside a device or FIFO, which has no place for one."""
    notes: tuple[str, ...] = ()
    """What files say otherwise than their items, where that was put right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What the page says of one run."""

    run: RunFacts
    headline: str
    reasons: str
    """The rest of the verdict: what speaks for and against it."""
    random: list[Pair]
    lost: list[Pair]
    shell_path: str
    """The run's folder, as a shell takes it."""
    commands: list[str]
    items_link: str
    """From the page to the run's items; empty if there are none."""


class Numbers:
    """Writes numbers into the page, each with a key that stays, and keeps them all."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], tuple[float | None, str]] = {}

    def __call__(self, run: RunFacts | None, key: str, value: Any, style: str = "count") -> Markup:
        """The number in words of its style; what is None or not finite was not measured."""
        number = finite(value)
        text = NOT_MEASURED if number is None else _STYLES[style](number)
        label = run.label if run is not None else ""
        known, _ = self.rows.setdefault((label, key), (number, text))
        if known != number:  # files without their items can say two things of one number
            raise UserError(f"{key} of {label} is given as {known} and as {number}; {AGAIN}")
        raw = "" if number is None else repr(number)
        return Markup('<span data-run="{}" data-key="{}" data-value="{}">{}</span>').format(label, key, raw, text)

    def csv(self) -> str:
        """run, key, value with every digit, and the text on the page."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("run", "key", "value", "text"))
        for (run, key), (value, words) in self.rows.items():
            writer.writerow((cell(run), cell(key), "" if value is None else repr(value), cell(words)))
        return text.getvalue()


def write_report(
    paths: Sequence[Path], out: Path | None = None, *, samples: int = 6, seed: int = 0, force: bool = False
) -> Report:
    """Write the page, and its figures as PNG and CSV with numbers.csv into a folder beside it.

    out: the page; by default report.html in the run, or here for several runs. Its folder is named after it:
    report.html and report_files/. The page is written last and atomically. force: over files that are there, which the
    run's own page does anyway. To a device or FIFO goes the page alone.
    Raises: UserError for a folder that is no run, one without a step, files that cannot be read or do not belong
    together, a place that cannot be written to.
    """
    if samples < 0:
        raise UserError(f"--samples must be 0 or more, got {samples}")
    if not paths:
        raise UserError("name a run to report on, such as runs/demo-001")
    is_own = out is None and len(paths) == 1
    page = out or (paths[0] / "report.html" if is_own else Path("report.html"))
    output, folder = _places(page, is_own=is_own, force=force)
    runs = read_runs(paths)
    sections = [_section(run, page, samples, seed) for run in runs]
    pooled = pools(runs)
    figures = figures_of(runs, pooled)
    numbers = Numbers()
    files = quote(folder.name) if folder is not None else ""
    data = render(sections, figures, pooled, numbers, files, seed).encode("utf-8", errors="replace")
    if folder is not None:
        with writing(folder, ELSEWHERE):
            folder.mkdir(parents=True, exist_ok=True)
        beside = {f"{figure.name}.png": figure.png for figure in figures}
        beside |= {f"{figure.name}.csv": figure.csv().encode("utf-8", errors="replace") for figure in figures}
        beside["numbers.csv"] = numbers.csv().encode("utf-8", errors="replace")
        for name, content in beside.items():
            write_atomically(folder / name, content, then=ELSEWHERE)
    written = output.write(data)
    notes = tuple(f"{run.path}: {run.evaluation.note}" for run in runs if run.evaluation and run.evaluation.note)
    return Report(path=written, verdict=_verdict(sections, pooled), num_bytes=len(data), files=folder, notes=notes)


def _places(page: Path, *, is_own: bool, force: bool) -> tuple[Output, Path | None]:
    """Where the page goes, and its folder of figures. Raises: UserError if either may not be written there."""
    if page.is_dir():
        raise UserError(f"{page} is a folder; --out names the page, such as {page / 'report.html'}")
    output = Output.own(page) if is_own else Output.at(page, force=force)
    if output.is_stream:
        return output, None
    folder = page.with_name(f"{page.stem}_files")
    with writing(folder, ELSEWHERE):
        if folder.is_symlink():
            raise UserError(f"{folder} is a link, which is not followed; remove it, or {ELSEWHERE}")
        if not is_own and not force and os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists; name another page, or write over its files with --force")
    return output, folder


def render(
    sections: Sequence[Section],
    figures: Sequence[Figure],
    pooled: Sequence[Pool],
    numbers: Numbers,
    files: str,
    seed: int,
) -> str:
    """The page's text. `files`: the folder beside it that holds the figures, as it stands in a link; "": none."""
    runs = [section.run for section in sections]
    environment = Environment(loader=PackageLoader("tinylora.reporting"), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.globals.update(
        n=numbers, shown=shown, measures=MEASURES, labels=LABELS, data_link=_data_link, svg=_markup, files=files,
        not_measured=NOT_MEASURED, light=LIGHT, dark=DARK, place=_figures_in(figures),
    )  # fmt: skip
    environment.filters["norm"] = lambda values: None if None in values else math.hypot(*values)
    template = environment.get_template("report.html.jinja")
    return template.render(
        sections=sections,
        pools=pooled,
        verdict=_verdict(sections, pooled),
        differing=differing_settings(runs) if len(runs) > 1 else [],
        tasks=list(dict.fromkeys(shown(run.config.task.name, 80) for run in runs)),
        seed=seed,
    )


def _figures_in(figures: Sequence[Figure]) -> Callable[[str], list[Figure]]:
    return lambda section: [figure for figure in figures if figure.section == section]


def _markup(figure: Figure) -> Markup:
    return Markup(figure.svg)  # drawn in figures.py, where labels are escaped


def _data_link(figure: Figure) -> str:
    """The CSV inside of a link, so that a page that was passed on alone still has it; empty if it is too long."""
    data = figure.csv().encode("utf-8", errors="replace")
    if len(data) > MOST_EMBEDDED_BYTES:
        return ""
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(data).decode()


def _section(run: RunFacts, page: Path, samples: int, seed: int) -> Section:
    evaluation = run.evaluation
    verdict = shown(evaluation.verdict, 4000) if evaluation is not None else NOT_EVALUATED
    # The first sentence says what happened and how sure that is; it ends before a capital or a number.
    headline, *rest = re.split(r"(?<=[.!])\s+(?=[A-Z0-9])", verdict, maxsplit=1)
    sides = evaluation.sides if evaluation is not None else None
    items = run.path / evaluation.items_file if evaluation is not None and evaluation.items_file else None
    return Section(
        run=run,
        headline=headline,
        reasons=" ".join(rest),
        random=random_pairs(sides, samples, seed) if sides is not None else [],
        lost=regressions(sides, samples) if sides is not None else [],
        shell_path=shell_line(run.path),
        commands=_commands(run),
        items_link=_link(items, page) if items is not None else "",
    )


def _link(file: Path, page: Path) -> str:
    return quote(Path(os.path.relpath(file.resolve(), page.resolve().parent)).as_posix())


def _commands(run: RunFacts) -> list[str]:
    count = ["--num-items", run.evaluation.num_items] if run.evaluation is not None else []
    return [
        shell_line("tinylora", "train", run.path / "config.toml"),
        shell_line("tinylora", "eval", run.path, "--controls", *count),
        shell_line("tinylora", "report", run.path),
    ]


def _verdict(sections: Sequence[Section], pooled: Sequence[Pool]) -> str:
    if len(sections) == 1:
        return f"{sections[0].headline} {sections[0].reasons}".strip()
    words = [f"{', '.join(pool.labels)}: {pool.results['strict'].text()}." for pool in pooled]
    if not words:
        words = [f"{section.run.label}: {section.headline}" for section in sections]
    return " ".join(words)


__all__ = ["NOT_EVALUATED", "NOT_MEASURED", "Report", "render", "write_report"]
