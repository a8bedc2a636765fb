"""Whether a chat template shows the model all that it was given: question, system prompt, examples.

One that walks over contents as lists of parts leaves a text out, and every prompt is the same. So each text is looked
for in what was rendered, as a whole. Templates trim what they show in ways that are known; these are no loss.
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from tinylora.errors import UserError
from tinylora.models.template import Handed, render, template_text
from tinylora.tasks.base import shorten

if TYPE_CHECKING:
    from tinylora.models.base import BaseModel

Turn = Mapping[str, str]
REMARK = "the chat template leaves the reasoning out of earlier answers (what stands before a closing tag)"
_SWITCH = re.compile(r"/(no_)?think\b")
"""Words by which a prompt switches reasoning on and off, and which templates take out of it."""
_CLOSING = re.compile(r"</\w+>|\[/\w+\]|<\|[\w ]+\|>")
"""The end of a part of a reply. Templates of reasoning models show only what stands behind it, in earlier turns."""
_shown: "WeakKeyDictionary[object, set[tuple[object, ...]]]" = WeakKeyDictionary()
"""Of a tokenizer: template, what it is handed and roles, of turns that are known to be shown."""


def check_shown(base: "BaseModel", turns: Sequence[Turn], rendered: str, handed: Handed) -> list[str]:
    """Look for every turn's content in the rendered text; what was trimmed, in words.

    Raises: UserError that names what is missing, and what to do.
    """
    _check_roles(base, turns, handed)
    remarks = []
    squeezed = ""
    for index, turn in enumerate(turns):
        content = turn["content"]
        if content in rendered:
            continue
        squeezed = squeezed or _squeezed(rendered)
        if _is_in(content, rendered, squeezed):
            continue
        if turn["role"] == "assistant" and (end := list(_CLOSING.finditer(content))):
            tail = content[end[-1].end() :]
            if _is_in(tail, rendered, squeezed) or _is_in(content[: end[-1].start()], rendered, squeezed):
                remarks.append(REMARK)
                continue
        raise UserError(
            f"the chat template of {base.name} does not show {_what(turns, index)} as it is: {shorten(content, 80)} is "
            f"not in the prompt, which is {shorten(rendered, 200)}; {_advice(turns, index)}"
        )
    return remarks


def _is_in(content: str, rendered: str, squeezed: str) -> bool:
    """Whether a text is there but for white space, escapes of JSON or HTML, and the switches of reasoning."""
    told = _squeezed(content)
    as_json = [_squeezed(json.dumps(content.strip(), ensure_ascii=ascii)[1:-1]) for ascii in (False, True)]
    return (
        any(form in squeezed for form in (told, *as_json))
        or told in _squeezed(html.unescape(rendered))
        or _squeezed(_SWITCH.sub("", content)) in _squeezed(_SWITCH.sub("", rendered))
    )


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _check_roles(base: "BaseModel", turns: Sequence[Turn], handed: Handed) -> None:
    """The same with texts that stand nowhere else, once for turns of these roles: a question such as "1" is found in
    many a template that never shows it.
    """
    text = template_text(base, handed.name)
    key = (text, repr(handed), tuple(turn["role"] for turn in turns))
    known = _shown.setdefault(base.tokenizer, set())
    if key in known:
        return
    marks = [f"tinylora looks for text {_letters(index)}" for index in range(len(turns))]
    probe = [{**turn, "content": mark} for turn, mark in zip(turns, marks, strict=True)]
    try:
        rendered = render(base, probe, handed)
    except UserError:  # one that takes certain contents only; they are looked for themselves
        return
    for index, mark in enumerate(marks):
        if mark not in rendered and _squeezed(mark).lower() not in _squeezed(rendered).lower():
            parts = _reads_parts(base, probe, mark, handed)
            advice = _advice(turns, len(turns) - 1 if parts else index)  # such a template shows no text at all
            raise UserError(f"the chat template of {base.name} leaves out {_what(turns, index)}{parts}; {advice}")
    known.add(key)


def _letters(index: int) -> str:
    """A name of six letters, as a template may look for digits."""
    return "".join("abcdefghij"[int(digit)] for digit in f"{index:06d}")


def _reads_parts(base: "BaseModel", probe: list[dict[str, str]], mark: str, handed: Handed) -> str:
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in probe]
    try:
        rendered = render(base, parts, handed)  # type: ignore[arg-type]
    except UserError:
        return ""
    is_read = mark in rendered and "'type'" not in rendered
    return ": it expects contents as lists of parts, not as text" if is_read else ""


def _what(turns: Sequence[Turn], index: int) -> str:
    role = turns[index]["role"]
    if role == "system":
        return "the system prompt"
    if index == len(turns) - 1:
        return "the question"
    number = sum(turn["role"] == role for turn in turns[: index + 1])
    return f"the {'answer' if role == 'assistant' else 'question'} of example {number}"


def _advice(turns: Sequence[Turn], index: int) -> str:
    plain = "or set prompt.chat=false to feed the plain text"
    if turns[index]["role"] == "system":
        return f"write it into prompt.template instead, {plain}"
    if index < len(turns) - 1:
        return f"write the examples into prompt.template instead of prompt.few_shot, {plain}"
    return f"give the model a template that shows it (chat_template.jinja in its folder), {plain}"
