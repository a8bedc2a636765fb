"""Numbers in replies: their sign, their thousands, and whether one at the end is an answer. Tables made by hand."""

from decimal import Decimal

import pytest

from tinylora.config.recipe import load_recipe
from tinylora.tasks.build import make_scorer
from tinylora.tasks.scorers.numeric import last_number, parse_number


def final(answer, text):
    return make_scorer("number", {"style": "final"}).score(answer, text)["strict"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "The profit is -$5.",
        "The profit is –$5.",
        "The profit is −$5",
        "The profit is –5",
        "The profit is - 5.",
        "- 5",
        "–€5",
        "The profit is − 5",
        r"It is -\$5",
        "It is $-5",
        r"It is \$-5",
        "It is -US$5",
        "- $5",
        "Profit: - 5",
        "= -5",
        "= – 5",
        "答えは－５",
        "温度是-5",
        "It is negative 5",
        "It is minus $5",
        "17 minus 22 equals -5",
        "Number 3 is -5",
        "(a) -5",
    ],
)
def test_a_number_keeps_its_sign(text):
    """ "The profit is -$5." was 5: right for the answer 5, and wrong for -5."""
    assert last_number(text) == -5
    assert final("-5", text) and not final("5", text)


@pytest.mark.parametrize(
    "text",
    [
        "5-3",
        "5 - 3",
        "5 -3",
        "5 –3",
        "5–3",
        "x - 3",
        "x -3",
        "(5) - 3",
        "10$ - $3",
        "5 cm - 3",
        "- 2\n- 3",
        "3—3",
        "5 minus 3",
    ],
)
def test_what_is_no_sign(text):
    assert last_number(text) == 3
    assert not final("3", text) and not final("-3", text)


@pytest.mark.parametrize(
    "text", ["The answer — 5", "The answer – 5", "=> 5", "-> 5", "→ 5", "x = 5", "Answer: 5", "1: 5", "It is $5."]
)
def test_dashes_and_arrows_that_are_none(text):
    assert final("5", text)


@pytest.mark.parametrize(
    "text",
    [
        r"5 \times 10",
        r"5 \cdot 10",
        r"5\cdot10",
        r"100 \div 10",
        "5 × 10",
        "5 ⋅ 10",
        "5 * 10",
        "5 ** 10",
        "5 x 10",
        "5 / 10",
        "5 ÷ 10",
        "5 ^ 10",
        "5 + 10",
        "5 + $10",
        "5 × €10",
        "5 ± 10",
        r"\pm 10",
        r"\sqrt 10",
        "√10",
        r"\log 10",
        r"\frac{1}10",
        "5 % 10",
        "5 mod 10",
        "5 plus 10",
        "5 times 10",
        "5 divided by 10",
        "5 and 10",
        "5 or 10",
        "1, 2, 10",
        "1,2,10",
        "1; 10",
        "1、10",
        "1 2 10",
        "2 1/10",
        "1/10",
        "3–10",
        "3 to 10",
        "3~10",
        "3 : 10",
        "3:10",
        "3 out of 10",
        "10% of 10",
        "x < 10",
        r"x \le 10",
        "x > 10",
        "x != 10",
        "v1.2.10",
        "2023-05-10",
        "05/10",
        "x = 5 or x = 10",
        "x_10",
        "2^10",
        "x10",
    ],
)
def test_a_part_of_something_is_no_answer(text):
    """`5 \\times 10` was 10, as "1, 2, 3" was 3, while "5 × 10" was refused."""
    assert not final("10", text)
    assert final("10", f"{text} = 10")


@pytest.mark.parametrize(
    "text",
    [
        r"9\,500",
        r"9,\!500",
        "9{,}500",
        "9,500",
        "9\u2009500",
        "9\u202f500",
        "9\u00a0500",
        "9 500",
        "9'500",
        "９５００",
        "9~500",
        r"9{\,}500",
    ],
)
def test_groups_of_three_are_one_number(text):
    """Outside of a box, `9\\,500` was 500."""
    assert last_number(f"It is {text} in all") == 9500
    assert final("9500", f"It is {text}.") and not final("500", f"It is {text}.")
    assert make_scorer("number", {}).score("9500", text)["strict"] == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1, 200", 200),
        (r"1,\, 200", 200),
        ("12 345 6", 6),
        ("1\u20092", 2),
        ("0,123", 123),
        ("3,14", 14),
        ("2020 300", 300),
    ],
)
def test_other_groups_are_several(text, value):
    assert last_number(text) == value and parse_number(text) is None


def test_an_answer_with_spaces_is_no_number():
    assert parse_number("12 345") is None and parse_number("12 345", spaced=True) == 12345
    assert parse_number("１２") == 12 and parse_number("–5") == -5 and parse_number("- 5") == Decimal(-5)
    assert parse_number("−5") == -5 and parse_number("٤٢") is None


def test_gsm8k_in_the_harness_form_keeps_the_sign_and_no_period():
    """Its `####` filter takes no currency sign, as the harness's does not; value only is the harness's -3."""
    preset = load_recipe("gsm8k-lm-eval").task
    scorer = make_scorer(preset.scorer, preset.scorer_options)
    assert scorer.score("-3", "#### -$3") == {"strict": 0, "value_only": 1}
    assert scorer.score("3", "#### -$3") == {"strict": 0, "value_only": 0}
    assert scorer.score("-3", "#### -3.") == {"strict": 1, "value_only": 1}


@pytest.mark.parametrize(
    ("answer", "text", "strict"),
    [
        ("42", "Answer: 42.", 1),
        ("Paris", "Answer: Paris.", 1),
        ("U.S.", "Answer: U.S.", 1),
        ("東京", "Answer: 東京。", 1),
        ("42", "Answer: 42..", 0),
        ("4", "Answer: 4.2", 0),
    ],
)
def test_regex_leaves_a_final_period_out(answer, text, strict):
    assert make_scorer("regex", {"pattern": r"Answer: (\S+)"}).score(answer, text)["strict"] == strict
