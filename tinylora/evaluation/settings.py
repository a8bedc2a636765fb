"""Under which settings an adapter is evaluated: those of its training, or of another task, and what is refused."""

from collections.abc import Sequence
from dataclasses import fields, replace

from tinylora.config.located import located
from tinylora.config.recipe import apply_overrides, load_recipe, parse_recipe
from tinylora.config.run import RunConfig
from tinylora.config.strangers import SAFE_SCORERS
from tinylora.errors import UserError
from tinylora.talk import Say
from tinylora.tasks.base import Item
from tinylora.tasks.build import build_task
from tinylora.tasks.config import PromptConfig, TaskConfig
from tinylora.tasks.sets.public_sets import HAVE_DEFAULTS, PUBLIC


def settings_for_eval(
    trained: RunConfig,
    task: str = "",
    overrides: Sequence[str] = (),
    *,
    is_bare: bool = False,
    is_own: bool = True,
) -> RunConfig:
    """The settings a run was trained with, changed to what is to be evaluated.

    `task`: the run's own, which changes nothing; another task's name (a public set, jsonl, reasoning_gym:NAME), asked
    under its own prompt, scorer and budget or their defaults, as the run's were made for other questions; or a recipe,
    which brings its [task], [prompt] and the end of a reply (generation.max_new_tokens, stop_strings). Device and
    threads are those of this machine.
    is_bare: the adapter says nothing of its training; a recipe then brings [generation] and [eval], too.
    is_own: whether `trained` is this user's own; of a stranger's, a task that is named here keeps nothing, and another
    scorer takes no options.
    Raises: UserError for an unknown task, recipe or key.
    """
    config = replace(
        trained,
        model=replace(trained.model, device="auto"),
        train=replace(trained.train, num_threads=0),
    )
    if task and (task != config.task.name or not is_own):
        if task in HAVE_DEFAULTS or task == "jsonl" or task.startswith("reasoning_gym:"):
            config = _with_protocol(config, parse_recipe(f'[task]\nname = "{task}"', task))
        else:
            recipe = load_recipe(task)
            config = _with_protocol(config, recipe)
            if is_bare:
                config = replace(config, generation=recipe.generation, eval=recipe.eval)
    if not is_own and not task and any(one.partition("=")[0].strip() == "task.scorer" for one in overrides):
        config = replace(config, task=replace(config.task, scorer_options={}))
    return apply_overrides(config, overrides)


def _with_protocol(config: RunConfig, recipe: RunConfig) -> RunConfig:
    """`config` with the questions, the prompt and the end of a reply (budget, stop strings) of `recipe`.

    The day that prompts show stays that of `config`, unless the recipe names one: the adapter saw no other.
    """
    ends = recipe.generation
    prompt = replace(recipe.prompt, date=recipe.prompt.date or config.prompt.date)
    generation = replace(config.generation, max_new_tokens=ends.max_new_tokens, stop_strings=ends.stop_strings)
    return replace(config, task=recipe.task, prompt=prompt, generation=generation)


def other_protocol(trained: RunConfig, config: RunConfig) -> list[str]:
    """Which of task, prompt and end of a reply are not as in training, by their dotted names."""
    ends = ("max_new_tokens", "stop_strings")
    trained, config = located(trained), located(config)  # one file has many names
    changed = [f"task.{one.name}" for one in fields(TaskConfig) if _differ(trained.task, config.task, one.name)]
    changed += [
        f"prompt.{one.name}" for one in fields(PromptConfig) if _differ(trained.prompt, config.prompt, one.name)
    ]
    return changed + [f"generation.{one}" for one in ends if _differ(trained.generation, config.generation, one)]


def _differ(one: object, other: object, name: str) -> bool:
    return bool(getattr(one, name) != getattr(other, name))


def check_held_out(
    trained: RunConfig, config: RunConfig, items: Sequence[Item], say: Say, *, is_own: bool = True
) -> None:
    """Raises: UserError if test items are among those that the run was trained or validated on.

    They can be where both take the same kind of source, but split or generate it otherwise. Public sets, whose test
    questions are files of their own, and a source of another name are not looked at. Where the run's data is not here,
    `say` tells that it was not compared; nor are a stranger's (`is_own` false), where the settings name a file.
    """
    own = located(trained).task
    config = replace(config, task=located(config).task)
    if config.task.name != own.name or config.task == own or own.name in PUBLIC:
        return
    if not is_own and own.path:
        say("whether it was trained on these test items is not known: it names a file of data, which is not read")
        return
    if own.scorer not in SAFE_SCORERS:  # questions are all that counts, and no code has to run for them
        own = replace(own, scorer=config.task.scorer, scorer_options=config.task.scorer_options)
    try:
        task = build_task(own, PromptConfig())
    except UserError as error:
        say(f"whether the run was trained on these test items is not known: {error}")
        return
    seen = {item.id for split in ("train", "validation") for item in task.items(split)}
    if known := sum(item.id in seen for item in items):
        raise UserError(
            f"{known:,} of these {len(items):,} test items are among those that the run was trained or validated on "
            f"(its task.test_share is {own.test_share:g}, here it is {config.task.test_share:g}); leave the settings "
            "of the split as they were, or name other data"
        )


def check_base_kept(trained: RunConfig, config: RunConfig) -> None:
    """Raises: UserError if the adapter itself was changed: its numbers have a meaning under their own settings only."""
    if config.adapter != trained.adapter:
        raise UserError("adapter settings cannot be changed for a trained adapter; leave --set adapter.* out")
    if config.method != trained.method:
        raise UserError("the method of a trained adapter cannot be changed; leave --set method.* out")
