"""`tinylora report`: one page that opens from a file and asks no network for anything."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinylora.errors import UserError
from tinylora.evaluation.statistics import PairedResult, paired_result, pooled_result
from tinylora.reporting.figures import Figure, figures_of
from tinylora.reporting.run_facts import RunFacts, read_run, shared_items
from tinylora.reporting.samples import Pair, random_pairs, regressions

FILES = "report_files"
NOT_EVALUATED = "Nothing was evaluated on held-out test items, so nothing can be said about a gain."


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSection:
    """What the page says of one run."""

    facts: RunFacts
    verdict: str
    strict: PairedResult | None
    value_only: PairedResult | None
    stopped: PairedResult | None
    random: list[Pair]
    lost: list[Pair]
    account: dict[str, dict[str, Any]]
    rebuild: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Where the page lies and what it says first."""

    path: Path
    verdict: str
    num_bytes: int


def write_report(paths: Sequence[Path], out: Path | None, *, samples: int = 6, seed: int = 0) -> Report:
    """Write the page, and the figures as PNG and CSV into `report_files/` beside it.

    out: the page; by default report.html in the run, or here for several runs.
    Raises: UserError for a folder that is no run, one without a step, files that cannot be read, a place that cannot be
    written to.
    """
    from tinylora.training.run_folder import write_atomically

    if samples < 0:
        raise UserError(f"--samples must be 0 or more, got {samples}")
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"the runs must have different names to be told apart, got {', '.join(names)}")
    sections = [_section(run, samples, seed) for run in runs]
    figures = figures_of(runs)
    page = out or (runs[0].path / "report.html" if len(runs) == 1 else Path("report.html"))
    text = render(sections, figures, pooled=_pooled(runs), seed=seed)
    try:
        folder = page.parent / FILES
        folder.mkdir(parents=True, exist_ok=True)
        for figure in figures:
            write_atomically(folder / f"{figure.name}.png", figure.png)
            write_atomically(folder / f"{figure.name}.csv", figure.csv().encode())
        data = text.encode("utf-8", errors="replace")
        write_atomically(page, data)
    except (PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError) as error:
        raise UserError(f"{page} cannot be written ({error.strerror}); choose another place with --out") from error
    return Report(
        path=page, verdict=sections[0].verdict if len(runs) == 1 else f"{len(runs)} runs", num_bytes=len(data)
    )


def render(sections: Sequence[RunSection], figures: Sequence[Figure], *, pooled: str, seed: int) -> str:
    """The page's text. Everything that a model or a user wrote goes through the template's escaping."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(loader=PackageLoader("tinylora.reporting"), autoescape=True, undefined=StrictUndefined)
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}"
    environment.filters["points"] = lambda share: f"{100 * share + 0.0:+.1f}".replace("-0.0", "+0.0")
    environment.filters["p"] = lambda value: f"{value:.2g}"
    environment.filters["known"] = lambda value, form="{:,}": "not measured" if value is None else form.format(value)
    drawings = [(figure, Markup(figure.svg)) for figure in figures]  # drawn here, from numbers and escaped labels
    template = environment.get_template("report.html.jinja")
    return template.render(sections=sections, drawings=drawings, pooled=pooled, seed=seed, folder=FILES)


def _section(run: RunFacts, samples: int, seed: int) -> RunSection:
    sides = run.sides
    results: dict[str, PairedResult | None] = {"strict": None, "value_only": None, "stopped": None}
    if sides is not None:
        for name in results:
            before, after = (np.array([row[name] >= 1 for row in side]) for side in sides)
            results[name] = paired_result(before, after)
    source = run.evidence or run.result
    account: dict[str, dict[str, Any]] = {}
    if run.evidence is not None:
        account = {who: one for who, one in run.evidence["account"].items() if one is not None}
    return RunSection(
        facts=run,
        verdict=str(source["verdict"]) if source is not None else NOT_EVALUATED,
        strict=results["strict"],
        value_only=results["value_only"],
        stopped=results["stopped"],
        random=random_pairs(sides, samples, seed) if sides else [],
        lost=regressions(sides, samples) if sides else [],
        account=account,
        rebuild=_rebuild(run),
    )


def _rebuild(run: RunFacts) -> list[str]:
    lines = [f"tinylora train {run.name}/config.toml"]
    if run.evidence is not None:
        lines.append(f"tinylora eval {run.name} --controls --num-items {run.evidence['num_items']}")
    lines.append(f"tinylora encode {run.name}")
    return lines


def _pooled(runs: Sequence[RunFacts]) -> str:
    if len(runs) < 2:
        return ""
    if not shared_items(runs):
        return "The runs differ in base, task or test items, or have the same seed, so they are not pooled."
    pairs = []
    for run in runs:
        sides = run.sides
        assert sides is not None
        pairs.append(tuple(np.array([row["strict"] >= 1 for row in side]) for side in sides))
    return "Pooled by item, strict: " + pooled_result(pairs).text()  # type: ignore[arg-type]
