"""Names of folders made of any text."""

import re

import pytest

from tinylora.errors import UserError
from tinylora.system.folders import LONGEST_NAME, check_name, folder_name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("demo", "demo"),
        ("gsm8k-0.5b", "gsm8k-0.5b"),
        ("my task", "my-task"),
        ("Übung 3 (neu)", "Ubung-3-neu"),
        ("a.b..c", "a.b..c"),
        (".hidden", "hidden"),
        ("--help", "help"),
        ("a/b\\c:d*e", "a-b-c-d-e"),
        ("日本", "run"),
        ("🚀 rocket 🚀", "rocket"),
        ("..", "run"),
        ("", "run"),
        ("a\nb\0c", "a-b-c"),
        ("x" * 300, "x" * LONGEST_NAME),
    ],
)
def test_a_name_is_made_of_any_text(text, name):
    assert folder_name(text) == name
    check_name(name, "it")
    assert re.fullmatch(r"[\x21-\x7e]+", name)


@pytest.mark.parametrize("name", ["a b", "", ".a", "é", "a/b", "x" * 101])
def test_names_that_are_refused(name):
    with pytest.raises(UserError, match="^it must"):
        check_name(name, "it")
