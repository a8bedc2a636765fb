"""From turns to text by a model's chat template: with a fixed date, the recipe's variables, and a time limit.

A template is a program that comes with the model. It may read the clock (`strftime_now`), refuse turns, fail, or run
for ever; what comes of that is one sentence.
"""

import datetime
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING, Any

from tinylora.errors import UserError
from tinylora.system.environment import today
from tinylora.system.time_limit import OutOfTime, with_time_limit
from tinylora.tasks.config import PromptConfig

if TYPE_CHECKING:
    from tinylora.models.base import BaseModel

SECONDS = 10.0
"""Time of one rendering, which takes a ten-thousandth of that."""
MOST_CHARACTERS = 2**20
"""Of a prompt, beside some times what it is made of."""
CLOCK = "strftime_now"
"""The function by which templates read the clock; transformers and others offer this one and no other."""
_FLAGS = ("", "-", "_", "0", "^", "#")
_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZf%"
_FIXED_CLOCK = (
    "{%- macro strftime_now(format) -%}{%- set told = namespace(text='', code='') -%}{%- for one in format -%}"
    "{%- if told.code == '' and one != '%' -%}{%- set told.text = told.text ~ one -%}"
    "{%- else -%}{%- set told.code = told.code ~ one -%}"
    "{%- if told.code in tinylora_clock -%}"
    "{%- set told.text = told.text ~ tinylora_clock[told.code] -%}{%- set told.code = '' -%}"
    "{%- elif told.code | length > 2 -%}{%- set told.text = told.text ~ told.code -%}{%- set told.code = '' -%}"
    "{%- endif -%}{%- endif -%}{%- endfor -%}{{- told.text ~ told.code -}}{%- endmacro %}\n"
)
"""Put before a template, it is the `strftime_now` that the template finds: midnight of one day. In place of the
library's own function, as functions cannot be handed to a template. The line break is eaten by the tag before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Handed:
    """What a template gets beside the turns."""

    date: str = ""
    """YYYY-MM-DD, the day that the clock shows; empty for the real one."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    """Of the template, where the model has several."""

    @classmethod
    def of(cls, prompt: PromptConfig) -> "Handed":
        """As a recipe says."""
        return cls(date=prompt.date, variables=prompt.template_variables, name=prompt.template_name)


NOTHING = Handed()


def render(
    base: "BaseModel", turns: Sequence[Mapping[str, str]], handed: Handed, *, add_generation_prompt: bool = True
) -> str:
    """The text of some turns, up to where the model answers.

    Raises: UserError, one sentence, if there is no template, it refuses the turns, fails, or does not end in time.
    """
    from jinja2.exceptions import TemplateError

    text = template_text(base, handed.name)
    if refused := _refused(text):
        raise UserError(f"the chat template of {base.name} {refused}")
    given: dict[str, Any] = dict(handed.variables)
    if handed.name:
        given["chat_template"] = text
    if handed.date and CLOCK in text:
        given |= {"chat_template": _FIXED_CLOCK + text, "tinylora_clock": _clock(handed.date)}
    if add_generation_prompt:
        given["add_generation_prompt"] = True
    messages = [dict(turn) for turn in turns]
    most = MOST_CHARACTERS + 4 * len(turns) * sum(len(str(turn["content"])) for turn in turns)
    try:
        rendered = with_time_limit(
            SECONDS, lambda: str(base.tokenizer.apply_chat_template(messages, tokenize=False, **given))
        )
        if len(rendered) > most:
            raise TemplateError(f"it makes {len(rendered):,} characters of them")
        return rendered
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(
            f"the chat template of {base.name} refuses these turns ({roles}): {error}; change prompt.system or "
            f"prompt.few_shot, or set prompt.chat=false"
        ) from error
    except OutOfTime:
        raise UserError(
            f"the chat template of {base.name} has not ended after {SECONDS:g} seconds on one prompt; mend it, or set "
            "prompt.chat=false to feed the plain text"
        ) from None
    except Exception as error:  # whatever a program of somebody else's may raise
        raise UserError(
            f"the chat template of {base.name} fails ({type(error).__name__}: {_short(error)}); mend it, or set "
            "prompt.chat=false to feed the plain text"
        ) from error


def template_text(base: "BaseModel", name: str = "") -> str:
    """The template itself; empty for a tokenizer that does its chat without one.

    Raises: UserError if there is none, or several and none of that name (without a name: none called default).
    """
    if not base.has_chat_template:
        raise UserError(f"{base.name} has no chat template; set prompt.chat=false to feed it the plain text")
    found = base.tokenizer.chat_template
    if isinstance(found, Mapping):
        names = ", ".join(sorted(found))
        if (name or "default") in found:
            return str(found[name or "default"])
        lacks = f"none called {name!r}" if name else "none of them is the default"
        raise UserError(
            f"{base.name} has several chat templates ({names}), and {lacks}; set prompt.template_name to one of them"
        )
    if name not in ("", "default"):
        raise UserError(
            f"prompt.template_name is {name!r}, but {base.name} has one chat template and no names; leave it out"
        )
    return found if isinstance(found, str) else ""


def with_fixed_date(base: "BaseModel", prompt: PromptConfig) -> PromptConfig:
    """The settings with the day that prompts show: the one that is set, else today; none where no prompt shows one."""
    try:
        shows = prompt.chat and base.has_chat_template and CLOCK in template_text(base, prompt.template_name)
    except UserError:  # which is said where a prompt is made
        return prompt
    date = (prompt.date or today()) if shows else ""
    return prompt if prompt.date == date else replace(prompt, date=date)


def unread_variables(base: "BaseModel", prompt: PromptConfig) -> str:
    """A sentence about variables that the template does not read, which then change nothing; empty if it reads all."""
    if not (prompt.template_variables and prompt.chat and base.has_chat_template):
        return ""
    text = template_text(base, prompt.template_name)
    unread = [name for name in prompt.template_variables if not re.search(rf"\b{re.escape(name)}\b", text)]
    if not unread:
        return ""
    near = get_close_matches(unread[0], set(re.findall(r"[A-Za-z_]\w+", text)), n=1, cutoff=0.7)
    hint = f"; did you mean {near[0]}?" if near else ""
    return (
        f"the chat template of {base.name} does not read {', '.join(unread)} of prompt.template_variables, so that "
        f"changes nothing{hint}"
    )


@cache
def _refused(text: str) -> str:
    """Why a template is not asked at all: it does what no limit holds, or draws at random. Empty if it is."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        tokens = [token for _, kind, token in Environment().lex(text) if kind in ("operator", "name")]
    except TemplateSyntaxError:  # which is said when it is rendered
        return ""
    mend = "; mend it, or set prompt.chat=false to feed the plain text"
    if "**" in tokens:  # one number of a million digits is a single step, which nothing interrupts
        return f"computes powers (**), which may take for ever{mend}"
    pairs = set(itertools.pairwise(tokens))
    if ("|", "random") in pairs or ("lipsum", "(") in pairs:
        return f"draws at random, so that one question has another prompt each time{mend}"
    return ""


def _clock(date: str) -> dict[str, str]:
    """What every directive of strftime gives at midnight of that day, without those that this system does not know."""
    midnight = datetime.datetime.fromisoformat(date)
    table = {}
    for directive in (flag + one for flag in _FLAGS for one in _DIRECTIVES):
        try:
            told = midnight.strftime(f"%{directive}")
        except ValueError:
            continue
        if told != f"%{directive}":
            table[f"%{directive}"] = told
    return table


def _short(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:200]
