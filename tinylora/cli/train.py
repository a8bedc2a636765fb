"""train."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinylora.cli.common import Json, Overrides, Trust, app, last_word, print_json, verb
from tinylora.cli.inspect import print_inspection
from tinylora.errors import UserError
from tinylora.system.interrupts import exit_code, going_on
from tinylora.talk import say_to_stderr as say
from tinylora.talk import shell_line, show

if TYPE_CHECKING:
    from tinylora.training.train import TrainResult


class Control(Enum):
    """Rewards that are no task."""

    none = "none"
    format = "format"
    shuffled = "shuffled"


@app.command()
@verb
def train(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe's name, or a .toml file.")] = None,
    set_: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print counts, tokens, memory and hours; load no weights, train nothing.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Go on with a run; train.steps, generation.kv_budget_gib, task.skip and log.* may change.",
        ),
    ] = None,
    control: Annotated[
        Control, typer.Option(help="Train on a control reward: format (right or wrong), or shuffled.")
    ] = Control.none,
    out: Annotated[Path, typer.Option(help="Folder for run folders.")] = Path("runs"),
    name: Annotated[
        str, typer.Option(metavar="NAME", help="What the run's folder is called, if not after the recipe.")
    ] = "",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Train what a recipe says, then measure what that changed.

    \b
    Examples:
      tinylora train demo
      tinylora train demo --set optim.lr=0.02 --set train.seed=1
      tinylora train my.toml --dry-run
      tinylora train demo --control format                 what a reward for the format alone would do
      tinylora train --resume runs/demo-001 --set train.steps=200
    """
    if resume is not None:
        if recipe is not None or dry_run or control is not Control.none or name:
            raise UserError(
                "--resume goes on with a run as it is: give no recipe, --dry-run, --control or --name with it"
            )
        _settle(resume, trust)
        from tinylora.training.train import resume as resume_run

        with _resumable(lambda: resume):
            result = resume_run(resume, set_ or [], say=say)
    else:
        if trust:
            raise UserError("--trust goes with --resume; a recipe that you name is taken as it is")
        if recipe is None:
            raise UserError("name a recipe, such as: tinylora train demo (tinylora recipes lists them)")
        from tinylora.config.recipe import load_recipe, recipe_name
        from tinylora.system.folders import check_name

        if name:
            check_name(name, "--name")
        as_control = [] if control is Control.none else [f"train.control={control.value}"]
        config = load_recipe(recipe, [*(set_ or []), *as_control])
        if dry_run:
            from tinylora.planning.inspection import inspect_shapes

            print_inspection(config, *inspect_shapes(config, say), as_json=as_json)
            return
        from tinylora.training.train import train as train_run

        name = name or recipe_name(recipe) + ("" if control is Control.none else f"-{control.value}")
        before = _runs(out, name)
        with _resumable(lambda: next(iter(_runs(out, name) - before), None)):
            result = train_run(config, out=out, name=name, say=say)
    _print_run(result, as_json)


def _settle(run: Path, trust: bool) -> None:
    """Take the run's settings for this user's own where --trust or an answer says so; `resume` refuses them else."""
    from tinylora.store.own import ask_on_terminal, settle_run
    from tinylora.store.run_folder import RunFolder

    if (run / "config.toml").is_file():
        settle_run(run, RunFolder.open(run).read_config(), trust=trust, ask=ask_on_terminal, say=say)


def _runs(out: Path, name: str) -> set[Path]:
    return set(out.glob(f"{name}-[0-9]*")) if out.is_dir() else set()


@contextmanager
def _resumable(run: Callable[[], Path | None]) -> Iterator[None]:
    """On Ctrl-C, SIGTERM and SIGHUP, say how to go on with `run()`."""

    def how() -> str:
        return f"go on with: {shell_line('tinylora', 'train', '--resume', folder)}" if (folder := run()) else ""

    with going_on(how):
        try:
            yield
        except KeyboardInterrupt as stop:
            words = f"interrupted; {how()}" if how() else "interrupted before the run began; nothing was written"
            last_word(f"tinylora: {words}")
            raise typer.Exit(exit_code(stop)) from None


def _print_run(done: "TrainResult", as_json: bool) -> None:
    if as_json:
        from tinylora.evaluation.verdict import MOST_NUMBERS

        facts = {"run": str(done.run), "steps": done.steps, "seconds": done.seconds}
        v = done.v.flatten().tolist() if done.v.numel() <= MOST_NUMBERS else None  # they are in the run's folder
        print_json({**facts, "v": v, "result": done.result})
        return
    if done.result is not None:
        from tinylora.evaluation.verdict import format_result

        show(format_result(done.result))
        return
    then = ", ".join(shell_line("tinylora", word, done.run) for word in ("eval", "chat"))
    show(f"saved {done.v.numel():,} numbers in {done.run}; next: {then}")
