"""One short hash of everything that decides a score besides the model: equal hashes, comparable scores.

What belongs to the model is left out on purpose: its chat template, its stop tokens, how its numbers are rounded. Of a
Python function used as scorer the source is in it, that of its file and of the files beside it that it imports.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tinylora.config.run import RunConfig
from tinylora.tasks.base import Item, Task
from tinylora.tasks.config import PromptConfig
from tinylora.tasks.scorers.reference import bare_reference
from tinylora.tasks.split_task import SplitTask

VERSION = 3
"""Goes up when a scorer, a parser or the reading of a prompt changes so that the same reply gets another score."""
DIGITS = 16


def items_fingerprint(items: Sequence[Item], read_beside: str = "") -> str:
    """SHA-256 (hex) over the questions and answers that are asked, in order.

    read_beside: the digest of what else of the items the scorer reads, such as tests; empty where that is nothing.
    """
    rows: list[Any] = [[item.id, item.question, item.answer] for item in items]
    if read_beside:
        rows.append(["read_beside", read_beside])
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def protocol_hash(
    *,
    task: str,
    data: str,
    prompt: PromptConfig,
    chat: bool,
    scorer: str,
    scorer_options: Mapping[str, Any],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stop_strings: Sequence[str] = (),
    scorer_code: str = "",
) -> str:
    """The first 16 hex digits of SHA-256 over canonical JSON (sorted keys, no spaces, ASCII) of the arguments.

    data: the fingerprint of the items asked. seed: counts only where something is drawn (temperature above 0). A reply
    ends at one of the model's stop tokens, at a stop string or at the budget, where its strict score is 0. scorer_code:
    a digest of the code of a Python function used as scorer.
    """
    settings = {
        "version": VERSION,
        "task": task,
        "data": data,
        "prompt": {
            "system": prompt.system,
            "template": prompt.template,
            "pattern": prompt.pattern,
            "few_shot": [dict(shot) for shot in prompt.few_shot],
            "chat": chat,
            **_template_settings(prompt),
        },
        "scorer": scorer,
        "scorer_options": dict(scorer_options),
        "max_new_tokens": max_new_tokens,
        "temperature": float(temperature),
        "seed": seed if temperature else None,
        "stop_strings": list(stop_strings),
    }
    if scorer_code:
        settings["scorer_code"] = scorer_code
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def _template_settings(prompt: PromptConfig) -> dict[str, Any]:
    """What the chat template is handed, where that is anything; a date only where the template writes one."""
    handed = {
        "date": prompt.date,
        "template_variables": prompt.template_variables,
        "template_name": prompt.template_name,
    }
    return {name: value for name, value in handed.items() if value}


def protocol_of(
    config: RunConfig, task: Task, items: Sequence[Item], *, temperature: float = 0.0, seed: int = 0
) -> str:
    """The protocol hash of `items` of a task answered under a config's prompt, scorer and budget."""
    return protocol_hash(
        task=task.name,
        data=items_fingerprint(items, task.read_beside(items) if isinstance(task, SplitTask) else ""),
        prompt=config.prompt,
        chat=config.prompt.chat,
        scorer=bare_reference(config.task.scorer),
        scorer_options=config.task.scorer_options,
        max_new_tokens=config.generation.max_new_tokens,
        temperature=temperature,
        seed=seed,
        stop_strings=config.generation.stop_strings,
        scorer_code=task.scorer.code() if isinstance(task, SplitTask) else "",
    )
