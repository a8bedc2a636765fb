"""JSON by its standard: a key twice, NaN and endless brackets are refused, wherever they stand."""

import pytest

from tinylora.errors import UserError
from tinylora.system.jsonl import read_jsonl
from tinylora.system.strict_json import parse_json, read_json


def test_what_is_json():
    assert parse_json('{"a": {"b": [1, 2.5, null, {"a": ""}]}, "b": 1}') == {
        "a": {"b": [1, 2.5, None, {"a": ""}]},
        "b": 1,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 1}', "the key 'a' stands twice"),
        ('[{"x": {"deep": 1, "other": 2, "deep": 3}}]', "the key 'deep' stands twice"),
        ('{"caf\\u00e9": 1, "café": 2}', "the key 'café' stands twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "nested too deep"),
        ("1" * 5000, "limit"),
        (b'"\xff"', "not UTF-8"),
    ],
)
def test_what_is_none(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_files_name_the_place(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": {"b": 1, "b": 2}}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"it is not JSON \(the key 'b' stands twice.*; mend it"):
        read_json(path, "mend it")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 1, "a": 2}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 is not JSON \(the key 'a' stands twice"):
        read_jsonl(tmp_path / "a.jsonl")
