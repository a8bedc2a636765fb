"""eval: the untrained model beside an adapter, on the same items."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinylora.cli.common import Force, Json, OtherBase, Overrides, Trust, app, print_json, verb
from tinylora.errors import UserError
from tinylora.talk import say_to_stderr as say
from tinylora.talk import show

if TYPE_CHECKING:
    from tinylora.config.run import RunConfig
    from tinylora.evaluation.evidence import EvidenceOptions
    from tinylora.rollouts.runtime import Runtime
    from tinylora.store.adapter import Adapter
    from tinylora.system.outputs import Output

AdapterName = Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="A run folder, an adapter file, or a code.")]
TaskName = Annotated[
    str,
    typer.Option(
        help="gsm8k or another public set, jsonl, reasoning_gym:NAME, or a recipe; without it, that of training."
    ),
]
Model = Annotated[str, typer.Option(help="The base model, where it is not the one of training or is not known.")]
Rounded = Annotated[
    bool, typer.Option("--rounded", help="Compare the adapter with itself rounded to bfloat16 instead.")
]
NumItems = Annotated[int, typer.Option(metavar="N", help="Test items; 0 takes the recipe's eval.num_test.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
Seed = Annotated[int, typer.Option(help="Of the sampling.")]
Samples = Annotated[int, typer.Option(metavar="K", help="Samples an item, for pass@k, majority@k and average@k.")]
Controls = Annotated[
    bool, typer.Option("--controls", help="All controls and side effects; written to evidence.json in the run.")
]
TrainedControls = Annotated[
    list[str] | None,
    typer.Option(metavar="RUN", help="With --controls: a run of train --control; may be repeated."),
]
AlsoTasks = Annotated[
    list[str] | None,
    typer.Option(metavar="TASK", help="With --controls: another task or recipe, before and after; may be repeated."),
]
AlsoItems = Annotated[int, typer.Option(metavar="N", help="Test items of each --also task.")]
RandomVectors = Annotated[int, typer.Option(metavar="N", help="With --controls: random vectors, at least 5.")]
Text = Annotated[str, typer.Option(metavar="FILE", help="With --controls: neutral text of your own.")]
Watts = Annotated[float, typer.Option(help="With --controls: power of a busy core, or of the GPU.")]
Price = Annotated[
    float | None, typer.Option(metavar="MONEY", help="With --controls: an hour of a core, or of the GPU.")
]
Currency = Annotated[str, typer.Option(help="Of --price.")]
Out = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="With --controls: where to write, if not into the run.")
]
Items = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write every reply and its scores here, one line each (JSONL).")
]
Untrained = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Take the untrained model's replies from here; if it is not there, write it."),
]


@app.command("eval")
@verb
def eval_(
    adapter: AdapterName,
    task: TaskName = "",
    model: Model = "",
    other_base: OtherBase = False,
    rounded: Rounded = False,
    num_items: NumItems = 0,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    samples: Samples = 1,
    controls: Controls = False,
    trained_control: TrainedControls = None,
    also: AlsoTasks = None,
    also_items: AlsoItems = 200,
    random: RandomVectors = 5,
    text: Text = "",
    watts: Watts = 10.0,
    price: Price = None,
    currency: Currency = "USD",
    out: Out = None,
    items: Items = None,
    untrained: Untrained = None,
    trust: Trust = False,
    force: Force = False,
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
    opened, trained, config = _settings(adapter, task, model, set_ or [], trust)
    items_to = _check_files(items, untrained, force, is_plain=not (controls or samples != 1 or rounded))
    if controls:
        folder = _folder_of(opened, out)
        if rounded or samples != 1 or temperature:
            raise UserError(
                "--controls are greedy answers of both models: leave --rounded, --samples and --temperature out"
            )
        options = _evidence_options(
            num_items, random, also, also_items, trained_control, text, (watts, price, currency)
        )
        _check_own_task(opened, trained, config, folder)
        _controls(opened, config, folder, options, other_base=other_base, force=force, as_json=as_json)
        return
    if also or trained_control or text or out or price is not None:
        raise UserError("--also, --trained-control, --text, --price and --out go with --controls; add it")
    runtime = _open(opened, config, other_base)
    if samples != 1:
        if rounded:
            raise UserError("--samples compares with the untrained model; leave --rounded out")
        _samples(runtime, opened, samples, temperature, num_items, seed, as_json=as_json)
        return
    _compare(runtime, opened, num_items, temperature, seed, items_to, untrained, rounded=rounded, as_json=as_json)


def _settings(
    adapter: str, task: str, model: str, overrides: list[str], trust: bool
) -> "tuple[Adapter, RunConfig, RunConfig]":
    """The adapter, the settings of its training, and those of this evaluation."""
    from tinylora.cli.adapters import open_named
    from tinylora.evaluation.settings import check_base_kept, settings_for_eval

    opened = open_named(adapter, ("model", "task", "prompt", "eval"), model, overrides, task=task, trust=trust)
    trained = opened.settings(model)
    if opened.run is None and not task:
        raise UserError(f"{opened.label} does not say on what it was trained; name a task or recipe with --task")
    config = settings_for_eval(trained, task, overrides, is_bare=opened.run is None, is_own=opened.is_own)
    check_base_kept(trained, config)
    return opened, trained, config


def _check_files(items: Path | None, untrained: Path | None, force: bool, *, is_plain: bool) -> "Output | None":
    """Whether the files can be written is found out before a model is loaded; where --items goes."""
    from tinylora.evaluation.items import check_untrained
    from tinylora.system.outputs import Output

    if (items or untrained) and not is_plain:
        raise UserError("--items and --untrained go with one reply an item; leave --controls, --samples, --rounded out")
    if untrained is not None:
        check_untrained(untrained)
    return Output.at(items, force=force) if items is not None else None


def _open(opened: "Adapter", config: "RunConfig", other_base: bool) -> "Runtime":
    from tinylora.evaluation.settings import check_held_out
    from tinylora.rollouts.runtime import open_runtime
    from tinylora.rollouts.skipped import skipped_in_words

    runtime = open_runtime(config, say=say, on=opened, other_base=other_base)
    if opened.run is not None:
        check_held_out(opened.run, config, runtime.task.items("test"), say, is_own=opened.is_own)
    if skipped := skipped_in_words(runtime.task, "test"):
        say(skipped)
    return runtime


def _folder_of(opened: "Adapter", out: Path | None) -> Path:
    """Where evidence goes."""
    folder = out or (opened.folder if opened.in_run else None)
    if folder is None:
        raise UserError(f"{opened.label} is no run folder to write into; name one with --out")
    return folder


def _evidence_options(
    num_items: int,
    random: int,
    also: list[str] | None,
    also_items: int,
    trained_control: list[str] | None,
    text: str,
    power: tuple[float, float | None, str],
) -> "EvidenceOptions":
    """power: watts, price of an hour, its currency."""
    from tinylora.evaluation.account import Prices
    from tinylora.evaluation.evidence import EvidenceOptions
    from tinylora.evaluation.side_effects import read_text
    from tinylora.store.adapter import open_adapter

    watts, price, currency = power
    return EvidenceOptions(
        num_items=num_items, random_vectors=random, also=tuple(also or ()), also_items=also_items,
        trained=tuple(open_adapter(run) for run in trained_control or ()), text=read_text(text) if text else "",
        prices=Prices(watts=watts, price_per_hour=price, currency=currency),
    )  # fmt: skip


def _check_own_task(opened: "Adapter", trained: "RunConfig", config: "RunConfig", folder: Path) -> None:
    from tinylora.evaluation.settings import other_protocol
    from tinylora.system.paths import real

    changed = other_protocol(trained, config)
    if changed and opened.folder is not None and real(folder) == real(opened.folder):
        raise UserError(
            f"evidence in a run's own folder is of the run's own task, and {', '.join(changed)} "
            f"{'is' if len(changed) == 1 else 'are'} not as in training; name another folder with --out"
        )


def _controls(
    opened: "Adapter",
    config: "RunConfig",
    folder: Path,
    options: "EvidenceOptions",
    *,
    other_base: bool,
    force: bool,
    as_json: bool,
) -> None:
    from tinylora.evaluation.evidence import gather_evidence
    from tinylora.evaluation.resumable import EVIDENCE_FILE, ITEMS_FILE, check_place
    from tinylora.evaluation.verdict import format_evidence
    from tinylora.system.paths import real

    check_place(folder, force=force or (opened.folder is not None and real(folder) == real(opened.folder)))
    runtime = _open(opened, config, other_base)
    evidence = gather_evidence(runtime, opened, folder, options, say, run=opened.folder)
    say(f"saved {folder / EVIDENCE_FILE} and, item by item, {folder / ITEMS_FILE}")
    print_json(evidence) if as_json else show(format_evidence(evidence))


def _samples(
    runtime: "Runtime", opened: "Adapter", count: int, temperature: float, num_items: int, seed: int, *, as_json: bool
) -> None:
    from tinylora.evaluation.sampled import compare_samples

    sampled = compare_samples(
        runtime, opened.v, label=opened.label, num_samples=count, temperature=temperature or 1.0, num_items=num_items,
        seed=seed, say=say,
    )  # fmt: skip
    print_json({"model": runtime.config.model.name, **sampled.to_json()}) if as_json else show(sampled.text())


def _compare(
    runtime: "Runtime",
    opened: "Adapter",
    num_items: int,
    temperature: float,
    seed: int,
    items: "Output | None",
    untrained: Path | None,
    *,
    rounded: bool,
    as_json: bool,
) -> None:
    from tinylora.evaluation.compare import base_id, compare
    from tinylora.evaluation.items import items_data

    against, v = (opened.v, opened.rounded("bfloat16").v) if rounded else (None, opened.v)
    compared = compare(
        runtime, v, label=opened.label, against=against, num_items=num_items, temperature=temperature, seed=seed,
        untrained=untrained, base_id=base_id(runtime) if untrained else "", say=say,
    )  # fmt: skip
    if as_json:
        print_json({"model": runtime.config.model.name, "adapter": opened.label, **compared.to_json()})
    else:
        show(compared.text())
    if items is not None:
        replies = {"untrained": compared.untrained, "adapter": compared.adapter}
        where = items.write(items_data(replies, {"protocol": compared.protocol}))
        say(f"saved {where}")
