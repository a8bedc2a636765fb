"""sweep: a grid of trainings, and what came out of it."""

import signal
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinylora.cli.child import command
from tinylora.cli.common import Json, Trust, app, last_word, print_json, verb
from tinylora.errors import UserError
from tinylora.system.interrupts import exit_code, going_on, listening
from tinylora.talk import say_to_stderr as say
from tinylora.talk import shell_line, show

if TYPE_CHECKING:
    from tinylora.sweeps.driver import Driver
    from tinylora.sweeps.plan import Sweep


@app.command()
@verb
def sweep(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="A .toml file, or the name of one that comes along.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where it runs, and goes on; runs/sweep-NAME without it.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(metavar="N", help="Trainings at a time; 0 takes one for each core, on a GPU one.")
    ] = 0,
    until: Annotated[
        str, typer.Option(metavar="HH:MM", help="Begin nothing after the next time it is that late.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run, and what is there; run nothing.")
    ] = False,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Train and evaluate a grid of settings and seeds. All of it goes into FOLDER/results.json.

    \b
    Examples:
      tinylora sweep dial-small --dry-run
      tinylora sweep my-sweep.toml --out runs/mine --jobs 2 --until 7:30
      tinylora sweep my-sweep.toml --out runs/mine          the same again goes on where it was stopped
      tinylora figure runs/mine/results.json                the picture of it
    """
    from tinylora.sweeps.driver import Driver
    from tinylora.sweeps.plan import check_same, find_sweep, load_sweep
    from tinylora.system.cores import available_threads
    from tinylora.system.folders import folder_name

    path = find_sweep(sweep)
    plan = load_sweep(path)
    folder = out or Path("runs") / f"sweep-{folder_name(path.stem, 'sweep')}"
    deadline = next_time(until, datetime.now()) if until else None
    if jobs < 0:
        raise UserError(f"--jobs must be at least 1, or 0 for one each core, got {jobs}")
    cores = available_threads()
    jobs = jobs or (1 if _on_gpu(plan) else cores)
    driver = Driver(
        plan, folder, jobs=jobs, threads=max(1, cores // jobs), command=command(), say=say, until=deadline, trust=trust
    )
    check_same(plan, folder)
    if dry_run:
        driver.look()
        _print_plan(plan, driver, as_json)
        return
    say(_head(plan, driver) + (f"; nothing is begun after {deadline:%Y-%m-%d %H:%M}" if deadline else ""))
    how = f"go on with: {shell_line('tinylora', 'sweep', sweep, *(['--out', out] if out else []))}"
    try:
        # The first signal stops the children, a second one ends them. Ctrl-C works in the background, too.
        with listening(times=2, even_ignored=(signal.SIGINT,)), going_on(lambda: how):
            results = driver.run()
    except KeyboardInterrupt as stop:
        last_word(f"tinylora: interrupted; {how}")
        raise typer.Exit(exit_code(stop)) from None
    if as_json:
        print_json(results)
    else:
        show(format_results(results))
        say(f"saved {folder / 'results.json'}; next: {shell_line('tinylora', 'figure', folder / 'results.json')}")
    if results["failed"]:
        for one in results["failed"]:
            say(f"failed: {one['run']} ({one['stage']}, exit code {one['code']}), see {folder / one['run']}/talk.txt")
        say("the same command tries what failed again")
        raise typer.Exit(1)


def next_time(text: str, now: datetime) -> datetime:
    """The next moment at which it is HH:MM. Raises: UserError if that is no time of day."""
    try:
        hour, minute = (int(part) for part in text.split(":"))
        moment = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    except ValueError:
        raise UserError(f"--until must be a time of day such as 7:30 or 23:00, got {text!r}") from None
    return moment if moment > now else moment + timedelta(days=1)


def _on_gpu(plan: "Sweep") -> bool:
    if plan.base.model.device == "cpu":
        return False
    from tinylora.system.device import resolve_device

    return resolve_device(plan.base.model.device).type != "cpu"


def _counts(plan: "Sweep", driver: "Driver") -> dict[str, int]:
    states = driver.states.values()
    return {
        "cells": len(plan.cells),
        "trainings": sum(cell.num_trainings() for cell in plan.cells),
        "evaluations": sum(len(cell.seeds) * len(cell.projection_seeds) for cell in plan.cells),
        "trained": sum(state.trained for state in states),
        "evaluated": sum(state.evaluated for state in states),
    }


def _head(plan: "Sweep", driver: "Driver") -> str:
    driver.look()
    count = _counts(plan, driver)
    there = f" ({count['trained']} and {count['evaluated']} of them are there)" if count["trained"] else ""
    threads = "1 thread" if driver.threads == 1 else f"{driver.threads} threads"
    return (
        f"{count['cells']} cells: {count['trainings']} trainings and {count['evaluations']} evaluations{there}, "
        f"{driver.jobs} at a time with {threads} each, in {driver.folder}; {driver.time_left()}"
    )


def _print_plan(plan: "Sweep", driver: "Driver", as_json: bool) -> None:
    rows: list[dict[str, Any]] = []
    for cell in plan.cells:
        chosen, _ = driver.standing(cell)
        config = plan.config(cell.candidates()[0] if chosen is None else cell.runs(chosen)[0])
        per_step = config.grpo.prompts_per_step * config.grpo.group_size
        runs = cell.runs(chosen) if chosen is not None else []
        rows.append({
            "name": cell.name, "method": config.method.name, "algorithm": config.train.algorithm,
            "set": list(cell.set), "seeds": list(cell.seeds), "projection_seeds": list(cell.projection_seeds),
            "choose": {key: list(values) for key, values in cell.choose.items()},
            "trainings": cell.num_trainings(), "samples": config.train.steps * per_step,
            "evaluated": sum(driver.states[run.path].evaluated for run in runs),
        })  # fmt: skip
    if as_json:
        print_json({**_counts(plan, driver), "jobs": driver.jobs, "threads": driver.threads, "plan": rows})
        return
    show(_head(plan, driver))
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        tried = "".join(f"; {key} of {', '.join(map(str, values))}" for key, values in row["choose"].items())
        runs_ = len(row["seeds"]) * len(row["projection_seeds"])
        show(
            f"  {row['name']:<{width}}  {row['method']} {row['algorithm']}, {row['trainings']} trainings of "
            f"{row['samples']:,} samples, {row['evaluated']}/{runs_} evaluated{tried}"
        )


def format_results(results: dict[str, Any]) -> str:
    """One line a cell, for people."""
    share = lambda value: f"{100 * value:5.1f}"  # noqa: E731
    lines = [
        f"untrained: strict {share(one['strict']['correct'] / one['strict']['total'])} %, value only "
        f"{share(one['value_only']['correct'] / one['value_only']['total'])} % of {one['strict']['total']} test items"
        for one in results["untrained"].values()
    ]
    width = max(len(cell["name"]) for cell in results["cells"])
    lines.append(f"{'cell':<{width}}     numbers  runs  strict % (min to max)    value only %  chosen")
    for cell in results["cells"]:
        total = len(cell["runs"])
        if cell["summary"] is None:
            words = sorted({run["state"] for run in cell["runs"]})
            lines.append(f"{cell['name']:<{width}}  {'':>10}  0/{total}  {', '.join(words)}")
            continue
        strict, value = cell["summary"]["strict"], cell["summary"]["value_only"]
        chosen = ", ".join(f"{key}={one}" for key, one in (cell["chosen"] or {}).items())
        lines.append(
            f"{cell['name']:<{width}}  {cell['trained_numbers']:>10,}  {cell['summary']['num_runs']}/{total}   "
            f"{share(strict['mean'])} ({share(strict['min'])} to {share(strict['max'])})   {share(value['mean'])}"
            f"         {chosen}"
        )
    return "\n".join(lines)
