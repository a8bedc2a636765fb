"""From configuration to a task: which source, which scorer."""

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from tinylora.errors import UserError
from tinylora.talk import Say
from tinylora.tasks.config import PromptConfig, TaskConfig
from tinylora.tasks.prompt import Prompt
from tinylora.tasks.scorers.math_verify import MathVerifyScorer
from tinylora.tasks.scorers.python import PythonScorer, load_function
from tinylora.tasks.scorers.reference import split_reference
from tinylora.tasks.scorers.text import (
    BoxedScorer,
    ContainsScorer,
    ExactScorer,
    JsonFieldsScorer,
    NumberScorer,
    RegexScorer,
    Scorer,
)
from tinylora.tasks.sets import jsonl, public, reasoning_gym, writing
from tinylora.tasks.sets.ifeval import IfevalScorer
from tinylora.tasks.sets.mbpp import PythonTestsScorer
from tinylora.tasks.sets.public_sets import PUBLIC
from tinylora.tasks.sets.slots import SlotsScorer
from tinylora.tasks.split import check_shares
from tinylora.tasks.split_task import SplitTask

SCORERS: dict[str, type[Scorer]] = {
    "exact": ExactScorer,
    "number": NumberScorer,
    "boxed": BoxedScorer,
    "regex": RegexScorer,
    "json-fields": JsonFieldsScorer,
    "contains": ContainsScorer,
    "slots": SlotsScorer,
    "writing": writing.WritingScorer,
    "math-verify": MathVerifyScorer,
    "ifeval": IfevalScorer,
    "python-tests": PythonTestsScorer,
}
GYM_PREFIX = "reasoning_gym:"


def build_task(task: TaskConfig, prompt: PromptConfig) -> SplitTask:
    """The task that a run's `task` and `prompt` settings describe.

    Raises: UserError, for every mistake in the settings or the data, before any model is loaded.
    """
    check_shares(task.validation_share, task.test_share)
    checked_prompt = Prompt(prompt)
    source = None
    if task.name.startswith(GYM_PREFIX):
        source = reasoning_gym.Source(task.name.removeprefix(GYM_PREFIX), task.options)
    elif task.name in PUBLIC:
        public_set = PUBLIC[task.name]
        public_set.check_options(task.name, task.options)
        public_set.check_prompt(f"{prompt.system}\n{prompt.template}", task.options)
    elif task.name not in ("jsonl", "writing"):
        raise UserError(
            f"task.name must be {', '.join(PUBLIC)}, writing, jsonl or reasoning_gym:NAME, "
            f"got {task.name!r}{_near_task(task.name)}"
        )
    elif task.options and task.name != "writing":
        raise UserError(
            f"task.options are for reasoning-gym tasks, {task.name} has none; got {', '.join(task.options)}"
        )
    scorer = make_scorer(task.scorer, task.scorer_options, source)
    if source is not None:
        items = reasoning_gym.load(source, task.num_items, task.seed, task.validation_share, task.test_share)
        if not isinstance(scorer, reasoning_gym.ReasoningGymScorer):
            source.entries.clear()  # only the task's own scorer reads them, and boards and grids are big
    elif task.name in PUBLIC:
        items = public.load(PUBLIC[task.name], task.path, task.options, task.validation_share)
    elif task.name == "writing":
        items = writing.load(task.options, task.num_items, task.seed, task.validation_share, task.test_share)
    else:
        items = jsonl.load(
            task.path,
            task.validation_share,
            task.test_share,
            needs_answer=scorer.needs_answer,
            json_answers=isinstance(scorer, JsonFieldsScorer),
            system=prompt.system,
        )
    return SplitTask(task.name, items, checked_prompt, scorer)


def say_what_runs(task: object, say: Say) -> None:
    """Say so where scoring runs code without isolation: each time, so that nobody comes upon it later."""
    scorer = getattr(task, "scorer", None)
    if isinstance(scorer, PythonScorer):
        code = getattr(scorer.function, "__code__", None)
        where = f" of {code.co_filename}" if code is not None else ""
        say(f"scoring runs Python as you, without isolation: {getattr(scorer.function, '__name__', 'a scorer')}{where}")
    if isinstance(scorer, PythonTestsScorer) and not scorer.isolate:
        say(
            "code that the model writes runs here as you, without isolation: it can read and write your files and use "
            "the network (task.scorer_options.unsafe_without_namespaces)"
        )


def make_scorer(name: str, options: Mapping[str, Any], source: reasoning_gym.Source | None = None) -> Scorer:
    """The scorer of this name: one of SCORERS, reasoning-gym (needs `source`), or module:function.

    Raises: UserError for an unknown name or option, or a function that cannot be loaded.
    """
    if name == "reasoning-gym":
        return reasoning_gym.own_scorer(source, options)
    if ":" in name:
        return PythonScorer(load_function(name), options, split_reference(name).module)
    if name not in SCORERS:
        close = get_close_matches(name, SCORERS, n=1, cutoff=0.5)
        raise UserError(
            f"task.scorer must be one of {', '.join(SCORERS)}, reasoning-gym, or module:function, got {name!r}"
            + (f"; did you mean {close[0]!r}?" if close else "")
        )
    scorer = SCORERS[name]
    allowed = [] if scorer.__init__ is object.__init__ else list(inspect.signature(scorer).parameters)
    for option in options:
        if option not in allowed:
            raise UserError(f"scorer {name} has no option {option!r}; it has: {', '.join(allowed) or 'none'}")
    return scorer(**options)


def _near_task(name: str) -> str:
    names = reasoning_gym.gym().factory.DATASETS
    known = [*PUBLIC, "writing", "jsonl", *(GYM_PREFIX + task for task in names)]
    bare = name.replace("-", "_").rpartition(":")[2]
    close = [GYM_PREFIX + bare] if bare in names else get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(close)}?" if close else ""
