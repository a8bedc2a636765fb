"""Every setting and every section says what it is."""

from dataclasses import fields

from tinylora.config.help import describe_fields, describe_sections
from tinylora.config.run import RunConfig


def test_every_setting_says_what_it_is() -> None:
    assert [row.key for row in describe_fields() if not row.help] == []
    assert all(row.type and row.default for row in describe_fields())


def test_sections_hold_every_setting_in_order() -> None:
    sections = describe_sections()
    assert [section.name for section in sections] == [f.name for f in fields(RunConfig)]
    assert [row for section in sections for row in section.settings] == describe_fields()


def test_a_section_is_called_by_the_first_paragraph_of_its_docstring() -> None:
    about = {section.name: section.about for section in describe_sections()}
    assert about["optim"] == "How v moves: Adam with a rate (grpo, sft, rft), or steps of so many nats (npg)."
    assert about["adapter"].startswith("W' = W + U") and "Raises" not in about["adapter"]
    assert about["reward"].startswith("Weights of the task's scores")  # no dataclass: its keys are free
    assert all(about.values())
