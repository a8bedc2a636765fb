"""Every number among the settings has a largest value: what is beyond it, infinite, none, or true is a sentence."""

from dataclasses import fields, is_dataclass, replace

import pytest

from tinylora.config.recipe import apply_overrides
from tinylora.config.run import RunConfig
from tinylora.errors import UserError

DEFAULT = RunConfig()
NUMBERS = [
    (section.name, field.name, type(getattr(getattr(DEFAULT, section.name), field.name)))
    for section in fields(DEFAULT)
    if is_dataclass(getattr(DEFAULT, section.name))
    for field in fields(getattr(DEFAULT, section.name))
    if type(getattr(getattr(DEFAULT, section.name), field.name)) in (int, float)
]


def test_there_are_numbers() -> None:
    assert len(NUMBERS) > 40


@pytest.mark.parametrize(("section", "name", "kind"), NUMBERS)
def test_no_number_is_beyond_sense(section: str, name: str, kind: type) -> None:
    wrong = ["true", '"1"', "nan", "-inf", "1e300", "-1e300"] if kind is float else ["true", "1.5", "inf"]
    wrong += [str(10**30), str(-(10**30)), "9" * 400]
    for text in wrong:
        with pytest.raises(UserError, match=rf"{section}\.{name}|share") as error:
            apply_overrides(DEFAULT, [f"{section}.{name}={text}"])
        assert len(str(error.value)) < 1000
    old = getattr(DEFAULT, section)
    with pytest.raises(UserError):
        replace(DEFAULT, **{section: replace(old, **{name: True})})


@pytest.mark.parametrize(
    "setting",
    ["generation.kv_budget_gib=1e300", "grpo.group_size=100000000", "grpo.prompts_per_step=100000000",
     "train.num_threads=100000", "train.memory_budget_gib=1e300", "train.seed=9223372036854775808"],
)  # fmt: skip
def test_what_was_seen(setting: str) -> None:
    with pytest.raises(UserError, match=setting.partition("=")[0]):
        apply_overrides(DEFAULT, [setting])


def test_large_and_sensible() -> None:
    settings = """generation.kv_budget_gib=500 train.steps=1000000 grpo.group_size=1024 train.seed=9223372036854775807
        grpo.max_logprob_gap=inf train.num_threads=512 train.micro_batch_tokens=10000000"""
    apply_overrides(DEFAULT, settings.split())
