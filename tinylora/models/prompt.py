"""From chat messages to the token ids of a prompt, and the token that ends the reply."""

from typing import TYPE_CHECKING

from tinylora.errors import UserError

if TYPE_CHECKING:
    from tinylora.models.base import BaseModel

_MARK = "tinylora"
"""The content of the turn whose end is looked for."""


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


def end_of_reply(base: "BaseModel", chat: bool = True) -> int:
    """The token that ends a reply: with chat=True the first stop token behind an assistant's turn in the chat template.

    That may be another one than the tokenizer's eos, which ends a document in Gemma's and Phi's vocabularies. The eos
    (the first stop token) without chat, or where the template has no stop token there.
    Raises: UserError for a model that has no stop token at all.
    """
    stops = base.stop_token_ids
    if not stops:
        raise UserError(
            f"{base.name} has no token that ends a reply, so it cannot learn where one ends; name an eos_token in its "
            "tokenizer_config.json, or an eos_token_id in its generation_config.json"
        )
    if not (chat and base.has_chat_template):
        return stops[0]
    from jinja2.exceptions import TemplateError

    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    try:
        text = str(base.tokenizer.apply_chat_template(turns, tokenize=False))
    except TemplateError:  # one that has other roles, say
        return stops[0]
    behind = base.tokenizer(text.rpartition(_MARK)[2], add_special_tokens=False).input_ids
    return next((int(token) for token in behind if token in stops), stops[0])


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
