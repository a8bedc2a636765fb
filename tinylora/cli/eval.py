"""eval: the untrained model beside an adapter, on the same items."""

from pathlib import Path
from typing import Annotated

import typer

from tinylora.cli.common import Json, OtherBase, Overrides, app, print_json, verb
from tinylora.errors import UserError
from tinylora.talk import say_to_stderr as say


@app.command("eval")
@verb
def eval_(
    adapter: Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="A run folder, an adapter file, or a code.")],
    task: Annotated[
        str,
        typer.Option(
            help="gsm8k or another public set, jsonl, reasoning_gym:NAME, or a recipe; without it, that of training."
        ),
    ] = "",
    model: Annotated[
        str, typer.Option(help="The base model, where it is not the one of training or is not known.")
    ] = "",
    other_base: OtherBase = False,
    rounded: Annotated[
        bool, typer.Option("--rounded", help="Compare the adapter with itself rounded to bfloat16 instead.")
    ] = False,
    num_items: Annotated[int, typer.Option(metavar="N", help="Test items; 0 takes the recipe's eval.num_test.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    samples: Annotated[
        int, typer.Option(metavar="K", help="Samples an item, for pass@k, majority@k and average@k.")
    ] = 1,
    controls: Annotated[
        bool, typer.Option("--controls", help="All controls and side effects; written to evidence.json in the run.")
    ] = False,
    trained_control: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN", help="With --controls: a run of train --control; may be repeated."),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK", help="With --controls: another task or recipe, before and after; may be repeated."
        ),
    ] = None,
    also_items: Annotated[int, typer.Option(metavar="N", help="Test items of each --also task.")] = 200,
    random: Annotated[int, typer.Option(metavar="N", help="With --controls: random vectors, at least 5.")] = 5,
    text: Annotated[str, typer.Option(metavar="FILE", help="With --controls: neutral text of your own.")] = "",
    watts: Annotated[float, typer.Option(help="With --controls: power of a busy core, or of the GPU.")] = 10.0,
    price: Annotated[
        float | None, typer.Option(metavar="MONEY", help="With --controls: an hour of a core, or of the GPU.")
    ] = None,
    currency: Annotated[str, typer.Option(help="Of --price.")] = "USD",
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="With --controls: where to write, if not into the run.")
    ] = None,
    items: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every reply and its scores here, one line each (JSONL).")
    ] = None,
    untrained: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Take the untrained model's replies from here; if it is not there, write it."
        ),
    ] = None,
    set_: Overrides = None,
    as_json: Json = False,
) -> None:
    """Compare untrained model and adapter on the same held-out items.

    \b
    Examples:
      tinylora eval runs/demo-001
      tinylora eval runs/demo-001 --task gsm8k --num-items 200
      tinylora eval runs/demo-001/adapter.safetensors --task jsonl --set task.path=mine.jsonl --json
      tinylora eval TINY-... --task demo
      tinylora eval runs/demo-001 --rounded                  what rounding its numbers to bfloat16 costs
      tinylora eval runs/demo-001 --items replies.jsonl     every reply of both, and its scores
      tinylora eval runs/demo-001 --samples 8 --temperature 0.6
      tinylora eval runs/demo-001 --controls --also gsm8k    everything that could explain the gain away
      tinylora eval runs/demo-001 --controls --trained-control runs/demo-shuffled-001
    """
    from tinylora.evaluation.account import Prices
    from tinylora.evaluation.compare import base_id, compare
    from tinylora.evaluation.evidence import EvidenceOptions, gather_evidence
    from tinylora.evaluation.items import check_writable, write_items
    from tinylora.evaluation.resumable import EVIDENCE_FILE, ITEMS_FILE
    from tinylora.evaluation.sampled import compare_samples
    from tinylora.evaluation.settings import check_base_kept, check_held_out, other_protocol, settings_for_eval
    from tinylora.evaluation.side_effects import read_text
    from tinylora.evaluation.verdict import format_evidence
    from tinylora.rollouts.runtime import open_runtime
    from tinylora.store.adapter import open_adapter

    opened = open_adapter(adapter)
    trained = opened.settings(model)
    if opened.run is None and not task:
        raise UserError(f"{opened.label} does not say on what it was trained; name a task or recipe with --task")
    if ":" in trained.task.scorer and not (task or opened.is_own):
        raise UserError(
            f"{opened.label} names a scorer in Python ({trained.task.scorer}), and a file does not choose what code "
            "runs here; name the task or recipe yourself with --task"
        )
    config = settings_for_eval(trained, task, set_ or [], is_bare=opened.run is None)
    check_base_kept(trained, config)
    if (items or untrained) and (controls or samples != 1 or rounded):
        raise UserError("--items and --untrained go with one reply an item; leave --controls, --samples, --rounded out")
    for file in (items, untrained):
        if file is not None and not (file is untrained and file.is_file()):
            check_writable(file)
    if controls:
        run = opened.folder
        folder = out or (run if opened.is_own else None)
        if folder is None:
            raise UserError(f"{opened.label} is no run folder to write into; name one with --out")
        if rounded or samples != 1 or temperature:
            raise UserError(
                "--controls are greedy answers of both models: leave --rounded, --samples and --temperature out"
            )
        options = EvidenceOptions(
            num_items=num_items, random_vectors=random, also=tuple(also or ()), also_items=also_items,
            trained=tuple(open_adapter(run) for run in trained_control or ()), text=read_text(text) if text else "",
            prices=Prices(watts=watts, price_per_hour=price, currency=currency),
        )  # fmt: skip
        changed = other_protocol(trained, config)
        if changed and run is not None and folder.resolve() == run.resolve():
            raise UserError(
                f"evidence in a run's own folder is of the run's own task, and {', '.join(changed)} "
                f"{'is' if len(changed) == 1 else 'are'} not as in training; name another folder with --out"
            )
        check_writable(folder / EVIDENCE_FILE)
        runtime = open_runtime(config, say=say, on=opened, other_base=other_base)
        if opened.run is not None and runtime.task is not None:
            check_held_out(opened.run, config, runtime.task.items("test"), say)
        evidence = gather_evidence(runtime, opened, folder, options, say, run=run)
        say(f"saved {folder / EVIDENCE_FILE} and, item by item, {folder / ITEMS_FILE}")
        print_json(evidence) if as_json else print(format_evidence(evidence))
        return
    if also or trained_control or text or out or price is not None:
        raise UserError("--also, --trained-control, --text, --price and --out go with --controls; add it")
    runtime = open_runtime(config, say=say, on=opened, other_base=other_base)
    if opened.run is not None and runtime.task is not None:
        check_held_out(opened.run, config, runtime.task.items("test"), say)
    if samples != 1:
        if rounded:
            raise UserError("--samples compares with the untrained model; leave --rounded out")
        sampled = compare_samples(
            runtime, opened.v, label=opened.label, num_samples=samples, temperature=temperature or 1.0,
            num_items=num_items, seed=seed, say=say,
        )  # fmt: skip
        print_json({"model": config.model.name, **sampled.to_json()}) if as_json else print(sampled.text())
        return
    sides = (opened.v, opened.rounded("bfloat16").v) if rounded else (None, opened.v)
    compared = compare(
        runtime, sides[1], label=opened.label, against=sides[0], num_items=num_items, temperature=temperature,
        seed=seed, untrained=untrained, base_id=base_id(runtime) if untrained else "", say=say,
    )  # fmt: skip
    if as_json:
        print_json({"model": config.model.name, "adapter": opened.label, **compared.to_json()})
    else:
        print(compared.text())
    if items is not None:
        sides_of = {"untrained": compared.untrained, "adapter": compared.adapter}
        write_items(items, sides_of, {"protocol": compared.protocol})
