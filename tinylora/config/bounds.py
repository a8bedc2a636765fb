"""Numbers that no run can mean: each setting has a largest value, so that a slip ends in a sentence."""

import math
from dataclasses import fields

from tinylora.errors import require

MOST_WHOLE = 10**9
MOST_REAL = 1e9
MOST = {
    "train.num_threads": 4096,
    "grpo.group_size": 2**16,
    "grpo.prompts_per_step": 2**16,
    "grpo.updates_per_batch": 2**16,
    "generation.max_batch_rows": 2**16,
    "generation.max_new_tokens": 2**24,
    "generation.kv_budget_gib": 2.0**20,
    "train.memory_budget_gib": 2.0**20,
    "grpo.refill_factor": 1e6,
    "task.num_items": 10**8,
    "eval.random_vectors": 10**5,
    "log.samples_per_step": 2**24,
}
"""Where it is another than MOST_WHOLE or MOST_REAL. Seeds have bounds of their own."""


def check_numbers(section: str, settings: object) -> None:
    """Raises: UserError for a number of a section that is true, false, none, or larger than any that has sense."""
    for field in fields(settings):  # type: ignore[arg-type]
        value, key = getattr(settings, field.name), f"{section}.{field.name}"
        if field.type in (int, "int"):
            require(type(value) is int, key, "a whole number", value)
            most = 2**63 - 1 if field.name == "seed" else MOST.get(key, MOST_WHOLE)
            require(abs(value) <= most, key, f"at most {most:,}", value if abs(value) < 10**30 else "a longer number")
        elif field.type in (float, "float"):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(is_number, key, "a number", value)
            if not (value == math.inf and key == "grpo.max_logprob_gap"):  # off
                most_real = MOST.get(key, MOST_REAL)
                require(abs(value) <= most_real, key, f"finite, and at most {most_real:,.0f}", value)
