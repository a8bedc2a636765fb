"""The reply to an item that supervised learning takes as right: a template with the item's answer in it."""

import re

from tinylora.errors import UserError
from tinylora.tasks.base import Item, Task, shorten

PLACE = re.compile(r"(\\[A-Za-z]+(?:\{[^{}]*\})*)?\{([A-Za-z_]\w*)\}")
"""A name in braces, and the LaTeX command in front of it, if there is one."""


def reference_reply(task: Task, item: Item, template: str) -> str:
    """The reply that sft learns: `template` with {question} (the user's last turn), {answer} and {NAME} of what the
    item brings beside them, such as {solution}.

    The argument of a LaTeX command, as in \\mathrm{cm}, is no name; \\boxed{{answer}} is one in an argument.
    Raises: UserError for a name that the item does not have.
    """
    plain = {key: str(value) for key, value in item.metadata.items() if isinstance(value, (str, int, float))}
    known = {**plain, "answer": item.answer, "question": task.prompt(item)[-1]["content"]}

    def value(match: re.Match[str]) -> str:
        command, name = match.groups()
        if name not in known:
            if command:
                return match[0]
            raise UserError(
                f"sft.target asks for {{{name}}}, and the question {shorten(item.question, 80)} has none; it has "
                f"{', '.join(sorted(known))}"
            )
        return (command or "") + known[name]

    return PLACE.sub(value, template)
