"""figure: accuracy against trained numbers."""

from pathlib import Path
from typing import Annotated

import typer

from tinylora.cli.common import Force, Json, app, print_json, verb
from tinylora.talk import say_to_stderr as say
from tinylora.talk import show


@app.command()
@verb
def figure(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="results.json of one sweep or several.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The picture; else figure.png beside the first results.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Draw accuracy against trained numbers from a sweep's results. PNG, SVG and CSV lie beside each other.

    \b
    Examples:
      tinylora figure runs/sweep-dial-small/results.json
      tinylora figure runs/rl/results.json runs/sft/results.json --out dial.png
    """
    from tinylora.sweeps.figure import write_dial

    done = write_dial(results, out, force=force)
    if as_json:
        print_json({"files": [str(path) for path in done.files], "caption": done.caption, "not_run": done.not_run})
        return
    show(done.caption)
    say("saved " + ", ".join(str(path) for path in done.files))
