"""From chat messages to the token ids of a prompt."""

from typing import TYPE_CHECKING

from tinylora.errors import UserError

if TYPE_CHECKING:
    from tinylora.models.load import BaseModel


def encode_prompt(base: "BaseModel", messages: list[dict[str, str]], chat: bool = True) -> tuple[int, ...]:
    """Token ids of a prompt that the model is to continue.

    chat=True renders the model's chat template up to the start of its answer; the template writes the special tokens,
    so the tokenizer adds none. chat=False joins the messages' contents with newlines and lets the tokenizer add its
    own.
    Raises: UserError if there is no chat template, it refuses the messages, or the prompt is empty or leaves no room
    for an answer in the model's context.
    """
    text = _render(base, messages) if chat else "\n".join(message["content"] for message in messages)
    # Not verbose: without the tokenizer's own remark on long texts, as the check below is stricter.
    ids = tuple(int(token) for token in base.tokenizer(text, add_special_tokens=not chat, verbose=False).input_ids)
    if not ids:
        raise UserError(f"a prompt for {base.name} has no tokens; give it some text")
    if len(ids) >= base.context_length:
        raise UserError(
            f"a prompt of {len(ids)} tokens leaves no room for an answer in the {base.context_length} tokens of "
            f"context that {base.name} has; shorten it, or use fewer few-shot examples: "
            f"{_excerpt(messages[-1]['content'])}"
        )
    return ids


def _render(base: "BaseModel", messages: list[dict[str, str]]) -> str:
    from jinja2.exceptions import TemplateError

    if not base.has_chat_template:
        raise UserError(f"{base.name} has no chat template; set prompt.chat=false to feed it the plain text")
    try:
        return str(base.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"the chat template of {base.name} refuses these turns ({roles}): {error}; change prompt.system or "
            f"prompt.few_shot, or set prompt.chat=false"
        ) from error


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
