"""How an item becomes chat messages: system prompt, solved examples as earlier turns, the question in its template."""

import re
from collections.abc import Mapping, Sequence

from tinylora.errors import UserError
from tinylora.tasks.base import Message, shorten
from tinylora.tasks.config import PromptConfig

PLACEHOLDER = "{question}"


class Prompt:
    """Checked prompt settings. Only `{question}` is replaced, so other braces in a template (JSON, LaTeX) stay."""

    def __init__(self, settings: PromptConfig) -> None:
        if PLACEHOLDER not in settings.template:
            raise UserError(f"prompt.template must contain {PLACEHOLDER}, got {shorten(settings.template)}")
        self._template = settings.template
        try:
            self._pattern = re.compile(settings.pattern) if settings.pattern else None
        except re.error as error:
            raise UserError(f"prompt.pattern {settings.pattern!r} is no regular expression: {error}") from error
        if self._pattern is not None and self._pattern.groups < 1:
            raise UserError(f"prompt.pattern {settings.pattern!r} has no group; put the part to keep in (...)")
        self.examples: Sequence[Mapping[str, str]] = tuple(settings.few_shot)
        for number, example in enumerate(self.examples, 1):
            if set(example) != {"question", "answer"} or not all(isinstance(text, str) for text in example.values()):
                raise UserError(
                    f"prompt.few_shot: example {number} must have a question and an answer, both texts, "
                    f"got {shorten(repr(dict(example)))}"
                )
        self._head: list[Message] = [{"role": "system", "content": settings.system}] if settings.system else []
        for example in self.examples:
            self._head.append(self._user(example["question"]))
            self._head.append({"role": "assistant", "content": example["answer"]})

    def messages(self, question: str) -> list[Message]:
        """Messages for one question; the caller owns them."""
        return [dict(message) for message in self._head] + [self._user(self._cut(question))]

    def _cut(self, question: str) -> str:
        if self._pattern is None:
            return question
        match = self._pattern.search(question)
        if match is None:
            raise UserError(f"prompt.pattern {self._pattern.pattern!r} does not match the question {shorten(question)}")
        return match[1]

    def _user(self, question: str) -> Message:
        return {"role": "user", "content": self._template.replace(PLACEHOLDER, question)}
