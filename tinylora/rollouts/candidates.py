"""The prompts under which a run's questions may be asked: its own, and the alternatives that are tried untrained."""

from collections.abc import Callable
from dataclasses import replace

from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.tasks.base import Item, Message
from tinylora.tasks.prompt import Prompt


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
