"""Writing under rules: each rule, what items promise, and what is said to bad options."""

import json

import pytest

from tinylora.config.recipe import parse_recipe
from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.evaluation.settings import settings_for_eval
from tinylora.tasks import build_task
from tinylora.tasks.base import SPLITS, Item
from tinylora.tasks.sets.writing import CONTENT, RULES, WritingScorer, kept_rules


def writing(more="num_items = 300"):
    config = parse_recipe(f'[task]\nname = "writing"\n{more}', "test")
    return build_task(config.task, config.prompt)


@pytest.mark.parametrize(
    ("rule", "value", "kept", "broken"),
    [
        ("words", [2, 3], ["a well-known tale.", "it's - fine"], ["one", "a b c d", ""]),
        ("lines", 2, ["a\n\nb\n"], ["a", "a\nb\nc"]),
        ("bullets", 2, ["- a\n- b", "* a\n\n* b"], ["- a\nb", "Here:\n- a\n- b", "-a\n-b", "- a"]),
        ("required", ["river", "Paper"], ["A RIVER of paper."], ["rivers of paper", ""]),
        ("banned", ["and", "very"], ["sand, every day"], ["this And that"]),
        ("starts", "once", ["Once, long ago", '"Once'], ["At once", "", "oncemore"]),
        ("ends", "home", ["We went home.", "home"], ["home alone", "", "homes"]),
        ("lower", True, ["all small, 3 é"], ["All", "", "..."]),
    ],
)
def test_rule(rule, value, kept, broken):
    assert RULES[rule][1](value) and str(value if isinstance(value, str) else "") in RULES[rule][2](value)
    assert all(kept_rules({rule: value}, text)[rule] for text in kept)
    assert not any(kept_rules({rule: value}, text)[rule] for text in broken)


def test_scores():
    item = Item("1", "Write.", json.dumps({"required": ["river"], "lines": 1, "lower": True, "banned": ["very"]}))
    scorer = WritingScorer()
    assert scorer.score_item(item, " the river\n") == {"strict": 1.0, "value_only": 1.0, "share": 1.0}
    assert scorer.score_item(item, "The river\nis") == {"strict": 0.0, "value_only": 1.0, "share": 0.5}
    assert scorer.score_item(item, "a very small river") == {"strict": 0.0, "value_only": 0.0, "share": 0.75}
    assert scorer.score_item(item, "")["value_only"] == 0.0


def test_items():
    task = writing()
    assert task.counts()["distinct"] == 300
    assert task.fingerprint() == writing().fingerprint() != writing("num_items = 300\nseed = 1").fingerprint()
    items = [item for split in SPLITS for item in task.items(split)]
    seen = set()
    for item in items:
        rules = json.loads(item.answer)
        seen |= set(rules)
        assert 2 <= len(rules) <= 4 and rules["required"] and not {"lines", "bullets"} <= set(rules)
        assert not set(rules["required"]) & set(rules.get("banned", []))
        assert all(RULES[name][2](value) in item.question for name, value in rules.items())
        assert task.score(item, "")["strict"] == 0.0
    assert seen == set(RULES)


def test_every_item_can_be_solved():
    for item in writing("num_items = 200\noptions = {max_rules = 8}").items("train"):
        rules = json.loads(item.answer)
        count = rules.get("lines", rules.get("bullets", 1))
        low = rules.get("words", [len(rules["required"]) + count + 2])[0]
        body = [*rules["required"], *["word"] * (low - len(rules["required"]) - 2)]
        body = [rules.get("starts", "word"), *body, rules.get("ends", "word")]
        parts = [body[i * len(body) // count : (i + 1) * len(body) // count] for i in range(count)]
        text = "\n".join(("- " if "bullets" in rules else "") + " ".join(part) for part in parts)
        assert WritingScorer().score_item(item, text)["strict"] == 1.0, (rules, text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{rule = 1}", "no option 'rule'; it has: rules, max_rules"),
        ('{rules = ["rhymes"]}', "must be a list of words, lines"),
        ('{rules = ["required"]}', "needs a rule beside required"),
        ("{rules = 3}", "must be a list of"),
        ("{max_rules = 1}", "at least 2, got 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        writing(f"num_items = 20\noptions = {options}")


def test_bad_answers():
    for answer, message in (
        ("[]", "is no JSON object of rules"),
        ('{"lines": 2}', "with required or banned words"),
        ('{"required": ["a"], "rhymes": 1}', "no rule 'rhymes'"),
        ('{"required": ["a"], "lines": "two"}', "the rule 'lines' cannot be"),
        ('{"required": []}', "the rule 'required' cannot be"),
    ):
        with pytest.raises(UserError, match=message):
            WritingScorer().check_answer(answer)
    assert set(CONTENT) <= set(RULES)


def test_eval_takes_scorer_and_budget():
    config = settings_for_eval(RunConfig(), "writing")
    assert (config.task.scorer, config.generation.max_new_tokens) == ("writing", 192)
