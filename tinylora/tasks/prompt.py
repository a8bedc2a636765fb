"""How an item becomes chat messages: system prompt, solved examples as earlier turns, the question in its template."""

from collections.abc import Mapping, Sequence

from tinylora.errors import UserError
from tinylora.tasks.base import Message, PromptSettings, shorten

PLACEHOLDER = "{question}"


class Prompt:
    """Checked prompt settings. Only `{question}` is replaced, so other braces in a template (JSON, LaTeX) stay."""

    def __init__(self, settings: PromptSettings) -> None:
        if PLACEHOLDER not in settings.template:
            raise UserError(f"prompt.template must contain {PLACEHOLDER}, got {shorten(settings.template)}")
        self._template = settings.template
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
        return [dict(message) for message in self._head] + [self._user(question)]

    def _user(self, question: str) -> Message:
        return {"role": "user", "content": self._template.replace(PLACEHOLDER, question)}
