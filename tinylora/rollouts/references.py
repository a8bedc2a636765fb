"""Reference replies as token ids: what supervised learning is shown behind a prompt."""

from collections.abc import Sequence

from tinylora.models.base import BaseModel
from tinylora.tasks.base import Item, Task
from tinylora.tasks.reference import reference_reply


def reference_tokens(
    base: BaseModel, task: Task, items: Sequence[Item], template: str, end: int
) -> list[tuple[int, ...]]:
    """Token ids of the reference reply to each item, `end` behind them. Raises: UserError as `reference_reply` does."""
    replies = [reference_reply(task, item, template) for item in items]
    found = base.tokenizer(replies, add_special_tokens=False, verbose=False).input_ids if replies else []
    return [(*map(int, ids), end) for ids in found]
