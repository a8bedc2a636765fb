"""What a chat template is handed: a fixed date, variables, a name; and what of it is one sentence."""

import datetime
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_run import ByteTask, quiet, start, tiny_config
from tiny_tokenizer import CHAT_TEMPLATE

import tinylora.models.template as template_module
from tinylora.config.recipe import apply_overrides
from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.evaluation.compare import compare
from tinylora.evaluation.protocol import protocol_of
from tinylora.evaluation.settings import settings_for_eval
from tinylora.models.base import BaseModel
from tinylora.models.load import encode_prompt, load_base_model
from tinylora.models.template import Handed, render, with_fixed_date
from tinylora.rollouts.runtime import open_runtime
from tinylora.store.adapter import open_adapter
from tinylora.store.run_folder import RunFolder
from tinylora.sweeps.plan import check_same, load_sweep
from tinylora.tasks.config import PromptConfig
from tinylora.training.train import resume, train

USER = [{"role": "user", "content": "1 + 2 ="}]
DATED = "{{ strftime_now('%Y-%m-%d') }}\n" + CHAT_TEMPLATE
FORMATS = ("%d %b %Y", "%A, %-d %B %Y", "%Y-%m-%d %H:%M:%S", "%%d %j %q", "100%", "%B %d, %Y", "", "%y%m%d%")


@pytest.fixture
def base(tiny_folder: Path) -> BaseModel:
    """The tiny Llama."""
    return load_base_model(str(tiny_folder), device="cpu", dtype="float32")


def _with_template(folder: Path, text: str) -> Path:
    (folder / "chat_template.jinja").write_text(text)
    return folder


@pytest.fixture
def days(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The day that the clock shows is the last of these."""
    told = ["2026-01-30"]
    monkeypatch.setattr(template_module, "today", lambda: told[-1])

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Clock":
            return cls.fromisoformat(f"{told[-1]}T11:30:00")

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    return told


@pytest.mark.parametrize("text", FORMATS)
def test_a_fixed_date_is_what_strftime_gives_for_its_midnight(base: BaseModel, text: str) -> None:
    base.tokenizer.chat_template = (
        "\n {{ strftime_now('" + text + "') }}|\n{% if true %}\n x{% endif %}{{ messages[0].content }}"
    )
    told = datetime.datetime(2026, 3, 7).strftime(text)
    assert render(base, USER, Handed(date="2026-03-07")) == f"\n {told}|\n x1 + 2 ="


def test_dates_are_reached_in_every_way_that_templates_use(base: BaseModel) -> None:
    """As Llama 3.2, SmolLM3 and Mistral do: asked whether it is there, kept in a variable, in a macro, cut, changed."""
    base.tokenizer.chat_template = (
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
        "{%- endif %}{%- macro day() %}{{ strftime_now(format='%d') }}{% endmacro -%}"
        "{{ date_string }} {{ day() }} {{ strftime_now('%Y')[2:] }} {{ strftime_now('%m') | int + 1 }}"
        " {{ strftime_now('%B') | upper }} {{ messages[0].content }}"
    )
    assert render(base, USER, Handed(date="2024-02-09")) == "09 Feb 2024 09 24 3 FEBRUARY 1 + 2 ="
    own = Handed(date="2024-02-09", variables={"date_string": "some day"})
    assert render(base, USER, own).startswith("some day 09 ")


def test_a_prompt_without_a_date_is_as_the_library_renders_it(base: BaseModel) -> None:
    mine = render(base, USER, Handed(date="2024-02-09"))
    assert mine == base.tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)


def test_a_run_keeps_the_day_on_which_it_began(
    tiny_folder: Path, tmp_path: Path, fresh_cache: Path, days: list[str]
) -> None:
    _with_template(tiny_folder, DATED)
    whole = start(tiny_folder, tmp_path / "whole", train={"steps": 2})
    assert RunFolder.open(whole.run).read_config().prompt.date == "2026-01-30"
    half = start(tiny_folder, tmp_path / "half", train={"steps": 1})
    days.append("2026-01-31")
    said: list[str] = []
    done = resume(half.run, ["train.steps=2"], task=ByteTask(), say=said.append)
    assert done.v.equal(whole.v)
    assert not any("date" in text for text in said)
    other = start(tiny_folder, tmp_path / "other", train={"steps": 2})
    assert not other.v.equal(whole.v)  # the day is in the prompts
    again = start(tiny_folder, tmp_path / "again", train={"steps": 2}, prompt={"date": "2026-01-30"})
    assert again.v.equal(whole.v)


def test_a_day_is_kept_only_where_prompts_show_one(
    tiny_folder: Path, tmp_path: Path, fresh_cache: Path, days: list[str]
) -> None:
    plain = start(tiny_folder, tmp_path / "plain", train={"steps": 1})
    assert RunFolder.open(plain.run).read_config().prompt.date == ""
    base = load_base_model(str(_with_template(tiny_folder, DATED)), device="cpu", dtype="float32")
    assert with_fixed_date(base, PromptConfig(chat=False)).date == ""
    assert with_fixed_date(base, PromptConfig()).date == "2026-01-30"
    assert with_fixed_date(base, PromptConfig(date="2024-05-01")).date == "2024-05-01"


def test_a_run_that_kept_no_day_goes_on_and_says_which_it_takes(
    tiny_folder: Path, tmp_path: Path, fresh_cache: Path, days: list[str]
) -> None:
    """Runs of older versions."""
    _with_template(tiny_folder, DATED)
    run = start(tiny_folder, tmp_path / "runs", train={"steps": 1}).run
    folder = RunFolder.open(run)
    old = folder.config_path.read_text().replace('date = "2026-01-30"\n', "")
    assert "2026" not in old

    def as_of_old() -> None:
        folder.config_path.write_text(old)
        with folder.lock():
            saved = folder.load_checkpoint()
            assert saved is not None
            saved.state.pop("settings")
            folder.save_checkpoint(saved.state)

    as_of_old()
    said: list[str] = []
    resume(run, ["train.steps=2"], task=ByteTask(), say=said.append)
    began = folder.day_of_start()
    assert any("did not keep" in text and began in text for text in said)
    assert folder.read_config().prompt.date == began
    with pytest.raises(UserError, match=r"prompt\.date"):
        resume(run, ["train.steps=3", "prompt.date=2026-01-01"], task=ByteTask(), say=quiet)
    as_of_old()
    resume(run, ["train.steps=3", "prompt.date=2026-01-01"], task=ByteTask(), say=quiet)
    assert folder.read_config().prompt.date == "2026-01-01"


def test_evaluations_of_two_days_have_two_protocols(
    tiny_folder: Path, tmp_path: Path, fresh_cache: Path, days: list[str]
) -> None:
    _with_template(tiny_folder, DATED)
    replies = tmp_path / "untrained.jsonl"
    sizes = {"train": {"steps": 1}, "eval": {"num_test": 0}}
    runs = [start(tiny_folder, tmp_path / "runs", **sizes).run]
    days.append("2026-01-31")
    runs.append(start(tiny_folder, tmp_path / "runs", **sizes).run)

    def evaluate(run: Path) -> str:
        opened = open_adapter(run)
        runtime = open_runtime(settings_for_eval(opened.settings()), task=ByteTask(), say=quiet, on=opened)
        done = compare(runtime, opened.v, label=run, num_items=2, untrained=replies, base_id="one", say=quiet)
        return done.protocol

    days.append("2026-02-01")
    first = evaluate(runs[0])
    assert evaluate(runs[0]) == first  # another day, and the same prompts
    with pytest.raises(UserError, match="protocol"):
        evaluate(runs[1])
    replies.unlink()
    assert evaluate(runs[1]) != first


def test_a_recipe_for_other_questions_keeps_the_days_of_the_run(tmp_path: Path) -> None:
    trained = apply_overrides(RunConfig(), ["prompt.date=2026-01-30"])
    assert settings_for_eval(trained, "demo").prompt.date == "2026-01-30"
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[prompt]\ndate = "2020-02-02"\n')
    assert settings_for_eval(trained, str(recipe)).prompt.date == "2020-02-02"


def test_the_cells_of_a_sweep_have_one_day(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text('recipe = "demo"\n[[cell]]\nname = "a"\n')
    sweep = load_sweep(tmp_path / "s.toml")
    begun = sweep.on_day("2026-01-30")
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / f"{sweep.name}.toml").write_text(begun.recipe_text())
    (folder / "sweep.toml").write_text(begun.text())
    stored = check_same(sweep, folder)
    assert stored is not None and stored.base.prompt.date == "2026-01-30"


def test_variables_reach_the_template_everywhere(tiny_folder: Path, tmp_path: Path, fresh_cache: Path) -> None:
    _with_template(tiny_folder, "{{ 'think ' if enable_thinking else 'no ' }}" + CHAT_TEMPLATE)
    config = tiny_config(tiny_folder, prompt={"template_variables": {"enable_thinking": True}})
    runtime = open_runtime(config, task=ByteTask(), say=quiet)
    item = ByteTask().items("test")[0]
    assert runtime.base.tokenizer.decode(runtime.encode(ByteTask().prompt(item))).startswith("think ")
    off = replace(runtime, config=tiny_config(tiny_folder))
    assert off.base.tokenizer.decode(off.encode(ByteTask().prompt(item))).startswith("no ")
    hashes = {protocol_of(one.config, ByteTask(), [item]) for one in (runtime, off)}
    assert len(hashes) == 2
    run = train(apply_overrides(config, ["train.steps=1"]), ByteTask(), out=tmp_path / "runs", say=quiet).run
    assert open_adapter(run).settings().prompt.template_variables == {"enable_thinking": True}


def test_a_variable_that_the_template_does_not_read_is_said(
    tiny_folder: Path, fresh_cache: Path, base: BaseModel
) -> None:
    _with_template(tiny_folder, "{% if enable_thinking %}<think>{% endif %}** | random **" + CHAT_TEMPLATE)
    for name, told in (("enable_thinking", []), ("enable_thinkng", ["did you mean enable_thinking?"])):
        said: list[str] = []
        config = tiny_config(tiny_folder, prompt={"template_variables": {name: True}})
        open_runtime(config, task=ByteTask(), say=said.append)
        words = [text for text in said if "does not read" in text]
        assert len(words) == len(told) and all(one in text for one, text in zip(told, words, strict=True))


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "tokenize", "strftime_now"])
def test_variables_with_a_meaning_of_their_own_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"template_variables must be .*{name}"):
        PromptConfig(template_variables={name: True})


def test_variables_are_set_on_the_command_line() -> None:
    config = apply_overrides(RunConfig(), ["prompt.template_variables.enable_thinking=false", "prompt.date=2026-01-30"])
    assert config.prompt.template_variables == {"enable_thinking": False} and config.prompt.date == "2026-01-30"


@pytest.mark.parametrize("day", ["yesterday", "2026-02-30", "20260101", "2026-01-01T00:00"])
def test_a_day_that_is_none_is_refused(day: str) -> None:
    with pytest.raises(UserError, match="a day such as 2026-01-31"):
        PromptConfig(date=day)


# --- templates that do not work ---


def test_named_templates_without_a_default_are_a_sentence_and_can_be_named(base: BaseModel) -> None:
    base.tokenizer.chat_template = {"rag": "{{ messages[0].content }} rag", "tool_use": CHAT_TEMPLATE}
    with pytest.raises(UserError, match=r"several chat templates \(rag, tool_use\).*prompt\.template_name"):
        encode_prompt(base, USER)
    assert base.tokenizer.decode(encode_prompt(base, USER, handed=Handed(name="rag"))) == "1 + 2 = rag"
    with pytest.raises(UserError, match="none called 'rga'"):
        encode_prompt(base, USER, handed=Handed(name="rga"))
    base.tokenizer.chat_template = {"default": "{{ messages[0].content }}!", "rag": CHAT_TEMPLATE}
    assert base.tokenizer.decode(encode_prompt(base, USER)) == "1 + 2 =!"
    base.tokenizer.chat_template = CHAT_TEMPLATE
    with pytest.raises(UserError, match="one chat template and no names"):
        encode_prompt(base, USER, handed=Handed(name="rag"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages[0]['content'].encode('ascii').decode('utf-99') }}", "LookupError"),
        ("{{ strftime_now(3) }}", "TypeError"),
        ("{% for x in %}", "refuses these turns"),
        ("{{ undefined_function() }}", "refuses these turns"),
        ("{{ 10 ** 10 ** 10 }}", "computes powers"),
        ("{{ messages[0].content | random }}", "draws at random"),
        ("{{ lipsum(n=1) }}", "draws at random"),
        ("{{ 'ab' * 9999999 }}", "refuses these turns .* makes 19,999,998 characters"),
        ("{{ messages.__class__.__mro__ }}", "refuses these turns"),
    ],
)
@pytest.mark.parametrize("date", ["", "2026-01-30"])
def test_whatever_a_template_raises_is_a_sentence(base: BaseModel, text: str, told: str, date: str) -> None:
    base.tokenizer.chat_template = text
    with pytest.raises(UserError, match=rf"the chat template of .* {told}|\({told}: ") as caught:
        encode_prompt(base, USER, handed=Handed(date=date))
    assert "prompt.chat=false" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_template_that_does_not_end_is_a_sentence(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, in_thread: bool
) -> None:
    monkeypatch.setattr(template_module, "SECONDS", 0.2)
    loops = "".join("{% for " + name + " in range(99999) %}" for name in "abcd")
    base.tokenizer.chat_template = loops + "{% endfor %}" * 4
    found: list[Exception] = []

    def ask() -> None:
        try:
            encode_prompt(base, USER)
        except UserError as error:
            found.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start() if in_thread else ask()
    if in_thread:
        thread.join(60)
    assert len(found) == 1 and "has not ended after 0.2 seconds" in str(found[0])
    base.tokenizer.chat_template = CHAT_TEMPLATE
    assert encode_prompt(base, USER)  # and nothing is left behind
