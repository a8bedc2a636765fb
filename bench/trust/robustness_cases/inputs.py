# ruff: noqa: E501 (tables of inputs, a line each)
"""An input: its name, the right outcome in words, and the trial that finds out. And the judge of all of them."""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.trust.robustness_cases.children import Came, Child
from bench.trust.robustness_cases.world import World

Words = str | tuple[str, ...]
"""A part of a text, or several of which one will do; case counts nothing."""


class Wrong(Exception):
    """Another outcome than the right one; the message says which."""


class Skip(Exception):
    """This machine does not allow the trial; the message says why."""


@dataclass(frozen=True, slots=True)
class Score:
    """A reply to one question, and what a scorer is to say of it."""

    scorer: str
    gold: str | dict[str, Any]
    reply: str
    strict: float | None
    """None: the gold is to be refused when the file is read."""
    value_only: float | None = None
    """None: not asked."""
    options: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    """Other keys of the row."""
    says: tuple[Words, ...] = ()
    raw: str = ""
    """The line itself, where JSON of ours would not do."""


@dataclass(frozen=True, slots=True)
class Input:
    """One thing to try."""

    name: str
    right: str
    trial: "Callable[[Trial], None] | None" = None
    score: Score | None = None


INPUTS: list[Input] = []


def put(one: Input) -> None:
    """On the list, under a name of its own."""
    assert all(one.name != other.name for other in INPUTS), f"two inputs are called {one.name!r}"
    INPUTS.append(one)


def tried(name: str, right: str) -> "Callable[[Callable[[Trial], None]], Callable[[Trial], None]]":
    """A function is the trial of an input."""

    def taken(trial: "Callable[[Trial], None]") -> "Callable[[Trial], None]":
        put(Input(name, right, trial))
        return trial

    return taken


def has(text: str, words: Words) -> bool:
    return any(one.lower() in text.lower() for one in ([words] if isinstance(words, str) else words))


class Trial:
    """What a trial has: a folder, a world of models and data, children, and the means to say that something is wrong."""

    def __init__(self, world: World, folder: Path, fresh: bool) -> None:
        self.world, self.folder, self.fresh = world, folder, fresh
        self.came: list[Came] = []

    def run(self, *arguments: str | Path, env: dict[str, str | None] | None = None, **more: Any) -> Came:
        """The command line in this trial's folder; `more` are fields of Child."""
        environment = {**os.environ, **(env or {})}
        child = Child(
            arguments=tuple(map(str, arguments)),
            folder=more.pop("folder", self.folder),
            environment={name: value for name, value in environment.items() if value is not None},
            **{"fresh": self.fresh, **more},
        )
        came = child.run(self.folder.parent / f"{self.folder.name}.streams")
        self.came.append(came)
        return came

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def recipe(self, name: str = "t.toml", *, model: str | Path = "", **sections: Any) -> Path:
        """The tiny recipe, on the tiny Llama unless another is named, with its questions beside it."""
        if not (self.folder / "sums.jsonl").exists():
            self.write("sums.jsonl", self.world.sums())
            self.write("shaped.py", self.world.reward())
        return self.write(name, self.world.recipe(model or self.world.model("llama"), **sections))

    def trained(self, **sections: Any) -> Path:
        """A finished run of this trial's own, in runs/t-001."""
        self.recipe(**sections)
        self.done(self.run("train", "t.toml"), "training the run that is tried")
        return self.folder / "runs" / "t-001"

    # --- verdicts ---

    def check(self, ok: object, why: str) -> None:
        if not ok:
            raise Wrong(why)

    def done(self, came: Came, what: str = "") -> Came:
        self._ended(came)
        self.check(came.code == 0, f"exit code {came.code}, not 0{f' ({what})' if what else ''}: {tail(came)}")
        return came

    def refused(self, came: Came, *says: Words, within_gb: float = 0.0, code: int = 2) -> Came:
        """Exit code 2, and a sentence that has all of these words."""
        self._ended(came)
        self.check(came.code == code, f"exit code {came.code}, not {code}: {tail(came)}")
        self.says(came, *says)
        if within_gb:
            used = came.peak_bytes / 1e9
            self.check(used <= within_gb, f"it took {used:.1f} GB to say so, not {within_gb:g}")
        return came

    def says(self, came: Came, *says: Words) -> None:
        for words in says:
            self.check(has(came.err + came.out, words), f"it does not say {words!r}: {tail(came)}")

    def silent(self, came: Came, *words: str) -> None:
        for one in words:
            self.check(one not in came.err + came.out, f"it says {one!r}: {tail(came)}")

    def _ended(self, came: Came) -> None:
        self.check(not came.hung, f"no end after {came.seconds:.0f} s: {tail(came)}")
        self.check("Traceback (most recent" not in came.err, f"a traceback: {tail(came)}")


def tail(came: Came) -> str:
    """The last of what it said, on one line."""
    lines = [line.strip() for line in (came.err if came.err.strip() else came.out).splitlines() if line.strip()]
    return " / ".join(lines[-2:])[-500:]


class Judge:
    """Runs inputs one after the other, each in a folder of its own."""

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        self.folder, self.fresh = folder, fresh
        self.world = World(folder / "world")

    def rows(self, chosen: Sequence[Input]) -> Iterator[dict[str, Any]]:
        """A row an input, the scored ones last."""
        if not self.fresh and any(one.trial for one in chosen):
            self.world.warm_up()
        for number, one in enumerate(one for one in chosen if one.trial):
            yield self._try(one, self.folder / f"input-{number:03d}")
        scored = [one for one in chosen if one.score]
        if scored:
            from bench.trust.robustness_cases.scoring import score_all

            yield from score_all(scored, self.folder)

    def _try(self, one: Input, folder: Path) -> dict[str, Any]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        trial = Trial(self.world, folder, self.fresh)
        started = time.monotonic()
        verdict, why = "right", ""
        try:
            assert one.trial is not None
            one.trial(trial)
        except Wrong as wrong:
            verdict, why = "wrong", str(wrong)
        except Skip as skip:
            verdict, why = "skipped", str(skip)
        except Exception as error:  # what it was to leave is not there, or not what it was to be
            verdict, why = "wrong", f"{type(error).__name__}: {error}"
        if verdict == "right" and any(came.hung for came in trial.came):
            verdict, why = "wrong", "a child had no end"
        broken = [came for came in trial.came if came.traceback]
        if broken and verdict == "right":
            verdict, why = "wrong", f"exit code {broken[0].code}: {tail(broken[0])}"
        return {
            "name": one.name, "right": one.right, "verdict": verdict, "why": why.replace(str(self.folder), "."),
            "commands": [came.command.replace(str(self.folder), ".") for came in trial.came],
            "codes": [came.code for came in trial.came], "traceback": bool(broken),
            "hung": any(came.hung for came in trial.came), "seconds": round(time.monotonic() - started, 1),
            "cpu_seconds": round(sum(came.cpu_seconds for came in trial.came), 1),
        }  # fmt: skip


def scored(point: str, *rows: tuple[Any, ...], **common: Any) -> None:
    """Inputs from a table: (scorer, gold, reply, strict[, value_only]); strict None is a gold to be refused."""
    for row in rows:
        scorer, gold, reply, strict, *rest = row
        one = replace(Score(scorer, gold, reply, strict, rest[0] if rest else None), **common)
        style = "/".join(str(value) for value in one.options.values() if isinstance(value, str) and len(value) < 12)
        label = f"{scorer}/{style}" if style else scorer
        said = " / ".join(reply.split("\n")) if len(reply) < 70 else f"{reply[:66]} ..."
        if strict is None:
            right = "the gold is refused when the file is read"
            name = f"{point} {label}: gold {gold!r}"
        else:
            right = f"strict {strict:g}" + (f", value only {rest[0]:g}" if rest else "")
            name = f"{point} {label}: gold {gold if isinstance(gold, str) else '{...}'!r}, reply {said!r}"
        put(Input(re.sub(r"\s+", " ", name), right, score=one))
