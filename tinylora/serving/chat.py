"""The `chat` workflow: one line of text, answered by the untrained model and by the adapted one.

Every line stands alone, so that both always answer the very same prompt: the one of training (system prompt, solved
examples, template), or the plain line.
"""

import re
import textwrap
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from tinylora.generation.types import Completion, Request, SamplingParams
from tinylora.models.text import text_of
from tinylora.rollouts.runtime import Runtime
from tinylora.tasks.base import Message
from tinylora.tasks.prompt import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatReply:
    """One model's answer; `stopped` is False where it was cut off at the token budget."""

    text: str
    num_tokens: int
    stopped: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplyPair:
    """Both answers to one line."""

    prompt: str
    untrained: ChatReply
    adapter: ChatReply

    def to_json(self) -> dict[str, Any]:
        """For machines, under the keys that `chat --json` has always had."""
        return {"prompt": self.prompt, "base": asdict(self.untrained), "adapted": asdict(self.adapter)}


def reply_pair(
    runtime: Runtime,
    v: Tensor,
    line: str,
    *,
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    plain: bool = False,
) -> ReplyPair:
    """Answer `line` under v = 0 and under v (groups, u), in one batch and with the same random numbers.

    Raises: UserError for a prompt that does not fit, a temperature below 0, or v of a wrong shape.
    """
    settings = runtime.config.prompt
    if settings.pattern and not re.search(settings.pattern, line):
        # The pattern cuts a task's questions down to what the model is shown; a person types just that.
        settings = replace(settings, pattern="")
    messages: list[Message]
    messages = [{"role": "user", "content": line}] if plain else Prompt(settings).messages(line)
    ids = runtime.encode(messages)
    params = SamplingParams(
        temperature=temperature, max_new_tokens=max_new_tokens, stop_token_ids=runtime.base.stop_token_ids, seed=seed
    )
    untrained, adapter = runtime.engine.generate(
        [Request(prompt_ids=ids, params=params), Request(prompt_ids=ids, params=params, v=v)]
    )
    return ReplyPair(prompt=line, untrained=_reply(runtime, untrained), adapter=_reply(runtime, adapter))


def _reply(runtime: Runtime, completion: Completion) -> ChatReply:
    text = text_of(runtime.base, completion.token_ids)
    return ChatReply(text=text, num_tokens=len(completion.token_ids), stopped=completion.finish_reason == "stop")


def format_pair(pair: ReplyPair, width: int = 100) -> str:
    """Both answers in two columns, `width` characters in all."""
    column = max(36, (width - 3) // 2)

    def cell(name: str, reply: ChatReply) -> list[str]:
        ending = "" if reply.stopped else ", cut off"
        title = f"{name} ({reply.num_tokens} tokens{ending})"
        lines = [title, "-" * min(column, len(title))]
        for line in reply.text.strip().splitlines() or ["(nothing)"]:
            lines += textwrap.wrap(line, column) or [""]
        return lines

    left, right = cell("untrained", pair.untrained), cell("adapted", pair.adapter)
    height = max(len(left), len(right))
    left += [""] * (height - len(left))
    right += [""] * (height - len(right))
    return "\n".join(f"{a:<{column}} | {b}".rstrip() for a, b in zip(left, right, strict=True))
