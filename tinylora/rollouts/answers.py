"""Complete items and score them: one record an item, from which every reported number is made."""

import hashlib
import re
from collections.abc import Callable, Sequence

from torch import Tensor

from tinylora.generation.engine import Engine
from tinylora.generation.types import Request, SamplingParams
from tinylora.models.base import BaseModel
from tinylora.models.load import encode_prompt
from tinylora.rollouts.replies import ItemResult, score_completion, stop_at
from tinylora.tasks.base import Item, Message, Task


def draw_key(item: Item) -> int:
    """The number that names an item in the random draws: from its id, which is a hash in our own tasks."""
    digest = item.id if re.fullmatch(r"[0-9a-f]{15,}", item.id) else hashlib.sha256(item.id.encode()).hexdigest()
    return int(digest[:15], 16)


def evaluate(
    engine: Engine,
    base: BaseModel,
    task: Task,
    items: Sequence[Item],
    *,
    v: Tensor | None,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = True,
    num_samples: int = 1,
    stop_strings: Sequence[str] = (),
    prompt: Callable[[Item], list[Message]] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[ItemResult]:
    """Complete every item `num_samples` times under v (None: the untrained model), in the order of the items.

    `prompt` replaces the task's own prompt, for comparing prompts. Draws are keyed by the item's id, so the same item
    gets the same random numbers whatever stands beside it.
    """
    results: list[ItemResult] = []
    params = SamplingParams(
        temperature=temperature, max_new_tokens=max_new_tokens, stop_token_ids=base.stop_token_ids, seed=seed
    )
    should_stop = stop_at(base, stop_strings)
    chunk = max(1, 4 * engine.max_batch_rows // num_samples)
    for start in range(0, len(items), chunk):
        part = items[start : start + chunk]
        requests = [
            Request(
                prompt_ids=encode_prompt(base, (prompt or task.prompt)(item), chat),
                params=params,
                num_samples=num_samples,
                key=draw_key(item),
                v=v,
                should_stop=should_stop,
            )
            for item in part
        ]
        results += [
            score_completion(base, task, part[c.request_index], c, stop_strings) for c in engine.generate(requests)
        ]
        if on_progress is not None:
            on_progress(min(start + chunk, len(items)), len(items))
    return results
