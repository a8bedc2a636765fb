"""What the settings inside of a stranger's file may say, as a list; whatever is not on it, a file does not choose.

A stranger's file is an adapter file, a pulled folder, or a run folder that this user did not make (store/own.py). What
it says is data: which numbers there are, how replies are asked for and scored. What runs code, reads other files or
the network comes from the command line alone. A setting that is added to RunConfig stands on neither list at first,
and a file then may not say it; tests/config/test_strangers.py asks for a decision.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from tinylora.config.run import ModelConfig, RunConfig
from tinylora.config.schema import is_section, to_table
from tinylora.models.embedded import EMBEDDED

SAFE_SCORERS = frozenset({
    "exact", "number", "boxed", "regex", "json-fields", "contains", "slots", "writing", "math-verify", "ifeval",
    "reasoning-gym",
})  # fmt: skip
"""Scorers that compare text and run nothing of anybody's."""

MAY_SAY = frozenset({
    "model.device", "model.dtype", "model.quantization",
    "method.name", "method.rank", "method.alpha",
    "adapter.rank", "adapter.u", "adapter.tying", "adapter.n_tie", "adapter.num_groups", "adapter.targets",
    "adapter.basis", "adapter.seed",
    "task.name", "task.options", "task.num_items", "task.seed", "task.skip", "task.validation_share",
    "task.test_share",
    "prompt.system", "prompt.template", "prompt.pattern", "prompt.few_shot", "prompt.chat", "prompt.date",
    "prompt.template_variables", "prompt.template_name",
    "reward",
    "generation.backend", "generation.temperature", "generation.max_new_tokens", "generation.stop_strings",
    "generation.max_batch_rows", "generation.kv_budget_gib", "generation.cuda_graphs",
    "grpo.prompts_per_step", "grpo.group_size", "grpo.advantage", "grpo.clip_low", "grpo.clip_high", "grpo.kl_coef",
    "grpo.updates_per_batch", "grpo.normalisation", "grpo.truncated", "grpo.refill_factor", "grpo.importance_cap",
    "grpo.max_logprob_gap",
    "sft.target",
    "optim.lr", "optim.beta1", "optim.beta2", "optim.eps", "optim.max_grad_norm", "optim.warmup_steps",
    "optim.kl_step", "optim.kl_total", "optim.direction", "optim.momentum", "optim.curvature_decay",
    "grpo.until_signal", "grpo.signal_batches",
    "train.algorithm", "train.steps", "train.seed", "train.micro_batch_tokens", "train.memory_budget_gib",
    "train.gradient_checkpointing", "train.num_threads", "train.check_memory", "train.keep", "train.control",
    "train.liveness_every",
    "eval.every", "eval.num_validation", "eval.num_test", "eval.random_vectors", "eval.prompts",
    "log.samples_per_step", "log.checkpoint_every",
})  # fmt: skip
"""Settings whose every value is data."""

MAY_NOT_SAY = {
    "model.name": "a file, a folder or a repository that is loaded; the embedded models alone are always taken",
    "model.revision": "what is fetched of a repository",
    "model.trust_remote_code": "code of a repository",
    "task.path": "a file that is read",
    "task.scorer": "code, unless it is one of SAFE_SCORERS",
    "task.scorer_options": "options of code, unless they are of one of SAFE_SCORERS",
    "log.trackers": "the network",
}
"""The rest, and what it would choose."""


def beyond(config: RunConfig) -> dict[str, Any]:
    """Settings, by dotted name, that a stranger's file may not say and this one does; those at their default are not.

    >>> beyond(RunConfig())
    {}
    """
    default = dict(_leaves(RunConfig()))
    return {
        key: value
        for key, value in _leaves(config)
        if key not in MAY_SAY and value != default.get(key) and not _is_harmless(key, config)
    }


def as_a_stranger_says(config: RunConfig, kept: Collection[str] = ()) -> RunConfig:
    """The config with what a stranger may not say put back to the defaults, except for `kept`.

    A scorer that is put back takes its options along: they are those of another one.
    """
    default = RunConfig()
    for key in beyond(config):
        if key in kept:
            continue
        section, _, name = key.partition(".")
        put_back = {name: getattr(getattr(default, section), name)}
        if key == "task.scorer":
            put_back["scorer_options"] = {}
        if section == "model" and name == "name":
            put_back = {"name": ModelConfig().name, "revision": ""}
        config = replace(config, **{section: replace(getattr(config, section), **put_back)})
    return config


def _leaves(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting; a table of free entries is one value."""
    for section, value in to_table(config).items():
        if is_section(type(getattr(config, section))):
            yield from ((f"{section}.{name}", one) for name, one in value.items())
        else:
            yield section, value


def _is_harmless(key: str, config: RunConfig) -> bool:
    if key == "model.name":
        return config.model.name in EMBEDDED
    if key in ("task.scorer", "task.scorer_options"):
        return config.task.scorer in SAFE_SCORERS
    return False
