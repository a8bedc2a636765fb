"""Rows in the forms that other tools write: read as question and answer, or told in a sentence."""

import gzip
import json

import pytest

from tinylora.errors import UserError
from tinylora.tasks.sets import jsonl

SHARES = (0.1, 0.2)


def load(path, **options):
    found = jsonl.load(str(path), *SHARES, **options)
    return {item.question: item for split in found.splits.values() for item in split}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def many(row):
    """A hundred rows of one form, so that no split is empty; N is their number."""
    text = json.dumps(row)
    return [json.loads(text.replace("NN", str(i))) for i in range(100)]


USER = {"role": "user", "content": "Double NN?"}
FORMS = [
    {"question": "Double NN?", "answer": "NN!"},
    {"prompt": [USER], "answer": "NN!"},
    {"prompt": [USER], "completion": [{"role": "assistant", "content": "NN!"}]},
    {"prompt": [USER], "completion": "NN!"},
    {"prompt": [{"role": "system", "content": "Be brief."}, USER], "answer": "NN!"},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Double NN?"}]}], "answer": "NN!"},
    {"messages": [USER, {"role": "assistant", "content": "NN!"}]},
    {"conversations": [{"from": "human", "value": "Double NN?"}, {"from": "gpt", "value": "NN!"}]},
    {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Double NN?"},
                       {"from": "gpt", "value": "NN!"}]},
    {"instruction": "Double NN?", "input": "", "output": "NN!"},
    {"instruction": "Double NN?", "output": "NN!", "answer": "NN!"},
]  # fmt: skip


@pytest.mark.parametrize("row", FORMS)
def test_forms_that_are_read(tmp_path, row):
    items = load(write(tmp_path / "rows.jsonl", many(row)), system="Be brief.")
    assert {question: item.answer for question, item in items.items()} == {f"Double {i}?": f"{i}!" for i in range(100)}


def test_the_input_of_alpaca_is_part_of_the_question(tmp_path):
    items = load(write(tmp_path / "a.jsonl", many({"instruction": "Add.", "input": "NN and 1", "output": "x", "n": 1})))
    assert "Add.\n\n7 and 1" in items and dict(items["Add.\n\n7 and 1"].metadata) == {"n": 1}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_a_list_in_one_file_and_gzip(tmp_path, indent, packed):
    data = b"\xef\xbb\xbf" + json.dumps(many(FORMS[0]), indent=indent).encode()
    path = tmp_path / "rows.json"
    path.write_bytes(gzip.compress(data) if packed else data)
    assert len(load(path)) == 100
    lines = "".join(json.dumps(row) + "\n" for row in many(FORMS[0])).encode()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    assert len(load(tmp_path / "rows.jsonl.gz")) == 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "a", "answer": "1", "answer": "2"}', "line 1: not valid JSON .the key 'answer' stands twice"),
        (
            '{"question": "a", "answer": "1"}\n{"question": "b", "answer": "1", "m": {"x": 1, "x": 1}}',
            "line 2: not valid JSON .the key 'x' stands twice",
        ),
        ('[{"question": "a", "answer": "1"},\n{"question": "a", "question": "b", "answer": "1"}]', "line 2: .*twice"),
        ('[\n{"question": "a", "answer": "1"}\n{"question": "b", "answer": "1"}]', "line 2: .*no comma"),
        ('[\n{"question": "a", "answer": "1"},\n7]', "line 3: must be a JSON object"),
        ('[{"question": "a", "answer": "1"}] {}', "line 1: there is more behind the list's end"),
        ('[{"question": "a", "answer": "1"}', "line 1: not valid JSON"),
        ('{"prompt": [{"role": "system", "content": "Be long."}, {"role": "user", "content": "a"}], "answer": "1"}',
         r"line 1: 'prompt' begins with the system prompt 'Be long.', and the recipe's prompt.system is 'Be brief.'"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, '
         '{"role": "user", "content": "c"}]}', "'messages' must be one question .* got user, assistant, user"),
        ('{"prompt": [], "answer": "1"}', "got no turn"),
        ('{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"}', "must be a list of messages"),
        ('{"prompt": ["a"], "answer": "1"}', "must be a list of messages"),
        ('{"prompt": [{"role": "user", "content": "a"}]}', "there is no 'answer'"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "there is no 'answer'"),
        ('{"chosen": "b", "rejected": "c"}', "these are preferences"),
        ('{"instruction": "a", "input": 3, "output": "b"}', "'input' must be a text"),
        ('{"text": "a"}', "there is no 'question'; the line has text; call the two 'question' and 'answer'"),
    ],
)  # fmt: skip
def test_forms_that_are_told(tmp_path, text, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load(path, system="Be brief.")


def test_a_table_is_told_how_to_become_jsonl(tmp_path):
    import shlex
    import subprocess

    path = tmp_path / "my table.csv"
    path.write_bytes('\ufeffquestion,answer\n"one, two",é\n'.encode())
    with pytest.raises(UserError, match="is a table; write it as JSONL") as error:
        load(path)
    words = shlex.split(str(error.value).partition("such as by: ")[2].partition(" > ")[0])
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == {"question": "one, two", "answer": "é"}
