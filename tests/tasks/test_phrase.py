"""Answers that stand in a reply, and those that are a part of something there. Tables made by hand."""

import pytest

from tinylora.tasks.build import make_scorer


def found(name, answer, text):
    return make_scorer(name, {}).score(answer, text)["value_only"] == 1


@pytest.mark.parametrize("name", ["contains", "exact"])
@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("1", "1.5"),
        ("1", "1,000"),
        ("5", "-5"),
        ("5", "-$5"),
        ("$5", "-$5"),
        ("5", "is – 5"),
        ("1", "1/2"),
        ("2", "1/2"),
        ("15", "3:15"),
        ("1.2", "1.2.3"),
        ("3", "1.2.3"),
        ("10", "10^5"),
        ("1", "1e5"),
        ("1", "１.５"),
        ("7", "7th"),
        ("5", "5x"),
        ("00", "1,000"),
        ("500", r"9\,500"),
        ("cat", "concatenate"),
        ("кот", "котик"),
        ("can", "I can't"),
        ("d", "I'd say"),
        ("I", "I’m sure"),
        ("リン", "プリン"),
        ("三", "三十"),
        ("울", "서울"),
        ("क", "की"),
        ("पुस्तक", "पुस्तकें"),
        ("é", "cafe\u0301"),
    ],
)
def test_a_part_is_not_found(name, answer, text):
    assert not found(name, answer, f"It is {text} there") and not found(name, answer, text)


@pytest.mark.parametrize("name", ["contains", "exact"])
@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("東京", "答えは東京です"),
        ("北京", "答案是北京。"),
        ("กรุงเทพ", "คำตอบคือกรุงเทพครับ"),
        ("서울", "답은 서울입니다"),
        ("パリ", "答えはパリです"),
        ("Tokyo", "答えはTokyoです"),
        ("5", "答えは5です"),
        ("三", "第三回"),
        ("5", "5%"),
        ("5", "$5"),
        ("5", "5."),
        ("5", "x=5"),
        ("5", "1, 5, 7"),
        ("5", "5.0"),
        ("1000", "1,000"),
        ("-5", "It is −5"),
        ("5", "3-5"),
        ("5", "- 4\n- 5"),
        ("1.2.3", "v 1.2.3."),
        ("1/2", "1/2"),
        ("2023", "2023-05-01"),
        ("2023", "05/01/2023"),
        ("C++", "It is C++."),
        ("Paris", "Paris's"),
        ("eau", "l'eau"),
        ("well", "well-known"),
        ("Zürich", "Zu\u0308rich"),
    ],
)
def test_a_whole_is_found(name, answer, text):
    assert found(name, answer, text)


def test_contains_is_strict_as_written():
    scorer = make_scorer("contains", {})
    assert scorer.score("東京", "答えは東京です") == {"strict": 1, "value_only": 1}
    assert scorer.score("5", "It is 5.0") == {"strict": 0, "value_only": 1}


def test_long_replies_take_no_minutes():
    scorer = make_scorer("contains", {})
    assert scorer.score("1", "1.5 " * 50_000) == {"strict": 0, "value_only": 0}
    assert make_scorer("number", {"style": "final"}).score("1", "- 1 " * 50_000)["strict"] == 0
