# ruff: noqa: E501 (tables of inputs, a line each)
"""Chat templates that write the date, drop what they are given, break, or never end (points 6, 7, 21 and no end)."""

import json
import zlib
from typing import Any

from bench.trust.robustness_cases.inputs import Trial, Words, tried
from bench.trust.robustness_cases.world import CHAT

TOMORROW = """
import datetime, transformers.utils.chat_template_utils as utils
class Later(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.now(tz) + datetime.timedelta(days=41)
utils.datetime = Later
"""
DATED = "{{ strftime_now('%d %B %Y') }}\n" + CHAT


def numbers(t: Trial, run: str) -> Any:
    from safetensors.numpy import load_file

    return load_file(t.folder / run / "last.safetensors")["v"].tolist()


@tried("06 the date: a resume on another day", "the same v as in one day")
def _(t: Trial) -> None:
    model = t.world.with_template("dated", DATED)
    t.recipe(model=model, train={"steps": 3})
    t.done(t.run("train", "t.toml"))
    t.done(t.run("train", "t.toml", "--set", "train.steps=1"))
    t.done(t.run("train", "--resume", "runs/t-002", "--set", "train.steps=3", prelude=TOMORROW))
    t.check(numbers(t, "runs/t-001") == numbers(t, "runs/t-002"), "another v on another day")


@tried("06 the date: eval of a run on another day", "the untrained model gives the same replies")
def _(t: Trial) -> None:
    model = t.world.with_template("dated", DATED)
    t.recipe(model=model, generation={"max_new_tokens": 24})
    t.done(t.run("train", "t.toml"))
    t.done(t.run("eval", "runs/t-001", "--num-items", "6", "--items", "a.jsonl"))
    t.done(t.run("eval", "runs/t-001", "--num-items", "6", "--items", "b.jsonl", prelude=TOMORROW))
    a, b = (
        [json.loads(x)["text"] for x in (t.folder / name).read_text().splitlines()] for name in ("a.jsonl", "b.jsonl")
    )
    t.check(a == b, "other replies on another day")


@tried("06 the date: it stands in the run's config", "a date in config.toml")
def _(t: Trial) -> None:
    t.recipe(model=t.world.with_template("dated", DATED))
    t.done(t.run("train", "t.toml"))
    import datetime

    config = (t.folder / "runs" / "t-001" / "config.toml").read_text()
    t.check(f"{datetime.date.today():%Y-%m}" in config, "config.toml names no date")


@tried("06 no date: a template without one", "exit 0, as ever")
def _(t: Trial) -> None:
    t.trained()


def template(name: str, text: str, *says: Words, ok: bool = False, **sections: Any) -> None:
    """`train` on the tiny Llama with this template."""
    key = name.split(":")[0].replace(" ", "-").replace("/", "-") + f"-{zlib.crc32(text.encode())}"

    @tried(name, "exit 0" if ok else f"refused before the run: {', '.join(repr(one) for one in says)}")
    def _(t: Trial) -> None:
        t.recipe(model=t.world.with_template(key, text), **sections)
        came = t.run("train", "t.toml", limit_seconds=150)
        if ok:
            t.done(came)
        else:
            t.silent(t.refused(came, *says), "| reward")


SYSTEM = {"prompt": {"system": "You are a calculator."}}
SHOTS = {"prompt": {"few_shot": [{"question": "Two and 2", "answer": "It is four"}]}}
PARTS = CHAT.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
TYPED = CHAT.replace(
    "{{ m.content }}", "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
)
EITHER = CHAT.replace(
    "{{ m.content }}", "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
)
USERS = CHAT.replace("{% for m in messages %}", "{% for m in messages if m.role == 'user' %}")
LAST = CHAT.replace("{% for m in messages %}", "{% for m in messages[-1:] %}")
FIRST = CHAT.replace("{% for m in messages %}", "{% for m in messages[:1] %}")
GEMMA = CHAT.replace(
    "{% for m in messages %}",
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}",
)
template("07 dropped: content as a list of parts", PARTS, ("template", "question"))
template("07 dropped: content as typed parts", TYPED, ("template", "question"))
template("07 dropped: the question is a constant", CHAT.replace("{{ m.content }}", "Hello."), ("template", "question"))
template(
    "07 dropped: the question is cut to 3 characters",
    CHAT.replace("m.content", "m.content[:3]"),
    ("template", "question"),
)
template("07 dropped: the system prompt", USERS, "system", **SYSTEM)
template("07 dropped: the examples", LAST, ("example", "few_shot"), **SHOTS)
template("07 dropped: the question behind a system prompt", FIRST, ("template", "question"), **SYSTEM)
template(
    "07 dropped: the answers of the examples",
    CHAT.replace("{{ m.content }}", "{% if m.role != 'assistant' %}{{ m.content }}{% endif %}"),
    ("example", "few_shot"),
    **SHOTS,
)
template("07 kept: a template that trims", CHAT.replace("m.content", "m.content | trim"), ok=True)
template("07 kept: text or parts", EITHER, ok=True, **SYSTEM)
template(
    "07 kept: the system prompt inside of the user's turn",
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    + CHAT.replace("{{ m.content }}", "{{ s }} {{ m.content }}"),
    ok=True,
    **SYSTEM,
)
template("07 kept: no template at all, prompt.chat = false", "{{ x }}", ok=True, prompt={"chat": False})
template(
    "07 kept: questions with blanks around them",
    CHAT.replace("m.content", "m.content | trim"),
    ok=True,
    prompt={"template": "  {question}\n\n"},
)


@tried("07 dropped: eval on such a template", "refused before the run")
def _(t: Trial) -> None:
    import shutil

    shutil.copytree(t.world.model("llama"), t.folder / "model")
    t.recipe(model="model")
    t.done(t.run("train", "t.toml"))
    (t.folder / "model" / "chat_template.jinja").write_text(PARTS)
    t.refused(t.run("eval", "runs/t-001", "--num-items", "2"), "template")


template("21 template: a TypeError", CHAT + "{{ 1 + 'a' }}", "template")
template("21 template: a syntax error", CHAT + "{% for %}", "template")
template("21 template: division by zero", CHAT + "{{ 1 / 0 }}", "template")
template("21 template: an unknown filter", CHAT + "{{ 'a' | nothing_such }}", "template")
template("21 template: it calls what is undefined", CHAT + "{{ nothing_such() }}", "template")
template("21 template: an attribute of what is undefined", CHAT + "{{ tools.a.b }}", "template")
template("21 template: raise_exception", GEMMA, "system", **SYSTEM)
template("21 template: endless recursion", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + CHAT, "template")
template("21 template: it reaches for Python", CHAT + "{{ ''.__class__.__mro__[1].__subclasses__() }}", "template")
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
template("30 no end: nested loops in a template", LOOPS + CHAT, "template")
template(
    "30 no end: a text of 10^11 characters in a template", "{{ ('a' * 100000000000) | length }}" + CHAT, "template"
)
template("30 no end: a power in a template", "{{ (9 ** (9 ** 9)) % 7 }}" + CHAT, "template")


def settings(name: str, value: Any, *says: Words, ok: bool = False) -> None:
    @tried(f"21 template: {name}", "exit 0" if ok else "refused in one sentence")
    def _(t: Trial) -> None:
        def change(config: dict[str, Any]) -> None:
            config["chat_template"] = value

        t.recipe(model=t.world.with_template(f"named-{zlib.crc32(name.encode())}", change))
        came = t.run("train", "t.toml")
        t.done(came) if ok else t.refused(came, *says)


NAMED = [{"name": "tool_use", "template": CHAT}, {"name": "rag", "template": CHAT}]
settings("named ones without a default", NAMED, ("default", "named"))
settings("named ones with a default", [*NAMED, {"name": "default", "template": CHAT}], ok=True)
settings("a number", 7, "template")


@tried("26 template variables: enable_thinking", "a setting hands it to the template")
def _(t: Trial) -> None:
    came = t.done(t.run("settings", "prompt"))
    lines = [line for line in came.out.splitlines() if "template" in line and "{question}" not in line]
    named = [
        word for line in lines for word in line.split() if word.startswith("prompt.") and word != "prompt.template"
    ]
    t.check(named, f"no setting of prompt gives a template its variables: {came.out[-500:]}")
    text = CHAT + "{% if enable_thinking is not defined %}{{ 1 + 'a' }}{% endif %}"
    t.recipe(model=t.world.with_template("thinking", text))
    t.done(t.run("train", "t.toml", "--set", f"{named[0]}={{enable_thinking = false}}"))
