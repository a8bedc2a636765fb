"""What else the untrained model may be given: other prompts, a larger token budget."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.rollouts.runtime import Runtime
from tinylora.tasks.base import Item, Message
from tinylora.tasks.prompt import Prompt

BUDGET_FACTOR = 4


def prompt_candidates(config: RunConfig) -> dict[str, Callable[[Item], list[Message]]]:
    """The run's own prompt and the recipe's alternatives (eval.prompts), by name.

    Raises: UserError for an alternative with an unknown key, without a name, or with the name of another.
    """
    candidates = {"own": Prompt(config.prompt)}
    for number, table in enumerate(config.eval.prompts, 1):
        unknown = set(table) - {"name", "system", "template", "pattern", "few_shot"}
        if unknown or "name" not in table or table.get("few_shot", "yes") not in ("yes", "no"):
            raise UserError(
                f"eval.prompts[{number - 1}] has {sorted(table)}; allowed: name (required), system, template, pattern, "
                "few_shot ('yes' keeps the recipe's examples, 'no' leaves them out)"
            )
        if table["name"] in candidates:
            raise UserError(
                f"eval.prompts[{number - 1}] has the name {table['name']!r}, which another prompt has "
                "('own' is the run's); give each a name of its own"
            )
        candidates[table["name"]] = Prompt(
            replace(
                config.prompt,
                system=table.get("system", config.prompt.system),
                template=table.get("template", config.prompt.template),
                pattern=table.get("pattern", config.prompt.pattern),
                few_shot=config.prompt.few_shot if table.get("few_shot", "yes") == "yes" else (),
            )
        )
    return {name: (lambda item, p=prompt: p.messages(item.question)) for name, prompt in candidates.items()}  # type: ignore[misc]


def larger_budget(runtime: Runtime, items: Sequence[Item]) -> int:
    """BUDGET_FACTOR times the token budget, or what the engine has memory for with the longest of these prompts."""
    config, task = runtime.config, runtime.task
    prompts = (len(runtime.encode(task.prompt(item))) for item in items)
    room = min((runtime.engine.room_for_reply(length) for length in prompts), default=0)
    return max(config.generation.max_new_tokens, min(BUDGET_FACTOR * config.generation.max_new_tokens, room))


def larger_budget_in_words(tokens: int, budget: int) -> str:
    """How the larger of two token budgets is called."""
    if tokens == BUDGET_FACTOR * budget:
        return f"{BUDGET_FACTOR} x the token budget"
    return f"{tokens:,} tokens instead of {budget:,} (all that generation.kv_budget_gib holds)"
