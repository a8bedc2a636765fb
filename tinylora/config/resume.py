"""Which settings a resumed run may change."""

from collections.abc import Sequence

from tinylora.config.run import RunConfig
from tinylora.errors import UserError

MAY_CHANGE = ("train.steps", "generation.kv_budget_gib", "task.skip")
"""Beside log.*: settings that a resumed run may change. The budget is memory alone, though it decides which sequences
are computed together, and with that perhaps a last digit. What is skipped keeps its place in the order of the data, so
that all other items come as they would have."""


MACHINE = ("generation.backend",)
"""Resolved anew on each resume; a change is said where it moves numbers."""


def changed_settings(then: RunConfig, now: RunConfig) -> list[tuple[str, object, object]]:
    """(dotted key, then, now) of every setting that differs and that a resumed run may not change."""
    from tinylora.config.schema import diff_configs

    free = (*MAY_CHANGE, *MACHINE)
    return [one for one in diff_configs(then, now) if one[0] not in free and not one[0].startswith("log.")]


def check_as_begun(began: str, now: RunConfig, where: str) -> None:
    """Raises: UserError if `now`, read from `where`, is not what the run was trained under so far.

    began: config.toml as it was at the last checkpoint, which keeps it; empty in checkpoints from before that.
    """
    from tinylora.config.recipe import parse_recipe

    changed = changed_settings(parse_recipe(began, where), now) if began else []
    if changed:
        listed = ", ".join(f"{key} ({old!r} then, {new!r} there now)" for key, old, new in changed)
        raise UserError(f"{where} is not what the run was trained under: {listed}; put that back, or start a new run")


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
