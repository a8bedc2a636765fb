"""report."""

from pathlib import Path
from typing import Annotated

import typer

from tinylora.cli.common import Force, Json, app, print_json, verb
from tinylora.talk import say_to_stderr as say
from tinylora.talk import show


@app.command()
@verb
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are compared.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; else report.html in the run, or here for several.")
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", help="Items shown, at random and of the worst regressions.")] = 6,
    seed: Annotated[int, typer.Option(help="Of the items that are drawn at random.")] = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write one HTML page about a run or several. Figures as PNG and their data as CSV lie beside it.

    \b
    Examples:
      tinylora report runs/demo-001
      tinylora report runs/demo-001 runs/demo-002 runs/demo-003 --out seeds.html
    """
    from tinylora.reporting.page import write_report

    done = write_report(runs, out, samples=samples, seed=seed, force=force)
    for note in done.notes:
        say(note)
    if as_json:
        facts = {"report": str(done.path), "files": str(done.files) if done.files else None, "bytes": done.num_bytes}
        print_json({**facts, "verdict": done.verdict})
        return
    show(done.verdict)
    beside = f"figures and their data in {done.files}" if done.files else "the page alone, as that is no file"
    say(f"saved {done.path} ({done.num_bytes:,} bytes); {beside}")
