"""What a recipe says of the questions: their source, how replies are scored, how one becomes a prompt."""

import re
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from tinylora.errors import check_path, require, require_at_least

TOO_LONG = "too-long"
"""In task.skip: items whose prompt, or under sft prompt and reference reply, does not fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """The questions, their splits and how replies are scored."""

    name: str = "reasoning_gym:chain_sum"
    """gsm8k, math, math500, aime24, aime25, amc23, banking77, restaurant8k, ifeval, mbpp, writing, jsonl, or
    reasoning_gym:NAME."""
    path: str = ""
    """A JSONL file (jsonl), or a folder with train.jsonl and test.jsonl (public sets); empty takes the hub. Looked for
    beside the recipe, then in the working folder; a run keeps it in full."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the reasoning-gym task, passed through; labels for banking77; levels, subjects for math, math500;
    rules, max_rules for writing."""
    num_items: int = 6000
    """Distinct questions to generate at most (reasoning-gym, writing)."""
    seed: int = 0
    """Seed of the generated items. Splits never depend on it."""
    scorer: str = "number"
    """exact, number, boxed, regex, json-fields, slots, writing, contains, math-verify, ifeval, python-tests, or
    module:function."""
    scorer_options: dict[str, Any] = field(default_factory=dict)
    """Options of the scorer, such as pattern for regex."""
    skip: tuple[str, ...] = ()
    """Items to leave out: "too-long" for those that do not fit in the model's context, or ids as messages name them."""
    validation_share: float = 0.1
    """Share of questions, by hash, that are for validation."""
    test_share: float = 0.25
    """Share of questions, by hash, that are for the test (unless the source has a test file)."""

    def __post_init__(self) -> None:
        require(bool(self.name), "task.name", "gsm8k, another public set, jsonl or reasoning_gym:NAME", self.name)
        check_path("task.path", self.path)
        require_at_least(1, "task", self, "num_items")
        require_at_least(0, "task", self, "seed")
        known = [one for one in self.skip if one == TOO_LONG or re.fullmatch(r"[0-9a-f]{8,64}", one)]
        allowed = f"a list of {TOO_LONG} and of ids, 8 digits of each at least"
        require(len(known) == len(self.skip), "task.skip", allowed, list(self.skip))
        for name in ("validation_share", "test_share"):
            require(0 <= getattr(self, name) < 1, f"task.{name}", "at least 0 and below 1", getattr(self, name))
        total = self.validation_share + self.test_share
        require(total < 1, "task.validation_share + task.test_share", "below 1, to leave questions to train on", total)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptConfig:
    """How a question becomes a prompt."""

    system: str = ""
    """System prompt; empty leaves the chat template's own."""
    template: str = "{question}"
    """User turn; {question} is replaced."""
    pattern: str = ""
    """Regular expression; if set, {question} becomes its first group in the question, where it must always match."""
    few_shot: tuple[dict[str, str], ...] = ()
    """Solved examples (question, answer) shown as earlier turns."""
    chat: bool = True
    """Use the model's chat template; false feeds the plain text."""
    date: str = ""
    """The day, YYYY-MM-DD, that prompts show where the chat template writes one; empty takes the day of the start, and
    the run keeps it."""
    template_variables: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as {enable_thinking = false}."""
    template_name: str = ""
    """The chat template's name, for a model that has several; empty takes the default."""

    def __post_init__(self) -> None:
        require("{question}" in self.template, "prompt.template", "text with {question} in it", self.template)
        for shot in self.few_shot:
            require({"question", "answer"} <= set(shot), "prompt.few_shot", "tables with question and answer", shot)
        require(not self.date or _is_day(self.date), "prompt.date", "a day such as 2026-01-31", self.date)
        taken = sorted(NOT_VARIABLES & set(self.template_variables))
        require(not taken, "prompt.template_variables", "without names that have a meaning of their own", taken)


NOT_VARIABLES = frozenset(
    {
        "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages",
        "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens",
        "strftime_now", "tinylora_clock", "tokenize", "tokenizer_kwargs", "truncation",
    }
)  # fmt: skip
"""Names that rendering a template gives a meaning to; documents and tools are variables like others."""


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
