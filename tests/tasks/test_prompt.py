"""prompt.pattern: the part of a question that the prompt shows."""

import pytest

from tinylora.errors import UserError
from tinylora.tasks.config import PromptConfig
from tinylora.tasks.prompt import Prompt


def test_the_pattern_keeps_its_first_group_of_the_question() -> None:
    prompt = Prompt(PromptConfig(template="Solve {question}, {please}.", pattern=r"calculate: (.*?) ="))
    (message,) = prompt.messages("Please calculate: 3 + {4} = ?")
    assert message == {"role": "user", "content": "Solve 3 + {4}, {please}."}


def test_solved_examples_are_shown_as_they_were_written() -> None:
    shots = ({"question": "1 + 1", "answer": "2"},)
    messages = Prompt(PromptConfig(pattern=r"is (.*)\?", few_shot=shots)).messages("what is 3?")
    assert [message["content"] for message in messages] == ["1 + 1", "2", "3"]


def test_a_question_that_the_pattern_does_not_match_is_shown() -> None:
    prompt = Prompt(PromptConfig(pattern=r"calculate (\d+)"))
    with pytest.raises(UserError, match=r"prompt\.pattern .* does not match the question 'add 3'"):
        prompt.messages("add 3")


@pytest.mark.parametrize(("pattern", "message"), [("(", "is no regular expression"), ("abc", "has no group")])
def test_a_pattern_that_cannot_work_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Prompt(PromptConfig(pattern=pattern))
