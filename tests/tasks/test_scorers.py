"""Scorers against hand-written tables, Python's own Fraction and json, and properties over random text."""

import json
import threading
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylora.errors import UserError
from tinylora.tasks.build import SCORERS, make_scorer
from tinylora.tasks.scorers.json_text import json_objects
from tinylora.tasks.scorers.latex import last_boxed
from tinylora.tasks.scorers.numeric import last_number, parse_number
from tinylora.tasks.scorers.operand import final_number
from tinylora.tasks.scorers.text import TextScorer

quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)  # same cases on every machine


def scores(name, answer, text, **options):
    result = make_scorer(name, options).score(answer, text)
    return result["strict"], result["value_only"]


RIGHT, FORMAT, WRONG = (1.0, 1.0), (0.0, 1.0), (0.0, 0.0)


@pytest.mark.parametrize(
    ("answer", "text", "only", "final"),
    [
        ("42", "42", RIGHT, RIGHT),
        ("42", " 42.0.\n", RIGHT, RIGHT),
        ("42.00", "+42", RIGHT, RIGHT),
        ("1234567", "1,234,567.", RIGHT, RIGHT),
        ("1,000", "1000", RIGHT, RIGHT),
        ("-8", "\N{MINUS SIGN}8", RIGHT, RIGHT),
        ("42", "17 + 25 = 42.", FORMAT, RIGHT),
        ("-8", "17 - 25 = -8", FORMAT, RIGHT),
        ("42", "It is 41.\n\nNo: 42\n", FORMAT, RIGHT),
        ("42", "It is 42 apples.", FORMAT, FORMAT),
        ("42", "42!", FORMAT, FORMAT),
        ("25", "0 + 25", FORMAT, FORMAT),  # a sum that was not worked out
        ("42", "5/42", FORMAT, FORMAT),
        ("42", "x42", FORMAT, FORMAT),
        ("30", "3:30", FORMAT, FORMAT),
        ("30", "The answer:30", FORMAT, RIGHT),
        ("1200", "It is 1{,}200", FORMAT, RIGHT),
        ("14", "3,14", FORMAT, FORMAT),
        ("2345", "1,2345", FORMAT, FORMAT),  # commas in the wrong places separate
        ("3", "5-3", FORMAT, FORMAT),
        ("-3", "5-3", WRONG, WRONG),
        ("42", "42, or 43", WRONG, WRONG),
        ("42", "", WRONG, WRONG),
        ("42", "forty-two", WRONG, WRONG),
        ("314", "3,14", WRONG, WRONG),
        ("42", "٤٢", WRONG, WRONG),
        ("0.1", "0.10000000000000001", WRONG, WRONG),  # equal as floats
    ],
)
def test_number(answer, text, only, final):
    assert scores("number", answer, text) == only
    assert scores("number", answer, text, style="final") == final


@quick
@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
def test_numbers_are_read_as_python_reads_fractions(mantissa, places):
    whole, part = divmod(abs(mantissa), 10**places)
    sign = "-" if mantissa < 0 else ""
    written = f"{sign}{whole:,}" + (f".{part:0{places}d}" if places else "")
    expected = Fraction(mantissa, 10**places)
    assert Fraction(parse_number(f" {written}\n")) == expected
    assert Fraction(last_number(f"first 17, then {written} apples")) == expected
    assert final_number(f"so it is {written}.") == written


@quick
@given(st.text(alphabet="0123456789.,+-eE \n=x$/", max_size=40))
def test_number_readers_take_any_text(text):
    value = parse_number(text)
    if value is not None:
        assert last_number(text) == value
        assert parse_number(final_number(text) or "") == value


def test_huge_exponents_are_not_worked_out():
    assert last_number("1e9999999999999999999999") is not None
    assert parse_number("1e99999999") is None


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{42}", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"so \boxed{\frac{1}{\sqrt{2}}} holds", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed {7}", "7"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{\boxed{3}}", "3"),
        ("} \\boxed{4}", "4"),
        (r"\boxed{", None),
        (r"\boxed42", None),
        ("42", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def test_last_boxed_is_linear():
    assert last_boxed(r"\boxed{" * 50_000) is None


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("42", r"\boxed{42.0}", RIGHT),
        ("70000", r"\boxed{\$70{,}000}", RIGHT),
        (r"\frac{1}{2}", r"$\boxed{\dfrac{1}{2}}$.", RIGHT),
        ("50", r"\boxed{50\%}", RIGHT),
        ("Paris", r"\boxed{\text{Paris}}", RIGHT),
        ("18", r"\boxed{18 \text{ dollars}}", RIGHT),
        ("1200", r"\boxed{\$1,200\,\mathrm{USD}}", RIGHT),
        (r"5 \text{ cm}", r"\boxed{5}", RIGHT),
        ("90", r"\boxed{90^\circ}", RIGHT),
        ("16", r"\boxed{16 \text{ cm}^3}", RIGHT),
        ("42", r"\boxed{{42}}", RIGHT),
        ("18", r"\boxed{19 \text{ dollars}}", WRONG),
        ("2", r"\boxed{2 \text{ million}}", FORMAT),  # no unit
        ("2", r"\boxed{2 \text{ or } 3}", WRONG),
        ("New York", r"It is New York", FORMAT),
        ("42", "The answer is 42.", FORMAT),
        ("42", r"\boxed{41}", WRONG),
        ("42", r"\boxed{42} no, \boxed{41}", WRONG),
        ("Paris", "comparison", WRONG),
    ],
)
def test_boxed(answer, text, expected):
    assert scores("boxed", answer, text) == expected


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("yes", " yes\n", RIGHT),
        ("café", "cafe\N{COMBINING ACUTE ACCENT}", RIGHT),
        ("yes", "Yes", FORMAT),
        ("yes", "I say yes.", FORMAT),
        ("yes", "eyes", WRONG),
        ("yes", "no", WRONG),
        ("C++", "It is c++.", FORMAT),
    ],
)
def test_exact(answer, text, expected):
    assert scores("exact", answer, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("A cat sat.", RIGHT), ("A CAT sat.", FORMAT), ("concatenate", WRONG), ("", WRONG)],
)
def test_contains(text, expected):
    assert scores("contains", "cat", text) == expected


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("42", "Answer: 42", RIGHT),
        ("42", "Answer: 7\nAnswer: 42.0", RIGHT),
        ("42", "Answer: 42\nAnswer: 7", WRONG),
        ("42", "It is 42", FORMAT),
    ],
)
def test_regex(answer, text, expected):
    assert scores("regex", answer, text, pattern=r"Answer: (\S+)") == expected


@pytest.mark.parametrize(
    ("text", "strict", "value_only", "fields"),
    [
        ('{"a": 1, "b": "x"}', 1, 1, 1),
        (' {"b": "x", "a": 1.0, "more": null} ', 1, 1, 1),
        ('Here: {"a": 1, "b": "x"}.', 0, 1, 1),
        ('```json\n{"a": 1, "b": "x"}\n```', 0, 1, 1),
        ('{"a": 1, "b": "y"}', 0, 0, 0.5),
        ('{"a": true, "b": "x"}', 0, 0, 0.5),  # true is not 1
        ('{"a": "1", "b": "x"}', 0, 0, 0.5),
        ('{"a": 1, "b": "x"} or {"a": 2, "b": "y"}', 0, 0, 0),
        ('{"a": 1, "b": "x"', 0, 0, 0),
        ('{"a": NaN, "b": "x"}', 0, 0, 0),
        ('[{"a": 1, "b": "x"}]', 0, 1, 1),
        ("{" * 5000, 0, 0, 0),
        ('{"a":' * 5000, 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_json_fields(text, strict, value_only, fields):
    result = make_scorer("json-fields", {}).score('{"a": 1, "b": "x"}', text)
    assert result == {"strict": strict, "value_only": value_only, "fields": fields}


def test_json_fields_named():
    assert scores("json-fields", '{"a": 1, "b": "x"}', '{"a": 1}', fields=["a"]) == RIGHT
    with pytest.raises(UserError, match="lacks the field 'c'"):
        make_scorer("json-fields", {"fields": ["c"]}).check_answer('{"a": 1}')


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-100, 100) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@quick
@given(st.dictionaries(st.text(), json_values, min_size=1, max_size=4), st.text(alphabet="ab }]\n", max_size=10))
def test_json_round_trip_scores_full(value, around):
    answer = json.dumps(value)
    assert scores("json-fields", answer, json.dumps(value, indent=2, ensure_ascii=False)) == RIGHT
    assert scores("json-fields", answer, f"{around}{answer}{around}")[1] == 1.0


OPTIONS = {"regex": {"pattern": r"(\d+)\b"}}
ANSWERS = {"json-fields": '{"a": 1}', "slots": '{"a": "1"}'}


@quick
@given(st.text() | st.text(alphabet='0123456789.{}\\boxed"a:1 ', max_size=60))
def test_strict_implies_value_and_a_parsed_answer(text):
    for name in sorted(
        name for name, kind in SCORERS.items() if issubclass(kind, TextScorer) and name != "math-verify"
    ):
        scorer = make_scorer(name, OPTIONS.get(name, {}))
        result = scorer.score(ANSWERS.get(name, "1"), text)
        assert all(0 <= value <= 1 for value in result.values())
        assert result == scorer.score(ANSWERS.get(name, "1"), text)
        if result["strict"]:
            assert result["value_only"] == 1 and scorer.parse(text) is not None


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("1/2", r"So \boxed{\frac{1}{2}}.", RIGHT),
        (r"\frac{1}{2}", r"\boxed{0.5}", RIGHT),
        ("1/2", "So $\\frac{2}{4}$ it is.", FORMAT),
        ("1/2", r"\boxed{\frac{1}{3}}", WRONG),
        ("x+1", r"\boxed{1 + x}", RIGHT),
        ("42", r"\boxed{42.}", RIGHT),
        ("42", r"\boxed{.}", WRONG),
        ("42", "", WRONG),
        ("42", r"\boxed{\frac{}{}{}^{_}}", WRONG),
    ],
)
def test_math_verify(answer, text, expected):
    assert scores("math-verify", answer, text) == expected


def test_math_verify_says_when_it_cannot_work():
    with pytest.raises(UserError, match="cannot read|finds no mathematics"):
        make_scorer("math-verify", {}).score("", r"\boxed{1}")
    caught = []

    def in_thread():
        try:
            make_scorer("math-verify", {}).score("1", "1")
        except UserError as error:
            caught.append(str(error))

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join(60)
    assert caught and "main thread" in caught[0]


def test_math_verify_time_out_shows(monkeypatch):
    import math_verify
    from math_verify.errors import TimeoutException

    def late(*args, **kwargs):
        raise TimeoutException("late")

    scorer = make_scorer("math-verify", {})
    scorer.score("42", "42")  # reads the answer before the clock runs out
    monkeypatch.setattr(math_verify, "verify", late)
    assert scorer.score("42", "42") == {"strict": 0.0, "value_only": 0.0, "timed_out": 1.0}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("numbr", {}, "task.scorer must be one of exact, number, .*did you mean 'number'"),
        ("number", {"style": "loose"}, "style must be 'only' or 'final', got 'loose'"),
        ("number", {"stile": "only"}, "no option 'stile'; it has: style"),
        ("exact", {"x": 1}, "no option 'x'; it has: none"),
        ("regex", {}, "needs scorer_options.pattern"),
        ("regex", {"pattern": "("}, "is no regular expression"),
        ("regex", {"pattern": "a"}, "exactly one group"),
        ("regex", {"pattern": "(a)(b)"}, "has 2"),
        ("json-fields", {"fields": "a"}, "must be a list of names"),
        ("math-verify", {"timeout_seconds": 0}, "at least 1, got 0"),
        ("reasoning-gym", {}, "scores reasoning-gym tasks only"),
    ],
)
def test_bad_scorers(name, options, message):
    with pytest.raises(UserError, match=message):
        make_scorer(name, options)


def test_a_million_braces_take_no_minutes() -> None:
    """Each error of the decoder counts all lines before it: this took minutes."""
    assert list(json_objects("{" * 1_000_000)) == []
    assert [found for found, _, _ in json_objects('{{ "a": 1} {} { "b": {"c": 2}}')] == [{"a": 1}, {}, {"b": {"c": 2}}]
