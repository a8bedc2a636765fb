"""diff, mix: how far apart adapters are, and their weighted sums."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from tinylora.cli.adapters import AdapterArgument, Model, complete, output_at, value_type
from tinylora.cli.common import Force, Json, app, print_json, verb
from tinylora.errors import UserError
from tinylora.store.describe import code_of, describe_json
from tinylora.talk import say_to_stderr as say
from tinylora.talk import show


@app.command()
@verb
def diff(a: AdapterArgument, b: AdapterArgument, as_json: Json = False) -> None:
    """Compare the numbers of two adapters on one basis.

    \b
    Examples:
      tinylora diff runs/demo-001 runs/demo-002
    """
    from tinylora.store.adapter import open_adapter
    from tinylora.store.arithmetic import difference

    one, two = open_adapter(a), open_adapter(b)
    if one.fingerprint or two.fingerprint:
        one, two = complete(one, ""), complete(two, "")
    found = difference(one, two)
    if as_json:
        print_json({"a": one.label, "b": two.label, **dataclasses.asdict(found)})
        return
    group, place, x, y = found.largest
    show(
        f"|a| = {found.norm_a:.4g}, |b| = {found.norm_b:.4g}, |a - b| = {found.distance:.4g}, cosine {found.cosine:.4f}"
    )
    show(f"largest difference: tie group {group}, number {place}: {x:+.5g} and {y:+.5g}")


@app.command()
@verb
def mix(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Two or more, on one basis.")],
    weights: Annotated[str, typer.Option(help="One for each, separated by commas; without it, the mean.")] = "",
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the file, too.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the numbers: float32 or bfloat16.")] = "float32",
    model: Model = "",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Average or interpolate adapters. The result has the weighted sum of their numbers.

    \b
    Examples:
      tinylora mix runs/demo-001 runs/demo-002
      tinylora mix runs/demo-001 TINY-... --weights 0.7,0.3 -o mixed.tinylora
    """
    from tinylora.store.adapter import open_adapter
    from tinylora.store.arithmetic import mix as mixed_of

    try:
        numbers = [float(part) for part in weights.split(",")] if weights else [1 / len(adapters)] * len(adapters)
    except ValueError:
        raise UserError(f"--weights must be numbers separated by commas, such as 0.7,0.3, got {weights!r}") from None
    output = output_at(out, force)
    opened = [open_adapter(one) for one in adapters]
    if any(one.fingerprint for one in opened):  # else all of them are completed at once, as one
        opened = [complete(one, model) for one in opened]
    mixed = complete(mixed_of(opened, numbers), model)
    data = mixed.to_portable(value_type(dtype)).to_bytes()
    out = output.write(data) if output is not None else None
    if as_json:
        print_json({**describe_json(mixed), "code": code_of(data), "file": str(out) if out else None})
        return
    show(code_of(data) or "(too long for a code; use the file)")
    say(
        f"{mixed.label}: {mixed.v.numel()} numbers, |v| = {float(mixed.v.norm()):.4g}"
        + (f", written to {out}" if out else "")
    )
