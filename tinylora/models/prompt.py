"""From chat messages to the token ids of a prompt, and the token that ends the reply."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinylora.errors import UserError
from tinylora.models.control import control_tokens, cut, encode_in_pieces, found_in, free_mark
from tinylora.models.faithful import check_shown
from tinylora.models.template import NOTHING, Handed, render
from tinylora.models.text import text_of

if TYPE_CHECKING:
    from tinylora.models.base import BaseModel

_MARK = "tinylora"
"""The content of the turn whose end is looked for."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt's token ids, and what is to be said of them."""

    ids: tuple[int, ...]
    remarks: tuple[str, ...] = ()


def encode_prompt(
    base: "BaseModel", messages: list[dict[str, str]], chat: bool = True, handed: Handed = NOTHING
) -> tuple[int, ...]:
    """Token ids of a prompt that the model is to continue.

    chat=True renders the model's chat template up to the start of its answer; the template writes the special tokens,
    so the tokenizer adds none, and what the messages hold of such tokens is text. handed: what the template gets beside
    the messages. chat=False joins the messages' contents with newlines and lets the tokenizer add its own.
    Raises: UserError if there is no chat template, it refuses the messages or does not show one of them, or the prompt
    is empty or leaves no room for an answer in the model's context.
    """
    (encoded,) = encode_prompts(base, [messages], chat, handed)
    if reason := does_not_fit(base, len(encoded.ids)):
        raise UserError(f"{reason}; shorten it, or use fewer few-shot examples: {_excerpt(messages[-1]['content'])}")
    return encoded.ids


def encode_prompts(
    base: "BaseModel", prompts: Sequence[list[dict[str, str]]], chat: bool = True, handed: Handed = NOTHING
) -> list[Encoded]:
    """`encode_prompt` of many, tokenised in one go, and of any length.

    Raises: UserError as `encode_prompt` does, but not for a prompt that is too long.
    """
    texts, remarks, marks = [], [], []
    for messages in prompts:
        text, said, mark = _text(base, messages, handed) if chat else _plain_text(base, messages)
        texts.append(text)
        remarks.append(said)
        marks.append(mark)
    # Not verbose: without the tokenizer's own remark on long texts, as `does_not_fit` is stricter.
    whole = [text for text, mark in zip(texts, marks, strict=True) if not mark]
    found = iter(base.tokenizer(whole, add_special_tokens=not chat, verbose=False).input_ids if whole else [])
    encoded = []
    for text, said, mark in zip(texts, remarks, marks, strict=True):
        ids = tuple(int(token) for token in (encode_in_pieces(base, text, mark) if mark else next(found)))
        if not ids:
            raise UserError(f"a prompt for {base.name} has no tokens; give it some text")
        encoded.append(Encoded(ids, tuple(said)))
    return encoded


def does_not_fit(base: "BaseModel", num_tokens: int) -> str:
    """Why a prompt of that many tokens cannot be answered; empty if it can."""
    if num_tokens < base.context_length:
        return ""
    return (
        f"a prompt of {num_tokens} tokens leaves no room for an answer in the {base.context_length} tokens of context "
        f"that {base.name} has"
    )


def _text(base: "BaseModel", messages: list[dict[str, str]], handed: Handed) -> tuple[str, list[str], str]:
    """The rendered prompt, what is to be said of it, and the mark at which control tokens in contents were cut."""
    contents = [message["content"] for message in messages]
    found = list(dict.fromkeys(token for content in contents for token in found_in(base, content)))
    if not found:
        text = render(base, messages, handed)
        return text, check_shown(base, messages, text, handed), ""
    mark = free_mark(contents)
    turns = [{**message, "content": cut(base, message["content"], mark)} for message in messages]
    text = render(base, turns, handed)
    said = [f"{', '.join(found)}: control tokens of {base.name}, which are letters like others here"]
    return text, [*check_shown(base, turns, text, handed), *said], mark


def _plain_text(base: "BaseModel", messages: list[dict[str, str]]) -> tuple[str, list[str], str]:
    """Contents as they stand: control tokens in them are what a recipe without a template writes its turns with."""
    return "\n".join(message["content"] for message in messages), [], ""


def end_of_reply(base: "BaseModel", chat: bool = True, handed: Handed = NOTHING) -> int:
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
    behind = _behind_a_reply(base, handed)
    return next((token for token in behind if token in stops), stops[0])


def unknown_end(base: "BaseModel", handed: Handed = NOTHING) -> str:
    """The control token behind an assistant turn of the chat template, if no stop token stands there; else nothing."""
    behind = _behind_a_reply(base, handed) if base.has_chat_template else []
    if not behind or any(token in base.stop_token_ids for token in behind):
        return ""
    text = text_of(base, behind[:1], special=True)
    return text if text in control_tokens(base) else ""


def _behind_a_reply(base: "BaseModel", handed: Handed) -> list[int]:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    try:
        text = render(base, turns, handed, add_generation_prompt=False)
    except UserError:  # one that has other roles, say
        return []
    behind = base.tokenizer(text.rpartition(_MARK)[2], add_special_tokens=False).input_ids
    return [int(token) for token in behind]


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
