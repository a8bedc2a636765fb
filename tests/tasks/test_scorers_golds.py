"""Gold answers are looked at when a task is loaded: what no reply matches, or what means something else, is refused."""

import json
from typing import Any

import pytest

from tinylora.errors import UserError
from tinylora.tasks.build import build_task, make_scorer
from tinylora.tasks.config import PromptConfig, TaskConfig
from tinylora.tasks.sets.mbpp import _BLOCK

OPTIONS: dict[str, dict[str, Any]] = {"regex": {"pattern": "answer is (.*)"}}


def jsonl(path, answers, **options):
    lines = (f'{{"question": "q{i}", "answer": {answer}}}\n' for i, answer in enumerate(answers))
    path.write_text("".join(lines), encoding="utf-8")
    return build_task(
        TaskConfig(name="jsonl", path=str(path), validation_share=0.0, test_share=0.0, **options), PromptConfig()
    )


@pytest.mark.parametrize(
    "answer",
    [
        "12:00",
        "9:30",
        "09:05:00",
        "1/0",
        "0/0",
        "1 000",
        r"1\,000",
        "2023-05-01",
        "05/01/2023",
        "2023-05",
        "3.14.15",
        "1.2.3.4",
        "listen",
        "Evelyn",
        "no solution",
        "yes",
        "no",
        "True",
        "true",
        "東京",
        "pi/2",
        "sin(x)",
        "3 dollars",
        "１２",
        "1e5",
        "1.5e-3",
        "2 1/2",
        "1 2",
        "3–5",
        "-$5",
        "€5",
        "½",
        "\u200b",
        r"\text{ }",
        "CAB",
    ],
)
def test_math_verify_refuses_answers_that_mean_something_else(tmp_path, answer):
    """One answer of 40 written "１２" ended a run at step 11 and every resume; "listen" took `\boxed{silent}`."""
    with pytest.raises(UserError, match=r"question 'q1': scorer math-verify|'answer' is blank"):
        jsonl(tmp_path / "a.jsonl", ['"1"', json.dumps(answer)], scorer="math-verify")


@pytest.mark.parametrize(
    "answer",
    [
        "5",
        "-5",
        "−5",
        "0.5",
        ".5",
        "1,000",
        r"10,\!080",
        r"\$32,\!348",
        "$5",
        "50%",
        r"50\%",
        "5 cm",
        r"5.4 \text{ cents}",
        r"90^\circ",
        "1/2",
        r"\frac{1}{2}",
        r"\frac12",
        r"\frac 1 2",
        r"3\frac12",
        "$\\frac{1}{2}$",
        r"\boxed{5}",
        r"11\sqrt2",
        r"3 \pm 2 \sqrt{2}",
        "(1,2)",
        "(1, 2, 3)",
        "[0,1)",
        r"\left(-\infty, 3\right]",
        r"[1,2] \cup [3,4]",
        r"\{1,2\}",
        "1, 2, 3",
        r"\emptyset",
        r"\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}",
        "x+1",
        "x^2 - 5x + 6",
        "y = 2x + 3",
        "x < 5",
        r"x \in [1,2]",
        "2xy",
        "lwh",
        "abc",
        "e^x",
        r"\pi",
        r"\sin x",
        r"\log_2 3",
        r"\text{Evelyn}",
        r"\text{(C)}",
        "A",
        "(A)",
        "3+2i",
        "5!",
        r"\binom{5}{2}",
        "1:4",
        "10_2",
        r"\mathbf{i}+\mathbf{j}",
        "p - q",
        "2^{10}",
    ],
)
def test_math_verify_takes_mathematics(answer):
    scorer = make_scorer("math-verify", {})
    scorer.check_answer(answer)
    if "boxed" not in answer and "$" not in answer:
        assert scorer.score(answer, rf"\boxed{{{answer}}}")["strict"] == 1


@pytest.mark.parametrize(
    "scorer", ["exact", "number", "boxed", "contains", "regex", "math-verify", "json-fields", "slots", "writing"]
)
@pytest.mark.parametrize(
    "answer", ["\u200b", "\ufeff\u2060", "\u00ad", "\u3164", "\u2800", " \u200d\n", "\u0301", "\x00"]
)
def test_an_answer_that_nobody_sees_is_refused(tmp_path, scorer, answer):
    """A zero-width space was an answer like another."""
    with pytest.raises(UserError, match=r"line 1: 'answer' is blank \(it holds"):
        jsonl(tmp_path / "a.jsonl", [json.dumps(answer)], scorer=scorer, scorer_options=OPTIONS.get(scorer, {}))


@pytest.mark.parametrize("answer", [r"\text{}", "$$", r"\,", ".", "}", r"\boxed{5}", "{}"])
def test_boxed_refuses_what_no_box_can_hold(answer):
    with pytest.raises(UserError, match="no box can hold the answer"):
        make_scorer("boxed", {}).check_answer(answer)


@pytest.mark.parametrize(
    "answer", ["5", "$5", r"\frac{1}{2}", "12 Angry Men", "(1, 2)", r"\{1, 2\}", "x = 5", "yes.", "2 weeks", "50%"]
)
def test_boxed_takes_what_one_can(answer):
    make_scorer("boxed", {}).check_answer(answer)


@pytest.mark.parametrize(
    ("gold", "reply", "right"),
    [
        ('{"a": 0.123456789012345678901}', '{"a": 0.123456789012345678901}', True),
        ('{"a": 0.123456789012345678901}', '{"a": 0.12345678901234568}', False),
        ('{"a": [1.00000000000000000001]}', '{"a": [1]}', False),
        ('{"a": 1e400}', '{"a": 1e400}', True),
        ('{"a": 123456789012345678901234567890}', '{"a": 123456789012345678901234567890}', True),
        ('{"a": 123456789012345678901234567890}', '{"a": 123456789012345678901234567891}', False),
        ('{"a": -0}', '{"a": 0}', True),
        ('{"a": 1.0, "é": {"b": 1E+2}}', '{"a": 1, "é": {"b": 100}}', True),
        ('{"a": 1e400}', '{"a": Infinity}', False),
    ],
)
def test_json_answers_keep_their_digits(tmp_path, gold, reply, right):
    """An object as answer went through floats when it was loaded, so that its own copy scored 0."""
    task = jsonl(tmp_path / "a.jsonl", [gold], scorer="json-fields")
    (item,) = task.items("train")
    assert (task.score(item, reply)["strict"] == 1) is right


def test_json_answers_that_floats_hold_are_written_as_before(tmp_path):
    """The fingerprint of older runs' questions is over these texts."""
    gold = {"a": 1.5, "b": [0.1, 2, True, None, "é"], "c": {"d": 1e22, "e": -0.0}}
    (item,) = jsonl(tmp_path / "a.jsonl", [json.dumps(gold)], scorer="json-fields").items("train")
    assert item.answer == json.dumps(gold, ensure_ascii=False)


def test_a_key_twice_in_a_json_answer_is_refused(tmp_path):
    with pytest.raises(UserError, match="the key 'a' stands twice"):
        jsonl(tmp_path / "a.jsonl", [json.dumps('{"a": 1, "a": 2}')], scorer="json-fields")


GOOD = "def f(x):\n    return x + 1"


def indented(prefix, code=GOOD, fence="```", first=""):
    lines = [f"{fence}python", *code.split("\n"), fence]
    return "\n".join(prefix + line for line in lines).replace(prefix, first or prefix, 1)


@pytest.mark.parametrize(
    "text",
    [
        f"Here:\n{indented('   ')}\n",
        indented("\t"),
        indented("    "),
        indented("> "),
        indented("  ", first="- "),
        indented("   ", first="1. "),
        indented("", fence="~~~"),
        indented("", fence="````"),
        indented("", code=GOOD.replace("def", "    def").replace("    ret", "        ret")),
        f"```python\n{GOOD}\n```",
        f"   ```python\n{GOOD}\n   ```",
    ],
)
def test_code_in_an_indented_fence_is_found(text):
    """In a list, say, where Markdown wants the fence indented: the right function scored 0."""
    scorer = make_scorer("python-tests", {"unsafe_without_namespaces": True})
    assert scorer.parse(text) == GOOD


def test_fences_without_an_end_take_no_minutes():
    for text in ("~" * 100_000, "- " * 50_000, "```x\n~~~y\n" * 20_000, " " * 100_000 + "```", "> " * 50_000):
        assert len(list(_BLOCK.finditer(text))) < 20_001
