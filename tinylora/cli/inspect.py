"""inspect: what would be trained in a model, and what that takes."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from tinylora.cli.common import Json, Overrides, app, print_json, verb
from tinylora.errors import UserError
from tinylora.talk import say_to_stderr as say
from tinylora.talk import show

if TYPE_CHECKING:
    from tinylora.config.run import RunConfig
    from tinylora.planning.inspection import Inspection
    from tinylora.planning.plan import Plan
    from tinylora.planning.speed import Speed


@app.command()
@verb
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|ADAPTER", help="The embedded model, a folder, a .gguf file, a hub id, or an adapter."
        ),
    ],
    set_: Overrides = None,
    recipe: Annotated[str, typer.Option(help="Recipe for all other settings; --landscape takes demo.")] = "",
    weights: Annotated[
        bool | None,
        typer.Option(
            "--weights/--shapes", help="Load the weights or not; without either, only what is on this machine."
        ),
    ] = None,
    landscape: Annotated[
        bool, typer.Option("--landscape", help="Accuracy and KL to the base against the norm of random vectors.")
    ] = False,
    norms: Annotated[str, typer.Option(help="Norms, separated by commas (--landscape).")] = "0.03,0.05,0.1,0.2",
    vectors: Annotated[int, typer.Option(help="Random vectors for each norm (--landscape).")] = 3,
    items: Annotated[int, typer.Option(help="Validation items (--landscape).")] = 64,
    seed: Annotated[int, typer.Option(help="Of the random vectors (--landscape).")] = 0,
    as_json: Json = False,
) -> None:
    """Show what would be trained and what that takes. Modules, groups, bytes, memory, time; of an adapter, what it is.

    \b
    Examples:
      tinylora inspect smollm2-135m-instruct --set adapter.n_tie=17
      tinylora inspect Qwen/Qwen2.5-7B-Instruct
      tinylora inspect smollm2-135m-instruct --landscape --norms 0.03,0.1 --vectors 5 --items 128
      tinylora inspect runs/demo-001
    """
    from tinylora.config.recipe import apply_overrides, load_recipe
    from tinylora.config.run import RunConfig
    from tinylora.evaluation.landscape import format_landscape
    from tinylora.evaluation.landscape import landscape as scan
    from tinylora.models.names import resolve_name
    from tinylora.planning.inspection import inspect_shapes, inspect_weights
    from tinylora.rollouts.runtime import open_runtime
    from tinylora.store.adapter import is_adapter, open_adapter
    from tinylora.store.describe import describe_json, describe_text

    if is_adapter(model):
        opened = open_adapter(model)
        if as_json:
            print_json(describe_json(opened))
        else:
            show(describe_text(opened))
        return
    if landscape and weights is False:
        raise UserError("--landscape needs the weights; leave --shapes out")
    name = recipe or ("demo" if landscape else "")
    config = load_recipe(name) if name else RunConfig()
    config = apply_overrides(
        dataclasses.replace(config, model=dataclasses.replace(config.model, name=model)), set_ or []
    )
    if weights is None:
        weights = landscape or resolve_name(config.model.name).kind != "hub"
    if not weights:
        print_inspection(config, *inspect_shapes(config, say), as_json=as_json)
        return
    runtime = open_runtime(config, task=landscape, say=say)
    if landscape:
        rows = scan(runtime, _numbers(norms), vectors, items, seed, say)
        if as_json:
            print_json({"model": model, "recipe": name, "rows": [dataclasses.asdict(row) for row in rows]})
        else:
            show(format_landscape(rows))
        return
    print_inspection(runtime.config, *inspect_weights(runtime, say), as_json=as_json)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--norms must be numbers separated by commas, such as 0.1,0.5, got {text!r}") from None


def print_inspection(config: "RunConfig", found: "Inspection", speed: "Speed", plan: "Plan", *, as_json: bool) -> None:
    """What would be trained, for people or as JSON."""
    from tinylora.planning.inspection import format_inspection
    from tinylora.planning.plan import format_plan

    if as_json:
        inspected = dataclasses.asdict(found)
        inspected["memory"]["total"] = found.memory.total
        print_json({**inspected, "speed": dataclasses.asdict(speed), "plan": dataclasses.asdict(plan)})
    else:
        show(format_inspection(found, config.adapter))
        show(format_plan(speed, plan))
