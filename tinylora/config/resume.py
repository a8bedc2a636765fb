"""Which settings a resumed run may change."""

from collections.abc import Sequence

from tinylora.config.run import RunConfig
from tinylora.errors import UserError

MAY_CHANGE = ("train.steps", "generation.kv_budget_gib", "task.skip")
"""Beside log.*: settings that a resumed run may change. The budget is memory alone, though it decides which sequences
are computed together, and with that perhaps a last digit. What is skipped keeps its place in the order of the data, so
that all other items come as they would have."""


def resume_config(stored: RunConfig, changes: Sequence[str]) -> RunConfig:
    """The stored config with `--set` changes. Only train.steps, log.*, generation.kv_budget_gib and task.skip may
    change: the rest would be another run. prompt.date may be named where an older version did not keep it.

    Raises: UserError that lists every other key that would change, with both values.
    """
    from tinylora.config.recipe import apply_overrides
    from tinylora.config.schema import diff_configs

    config = apply_overrides(stored, changes)
    free = (*MAY_CHANGE, *(() if stored.prompt.date else ("prompt.date",)))
    refused = [d for d in diff_configs(stored, config) if d[0] not in free and not d[0].startswith("log.")]
    if refused:
        listed = ", ".join(f"{key} ({old!r} to {new!r})" for key, old, new in refused)
        raise UserError(
            f"only train.steps, log.*, generation.kv_budget_gib and task.skip may change on resume, got {listed}; "
            "start a new run for that"
        )
    return config
