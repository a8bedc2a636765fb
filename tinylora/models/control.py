"""Control tokens: what ends a turn or begins one. In a text that a model is shown they are letters like others.

A chat template writes them; a question that holds `<|im_end|>` would end the user's turn. Such a text is cut inside of
the token, and its pieces are tokenised one by one, so that no tokenizer finds the token in it. All other prompts are
tokenised as they always were.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tinylora.models.base import BaseModel

MEANT = re.compile(
    r"</?(think|thinking|thought|reasoning|reason|answer|solution|tool_call|tool_response|tools?)>|\[/?THINK\]"
)
"""Tags that models write themselves and prompts speak of: tokens, but none that ends a turn."""
BRACKET = re.compile(r"[<\[|｜]")
"""What an added token has that is markup and no text."""
Known = tuple[object, tuple[str, ...], re.Pattern[str]]
_known: "WeakKeyDictionary[PreTrainedTokenizerBase, Known]" = WeakKeyDictionary()
"""Of a tokenizer: what decides its control tokens, these, and a pattern of any of them."""


def control_tokens(base: "BaseModel") -> tuple[str, ...]:
    """The texts of a tokenizer's control tokens, longest first: its special tokens, the model's stop tokens, and other
    added tokens that stand in the chat template.

    Without those that are white space (Gemma's line breaks), a word or one character (a pad token made of "!"), as
    ordinary text has them, and without MEANT.
    """
    return _look_up(base)[0]


def found_in(base: "BaseModel", text: str) -> list[str]:
    """Control tokens in a text, in the order of their places, each once."""
    return list(dict.fromkeys(_look_up(base)[1].findall(text)))


def _look_up(base: "BaseModel") -> tuple[tuple[str, ...], re.Pattern[str]]:
    tokenizer = base.tokenizer
    template = tokenizer.chat_template
    key = (template if isinstance(template, str) else repr(template), len(tokenizer), base.stop_token_ids)
    known = _known.get(tokenizer)
    if known is None or known[0] != key:
        found = tuple(sorted(_control_tokens(base, str(key[0])), key=lambda text: (-len(text), text)))
        known = key, found, re.compile("|".join(map(re.escape, found)) or "(?!)")
        _known[tokenizer] = known
    return known[1], known[2]


def _control_tokens(base: "BaseModel", template: str) -> set[str]:
    tokenizer = base.tokenizer
    texts = {str(text) for text in tokenizer.all_special_tokens}
    for number, token in tokenizer.added_tokens_decoder.items():
        is_markup = BRACKET.search(token.content) and token.content in template
        if token.special or number in base.stop_token_ids or is_markup:
            texts.add(token.content)
    return {text for text in texts if len(text) > 1 and not _is_text(text)}


def _is_text(token: str) -> bool:
    return token.isspace() or token.isalnum() or bool(MEANT.fullmatch(token))


def cut(base: "BaseModel", text: str, mark: str) -> str:
    """The text with a mark inside of every control token in it."""
    places: list[tuple[int, int]] = []
    for token in control_tokens(base):
        start = text.find(token)
        while start >= 0:
            places.append((start, start + len(token)))
            start = text.find(token, start + 1)
    last = 0
    pieces: list[str] = []
    for start, end in sorted(places, key=lambda place: place[1]):
        if not pieces or start >= last:  # else the last mark is inside of this one, too
            pieces.append(text[last : end - 1])
            last = end - 1
    return mark.join([*pieces, text[last:]])


def free_mark(texts: Sequence[str]) -> str:
    """A character for private use that none of the texts has."""
    return next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if not any(mark in text for text in texts))


def encode_in_pieces(base: "BaseModel", text: str, mark: str) -> list[int]:
    """Token ids of a text that is cut at marks: piece by piece, without the space that some tokenizers put first."""
    tokenizer = base.tokenizer
    text = text.replace(f"\\u{ord(mark):04x}", mark)  # by a template that writes JSON

    def encode(piece: str) -> list[int]:
        return [int(token) for token in tokenizer(piece, add_special_tokens=False, verbose=False).input_ids]

    first, *rest = text.split(mark)
    ids, line_break = encode(first), encode("\n")
    for piece in rest:
        behind = encode("\n" + piece)
        is_kept = behind[: len(line_break)] == line_break
        ids += behind[len(line_break) :] if is_kept else encode(piece)
    return ids
