"""What else the untrained model may be given: other prompts, a larger token budget."""

from collections.abc import Sequence

from tinylora.rollouts.candidates import prompt_candidates
from tinylora.rollouts.runtime import Runtime
from tinylora.tasks.base import Item

__all__ = ["larger_budget", "larger_budget_in_words", "prompt_candidates"]

BUDGET_FACTOR = 4


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
