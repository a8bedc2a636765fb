"""IFEval: rows, what the scorer says without its extra, what it makes of the harness's verdicts, and the real rules.

The last part needs `pip install 'tinylora[ifeval]'` and nltk's data punkt_tab; it is skipped, with that reason, where
they are missing, and the refusals are what is tested there.
"""

import importlib
import json
import random
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tinylora.config.recipe import load_recipe, parse_recipe
from tinylora.errors import UserError
from tinylora.tasks import build_task
from tinylora.tasks.base import Item
from tinylora.tasks.build import make_scorer
from tinylora.tasks.sets.ifeval import CHECKER, _rules


@pytest.fixture(autouse=True)
def fresh_rules():
    _rules.cache_clear()
    yield
    _rules.cache_clear()


def have_the_extra():
    try:
        importlib.import_module("nltk.data").find("tokenizers/punkt_tab")
    except (ImportError, LookupError):
        return False
    return importlib.util.find_spec("lm_eval") is not None and importlib.util.find_spec("langdetect") is not None


real_rules = pytest.mark.skipif(not have_the_extra(), reason="needs the extra tinylora[ifeval] and nltk's punkt_tab")

ITEM = Item("0" * 64, "Write.", "", {"key": 5, "instruction_id_list": ["a:b", "c:d"], "kwargs": [{}, {"n": 1}]})
ROW = {
    "key": 1,
    "prompt": "Write exactly two sentences, all in lower case, without commas.",
    "instruction_id_list": [
        "punctuation:no_comma", "change_case:english_lowercase", "length_constraints:number_sentences",
    ],
    "kwargs": [{}, {}, {"relation": "less than", "num_sentences": 3, "num_words": None}],
}  # fmt: skip


def write(folder, *rows):
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def ifeval(path, more=""):
    config = parse_recipe(f'[task]\nname = "ifeval"\npath = "{path}"\n{more}', "test")
    return build_task(config.task, config.prompt)


def stand_in(monkeypatch, process_results, *, data=True):
    """Modules in place of the extra's. Returns that of langdetect, and the names that were looked up in nltk's data."""
    looked_up = []

    def find(name):
        looked_up.append(name)
        if not data:
            raise LookupError("a page of text")

    rules = ModuleType(CHECKER)
    rules.process_results = process_results
    rules.instructions_registry = SimpleNamespace(INSTRUCTION_DICT={"a:b": None, "c:d": None})
    languages = ModuleType("langdetect")
    languages.DetectorFactory = type("DetectorFactory", (), {"seed": None})
    nltk_data = ModuleType("nltk.data")
    nltk_data.find = find
    modules = {CHECKER: rules, "langdetect": languages, "nltk": ModuleType("nltk"), "nltk.data": nltk_data}
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
        modules[name] = ModuleType(name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return languages, looked_up


def verdict(strict, loose):
    return {
        "prompt_level_strict_acc": all(strict),
        "inst_level_strict_acc": strict,
        "prompt_level_loose_acc": all(loose),
        "inst_level_loose_acc": loose,
    }


def test_scores_are_the_harnesss_verdicts(monkeypatch):
    seen, draws = [], []

    def process_results(doc, results):
        seen.append((doc, results))
        draws.append(random.random())
        return verdict([True, False], [True, True])

    languages, _ = stand_in(monkeypatch, process_results)
    scorer = make_scorer("ifeval", {})
    expected = {"strict": 0.0, "value_only": 1.0, "instructions": 0.5, "instructions_loose": 1.0}
    for seed in (3, 4):
        random.seed(seed)
        before = random.getstate()
        assert scorer.score_item(ITEM, "hello") == expected
        assert random.getstate() == before  # our own draws go on undisturbed
    assert draws[0] == draws[1]  # and the rules' are the same every time
    assert languages.DetectorFactory.seed == 0
    assert seen[0] == ({"prompt": "Write.", **ITEM.metadata}, ["hello"])
    assert (scorer.parse(" "), scorer.parse(" a ")) == (None, "a")


def test_items_that_cannot_be_scored(monkeypatch):
    stand_in(monkeypatch, lambda doc, results: verdict([True], [True]))
    scorer = make_scorer("ifeval", {})
    with pytest.raises(UserError, match="needs 'instruction_id_list' and 'kwargs' beside the question"):
        scorer.score_item(Item("0" * 64, "Write.", ""), "x")
    strange = Item("0" * 64, "Write.", "", {"instruction_id_list": ["a:b", "e:f"], "kwargs": [{}, {}]})
    with pytest.raises(UserError, match="knows no instruction 'e:f'"):
        scorer.score_item(strange, "x")


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    for name in ("lm_eval", "langdetect", "nltk", "nltk.data"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        UserError, match=r"needs the rules of lm-evaluation-harness .*; run pip install 'tinylora\[ifeval"
    ) as e:
        ifeval(write(tmp_path, ROW))
    assert "\n" not in str(e.value)


def test_without_nltks_data_nothing_is_imported_that_would_fetch_it(monkeypatch, tmp_path):
    _, looked_up = stand_in(monkeypatch, None, data=False)
    monkeypatch.setitem(sys.modules, CHECKER, None)  # an import would be another error
    with pytest.raises(UserError, match="punkt_tab, which is not on this machine; run python -m nltk") as error:
        ifeval(write(tmp_path, ROW))
    assert looked_up == ["tokenizers/punkt_tab"] and "\n" not in str(error.value)


@pytest.mark.skipif(have_the_extra(), reason="tinylora[ifeval] is here")
def test_this_machine_lacks_the_extra_and_the_set_says_so(tmp_path):
    with pytest.raises(UserError, match="scorer ifeval needs"):
        ifeval(write(tmp_path, ROW))


def test_rows(monkeypatch, tmp_path):
    stand_in(monkeypatch, lambda doc, results: verdict([True], [True]))
    task = ifeval(write(tmp_path, ROW, ROW, {**ROW, "prompt": "b"}))
    assert (task.counts()["test"], task.counts()["duplicates"]) == (2, 1)
    first = task.items("test")[0]
    assert task.prompt(first) == [{"role": "user", "content": ROW["prompt"]}] and first.answer == ""
    assert first.metadata["kwargs"] == ROW["kwargs"]
    with pytest.raises(UserError, match="ifeval is for evaluation only"):
        task.items("train")
    for bad in ({"kwargs": [{}]}, {"instruction_id_list": []}, {"kwargs": None}):
        write(tmp_path, {**ROW, **bad})
        with pytest.raises(UserError, match=r"line 1: 'instruction_id_list' and 'kwargs' must be lists of equal"):
            ifeval(tmp_path)


def test_the_hub_calls_its_only_split_train(monkeypatch):
    stand_in(monkeypatch, lambda doc, results: verdict([True], [True]))

    def load_dataset(name, config, split):
        assert (name, config, split) == ("google/IFEval", None, "train")
        return [ROW]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [item.question for item in ifeval("").items("test")] == [ROW["prompt"]]


def test_recipe_and_own_rows(monkeypatch, tmp_path):
    stand_in(monkeypatch, lambda doc, results: verdict([True], [True]))
    recipe = load_recipe("ifeval")
    assert (recipe.task.scorer, recipe.generation.max_new_tokens) == ("ifeval", 1280)
    assert parse_recipe('[task]\nname = "ifeval"', "x").generation.max_new_tokens == 1280
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({**ROW, "instruction_id_list": ["a:b"], "split": "train"}) + "\n", encoding="utf-8")
    own = parse_recipe(f'[task]\nname = "jsonl"\npath = "{path}"\nscorer = "ifeval"\nvalidation_share = 0', "x")
    task = build_task(own.task, own.prompt)  # to train on: any JSONL file with the two keys will do
    assert task.score(task.items("train")[0], "x")["strict"] == 1.0


@real_rules
@pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
@pytest.mark.parametrize(
    ("reply", "strict", "value_only", "instructions"),
    [
        ("this is one sentence. this is the second one.", 1, 1, 1),
        ("this is one sentence, and this is the second one.", 0, 0, 2 / 3),
        ("Sure:\nthis is one sentence. this is the second one.", 0, 1, 2 / 3),  # loose takes the first line off
        ("this is one. this is another one. and here is the third sentence.", 0, 0, 2 / 3),
        ("", 0, 0, 0),
    ],
)
def test_the_real_rules(tmp_path, reply, strict, value_only, instructions):
    task = ifeval(write(tmp_path, ROW))
    scores = task.score(task.items("test")[0], reply)
    assert scores == task.score(task.items("test")[0], reply)
    assert (scores["strict"], scores["value_only"]) == (strict, value_only)
    assert scores["instructions"] == pytest.approx(instructions)


@real_rules
@pytest.mark.filterwarnings("ignore")
def test_equal_to_the_harness_where_rules_draw_at_random(tmp_path):
    """number_words without arguments draws its limit: the same reply must be judged the same way every time."""
    row = {**ROW, "instruction_id_list": ["length_constraints:number_words"], "kwargs": [{}]}
    task = ifeval(write(tmp_path, row))
    scores = [task.score(task.items("test")[0], "word " * 300) for _ in range(20)]
    assert all(one == scores[0] for one in scores)
    rules = importlib.import_module(CHECKER)
    random.seed(0)
    doc = {**row, "kwargs": [{}]}
    assert rules.process_results(doc, ["word " * 300])["prompt_level_strict_acc"] == bool(scores[0]["strict"])
