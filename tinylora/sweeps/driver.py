"""Run a sweep: one child process a training or evaluation, as many at a time as there are cores.

A child is the command line itself, so that a crash or a full memory takes one run with it and not the sweep. Which job
is next follows from what the folder holds and the order of the cells; nothing else is remembered.
"""

import math
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from tinylora.config.recipe import load_recipe
from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.sweeps.plan import ITEMS, Cell, Choice, Run, Sweep, check_same
from tinylora.sweeps.results import FILE, Results
from tinylora.sweeps.state import (
    TALK,
    Failure,
    RunState,
    choose,
    read_state,
    untrained_key,
    validation,
    write_state,
)
from tinylora.sweeps.talk import cut_talk, last_lines
from tinylora.system.environment import today
from tinylora.system.failures import writing
from tinylora.system.files import open_to_append
from tinylora.system.progress import Bar
from tinylora.talk import Say, shell_line

NOTHING = RunState(folder=Path(), run=None)
"""The state of a run that nobody has looked at."""
POLL_SECONDS = 0.2
LOOK_SECONDS = 2.0
"""How often it is looked for new jobs while none has ended; looking takes time from the children."""
STOP_SECONDS = 30.0
"""How long interrupted children may take for their last step before they are ended."""


@dataclass(frozen=True, slots=True)
class Job:
    """One child to come: a training (or its resumption) or an evaluation."""

    stage: str
    run: Run

    def describe(self) -> str:
        """In words."""
        return f"{self.run.describe()}: {self.stage}"


@dataclass(slots=True)
class Child:
    """A child at work."""

    job: Job
    process: "subprocess.Popen[bytes]"
    talk: IO[bytes]
    talk_from: int
    started: float
    untrained: str = ""
    """The untrained model's replies that it makes, for which others wait."""


class Driver:
    """Runs a sweep in a folder. `states` and `choices` are what the folder says, kept up to date."""

    def __init__(
        self,
        sweep: Sweep,
        folder: Path,
        *,
        jobs: int,
        threads: int,
        command: Sequence[str],
        say: Say,
        until: datetime | None = None,
        trust: bool = False,
    ) -> None:
        """command: what starts `tinylora` in a process that ends with this one; the verb and its words follow.

        trust: runs in the folder that this user has not made are taken as if (see `tinylora.store.own`).
        """
        self.trust = ["--trust"] if trust else []
        self.sweep, self.folder, self.command, self.say = sweep, folder, command, say
        self.jobs, self.threads, self.until = jobs, threads, until
        self.results = Results(sweep, folder)
        self.states: dict[str, RunState] = {}
        self.choices: dict[str, tuple[Choice | None, list[dict[str, Any]]]] = {}
        self.children: list[Child] = []
        self._tried: set[str] = set()
        """Runs that failed in this call; those of an earlier one are tried again."""
        self._waiting = False
        """Whether a run cannot go on yet because another process trains in it."""
        self._waited: set[Path] = set()

    # --- the loop ---

    def run(self) -> dict[str, Any]:
        """Run what is missing; the results, also in results.json. On Ctrl-C children are stopped and it is raised on.

        Raises: UserError for a folder of another sweep, one that another process works in, or that cannot be written.
        """
        with writing(self.folder, "name another folder with --out"):
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock():
            self._begin_or_go_on()
            try:
                with Bar("sweep", 0, "jobs", timed=False) as bar:
                    return self._loop(bar)
            finally:
                self._stop()

    def _begin_or_go_on(self) -> None:
        from tinylora.system.files import write_atomically

        before = check_same(self.sweep, self.folder)
        if before is None:
            self._begin()
        elif before.num_items != self.sweep.num_items:
            write_atomically(self.folder / "sweep.toml", self.sweep.text().encode())
            self.say(
                f"{self.sweep.num_items} test items from now on ({before.num_items} before; nothing is evaluated yet)"
            )

    def _begin(self) -> None:
        from tinylora.system.files import write_atomically

        others = [path.name for path in self.folder.iterdir() if not path.name.startswith(".lock")]
        if others:
            raise UserError(f"{self.folder} is not empty and holds no sweep (it has {others[0]}); name another folder")
        text = self.sweep.on_day(today()).recipe_text()  # of all cells, however many days they take
        write_atomically(self.folder / f"{self.sweep.name}.toml", text.encode())
        write_atomically(self.folder / "sweep.toml", self.sweep.text().encode())  # last: it says that the folder is one

    def _loop(self, bar: Bar) -> dict[str, Any]:
        self.look()
        self._show(bar)
        told_late = False
        looked = -LOOK_SECONDS
        while True:
            if time.monotonic() - looked >= LOOK_SECONDS:
                jobs, looked = list(self._jobs()), time.monotonic()
            late = self.until is not None and datetime.now() >= self.until
            if late and jobs and not told_late:
                self.say(f"it is past {self.until:%H:%M}: nothing new is begun, what runs is waited for")
                told_late = True
            if not late:
                while jobs and len(self.children) < self.jobs:
                    self._start(jobs.pop(0))
            self._bound_talk()
            ended = [child for child in self.children if child.process.poll() is not None]
            if not ended:
                if not self.children and (late or not (jobs or self._waiting)):
                    break
                time.sleep(POLL_SECONDS)
                continue
            for child in ended:
                self._end(child)
            self._write()
            self._show(bar)
            looked = -LOOK_SECONDS
        return self._write()

    def look(self) -> None:
        """Read the folder."""
        for cell in self.sweep.cells:
            for run in cell.candidates():
                self._state(run)
            chosen, _ = self.standing(cell)
            if chosen is not None:
                for run in cell.runs(chosen):
                    self._state(run)

    def standing(self, cell: Cell) -> tuple[Choice | None, list[dict[str, Any]]]:
        """The choice that results tell of: what was chosen; while a candidate that had failed is tried again, what the
        cell was evaluated with before.
        """
        chosen, rows = self._choose(cell.name)
        if chosen is None:
            candidates = cell.candidates()
            before, _ = choose(candidates, [self._state(run) for run in candidates])
            if before is not None and any(self._state(run).evaluated for run in cell.runs(before)):
                return before, rows
        return chosen, rows

    def _state(self, run: Run) -> RunState:
        if run.path not in self.states:
            self.states[run.path] = read_state(self.folder / run.path)
        return self.states[run.path]

    def _choose(self, name: str) -> tuple[Choice | None, list[dict[str, Any]]]:
        """What validation chose for a cell; None until every candidate has been trained or has failed."""
        cell = next(one for one in self.sweep.cells if one.name == name)
        if not cell.choose:
            self.choices[name] = ((), [])
        elif self.choices.get(name, (None, []))[0] is None:
            candidates = cell.candidates()
            states = [self._state(run) for run in candidates]
            chosen, rows = choose(candidates, states)
            open_ = any(not s.trained and r.path not in self._tried for r, s in zip(candidates, states, strict=True))
            self.choices[name] = (None if open_ else chosen, rows)
        return self.choices[name]

    def _jobs(self) -> Iterator[Job]:
        """What could begin now, in the order of worth: a cell's candidates, then its runs, then the next cell's."""
        busy = {child.job.run.path for child in self.children}
        makes = {child.untrained for child in self.children if child.untrained}
        self._waiting = False
        for cell in self.sweep.cells:
            chosen, _ = self._choose(cell.name)
            runs = cell.candidates() if chosen is None else cell.runs(chosen)
            for run in runs:
                state = self._state(run)
                if run.path in busy or run.path in self._tried:
                    continue
                if not state.trained:
                    if self._is_free(state):
                        yield Job("training", run)
                elif chosen is not None and not state.evaluated:
                    missing = self._untrained_to_make(state)
                    if missing not in makes:
                        makes |= {missing} - {""}
                        yield Job("evaluation", run)

    def _is_free(self, state: RunState) -> bool:
        """Whether no process trains in the run folder: one left by a killed sweep takes a moment to end."""
        if state.run is None or not (state.run / ".lock").exists():
            return True
        lock = FileLock(state.run / ".lock", fallback_to_soft=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if state.run not in self._waited:
                self.say(f"waiting for the process that still trains in {state.run}")
                self._waited.add(state.run)
            self._waiting = True
            return False
        lock.release()
        return True

    def _untrained(self, state: RunState) -> Path:
        assert state.run is not None
        key = untrained_key(load_recipe(str(state.run / "config.toml")), self.sweep.num_items)
        return self.folder / "untrained" / f"{key}.jsonl"

    def _untrained_to_make(self, state: RunState) -> str:
        path = self._untrained(state)
        return "" if path.exists() else path.name

    # --- children ---

    def _words(self, job: Job) -> list[str]:
        """The command of a job."""
        state = self.states[job.run.path]
        if job.stage == "training":
            if state.run is not None:
                return ["train", "--resume", str(state.run), *self.trust]
            settings = [*job.run.settings(), f"train.num_threads={self.threads}", "eval.num_test=0"]
            sets = [word for one in settings for word in ("--set", one)]
            return ["train", str(self.folder / f"{self.sweep.name}.toml"), "--out", str(state.folder), *sets]
        assert state.run is not None
        device = load_recipe(str(state.run / "config.toml")).model.device
        return [
            "eval", str(state.run), "--num-items", str(self.sweep.num_items),
            "--items", str(state.folder / ITEMS), "--force",
            "--untrained", str(self._untrained(state)),
            "--set", f"train.num_threads={self.threads}", "--set", f"model.device={device}", *self.trust,
        ]  # fmt: skip

    def _start(self, job: Job) -> None:
        state = self.states[job.run.path]
        state.folder.mkdir(parents=True, exist_ok=True)
        if state.failure is not None:  # of an earlier call: tried again
            state = self.states[job.run.path] = write_state(replace(state, failure=None))
        words = self._words(job)
        talk = os.fdopen(open_to_append(state.folder / TALK), "ab")
        talk.write(f"$ {shell_line('tinylora', *words)}\n".encode())
        talk.flush()
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [*self.command, *words],
            stdin=subprocess.PIPE, stdout=talk, stderr=talk, env=environment,
            start_new_session=True,  # Ctrl-C comes to us alone; we then stop them one by one
        )  # fmt: skip
        makes = self._untrained_to_make(state) if job.stage == "evaluation" else ""
        self.children.append(Child(job, process, talk, talk.tell(), time.monotonic(), makes))
        resumed = " goes on" if job.stage == "training" and state.run is not None else ""
        self.say(f"{job.describe()}{resumed}")

    def _end(self, child: Child) -> None:
        """Take down how a child ended."""
        code, job = child.process.returncode, child.job
        self._close(child)
        cut_talk(self.folder / job.run.path / TALK)
        seconds = round(time.monotonic() - child.started, 1)
        found = read_state(self.folder / job.run.path)
        if job.stage == "training" and code == 0:
            state = replace(found, trained=True, train_seconds=seconds)
        elif job.stage == "evaluation" and code == 0:
            state = replace(found, evaluated=True, eval_seconds=seconds)
        else:
            lines = tuple(last_lines(found.folder / TALK, child.talk_from))
            state = replace(found, failure=Failure(stage=job.stage, code=code, lines=lines))
            self._tried.add(job.run.path)
        state = self.states[job.run.path] = write_state(state)
        self._choose(job.run.cell.name)
        if state.failure is not None:
            because = f": {state.failure.lines[-1]}" if state.failure.lines else ""
            self.say(f"{job.describe()} FAILED after {clock(seconds)} (exit code {code}){because}")
        else:
            self.say(f"{job.describe()} done in {clock(seconds)}{self._score(job, state)}; {self.time_left()}")

    def _score(self, job: Job, state: RunState) -> str:
        if job.stage == "training":
            score = validation(state.run) if state.run is not None else None
            return f", validation reward {score['reward']:.3f}" if score else ""
        return ""

    def _bound_talk(self) -> None:
        """Cut what children have printed too much of."""
        for child in self.children:
            cut_talk(self.folder / child.job.run.path / TALK)

    def _close(self, child: Child) -> None:
        self.children.remove(child)
        child.talk.close()
        if child.process.stdin is not None:
            child.process.stdin.close()

    def _stop(self) -> None:
        """Interrupt what still runs, wait for its last step, and end what does not end."""
        if not self.children:
            return
        self.say(f"stopping {len(self.children)} children")
        for child in self.children:
            if child.process.stdin is not None:
                child.process.stdin.close()  # which they take for Ctrl-C (child.py)
        deadline = time.monotonic() + STOP_SECONDS
        with suppress(KeyboardInterrupt):  # a second Ctrl-C ends them
            while time.monotonic() < deadline and any(child.process.poll() is None for child in self.children):
                self._bound_talk()
                time.sleep(POLL_SECONDS)
        for child in self.children:
            child.process.kill()  # does nothing to those that have ended
        for child in list(self.children):
            child.process.wait()
            self._close(child)
            self.states[child.job.run.path] = read_state(self.folder / child.job.run.path)
        try:
            self._write()
        except Exception as error:  # such as an import of torch that Ctrl-C cut off; what stopped us is raised on
            self.say(f"{self.folder / FILE} is not up to date ({error}); the same command makes it so")

    @contextmanager
    def _lock(self) -> Iterator[None]:
        lock = FileLock(self.folder / ".lock", fallback_to_soft=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(f"{self.folder} is in use by another sweep; wait for it to end, or stop it") from None
        try:
            yield
        finally:
            lock.release()

    # --- what is known, and what is left ---

    def _write(self) -> dict[str, Any]:
        choices = {cell.name: self.standing(cell) for cell in self.sweep.cells}
        results = self.results.gather(self.states, choices)
        self.results.write(results)
        return results

    def time_left(self) -> str:
        """From finished jobs of the same kind; says so where there are none yet."""
        took, left, _ = self._left()
        return left_in_words(took, left, self.jobs)

    def _show(self, bar: Bar) -> None:
        if bar.is_on:
            took, left, total = self._left()
            seconds, unknown = seconds_left(took, left, self.jobs)
            bar.update(total - sum(left.values()), total, math.nan if unknown else seconds)

    def _left(self) -> tuple[dict[str, list[float]], dict[str, int], int]:
        """By kind of job, the seconds of those that have ended and the number that is left; and how many there are."""
        took: dict[str, list[float]] = {}
        left: dict[str, int] = {}
        total = 0

        def count(name: str, run: Run, seconds: float | None, ended: bool) -> None:
            nonlocal total
            total += 1
            key = f"{name} {kind_of(self.sweep.config(run))}"
            if seconds is not None:
                took.setdefault(key, []).append(seconds)
            left[key] = left.get(key, 0) + (not ended and run.path not in self._tried)

        for cell in self.sweep.cells:
            chosen, _ = self.standing(cell)
            candidates = cell.candidates()
            # Before anything is chosen, the runs that count are taken to be of the first candidate's kind.
            runs = cell.runs(chosen if chosen is not None else candidates[0].chosen)
            judged = {run.path for run in runs}
            for run in {run.path: run for run in [*candidates, *runs]}.values():
                state = self.states.get(run.path, NOTHING)
                count("training", run, state.train_seconds, state.trained)
                if run.path in judged:
                    count("evaluation", run, state.eval_seconds, state.evaluated)
        return took, left, total


def kind_of(config: RunConfig) -> str:
    """Trainings of one kind take about equally long: method, size of its layers, algorithm, steps, samples."""
    size = "" if config.method.name in ("tinylora", "ia3", "full") else f" {config.method.rank}"
    step = config.grpo.prompts_per_step * config.grpo.group_size
    return f"{config.method.name}{size} {config.train.algorithm} {config.train.steps} x {step}"


def seconds_left(took: dict[str, list[float]], left: dict[str, int], jobs: int) -> tuple[float, int]:
    """Of the jobs whose kind has ended before, and the number of the others."""
    unknown = sum(count for kind, count in left.items() if not took.get(kind))
    known = sum(count * sum(took[kind]) / len(took[kind]) for kind, count in left.items() if took.get(kind))
    return known / jobs, unknown


def left_in_words(took: dict[str, list[float]], left: dict[str, int], jobs: int) -> str:
    """The time left of so many jobs of each kind, given the seconds of those that are done."""
    seconds, unknown = seconds_left(took, left, jobs)
    count = sum(left.values())
    if not count:
        return "nothing left"
    if unknown == count:
        return f"time left unknown ({unknown} jobs, none of their kind has ended yet)"
    if unknown:
        return f"time left: {clock(seconds)}, and unknown for {unknown} jobs of kinds none of which has ended yet"
    return f"about {clock(seconds)} left"


def clock(seconds: float) -> str:
    """47 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
