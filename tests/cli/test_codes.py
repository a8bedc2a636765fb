"""A code that was cut in pieces is one, wherever a code is taken: quoted or not, by spaces, line ends or dashes."""

import textwrap
from pathlib import Path

import pytest

from tinylora.adapter.code import from_code, looks_like_a_code, to_code
from tinylora.cli.codes import with_whole_codes
from tinylora.store.adapter import is_adapter

CODE = to_code(bytes(range(42)))


def fours(code: str) -> list[str]:
    return textwrap.wrap(code, 4, break_on_hyphens=False)


@pytest.mark.parametrize(
    "cut",
    [
        " ".join(fours(CODE)),
        "\n".join(fours(CODE)),
        "\r\n".join(fours(CODE.lower())),
        "  " + CODE[:5] + "-".join(fours(CODE[5:])),
        CODE[:5] + " - ".join(fours(CODE[5:])),
        "T I N Y - " + " ".join(CODE[5:]),
    ],
    ids=["spaces", "lines", "small", "dashes", "both", "letters"],
)
def test_a_quoted_code_in_pieces(cut: str) -> None:
    assert from_code(cut) == bytes(range(42))
    assert looks_like_a_code(cut) and is_adapter(cut)


def test_words_of_a_command() -> None:
    assert fours(CODE)[:2] == ["TINY", "-" + CODE[5:8]]  # what looks like an option
    pieces = fours(CODE)
    assert with_whole_codes(["decode", *pieces, "--json"]) == ["decode", CODE, "--json"]
    assert with_whole_codes(["mix", *pieces, *pieces, "-o", "x"]) == ["mix", CODE, CODE, "-o", "x"]
    assert with_whole_codes(["diff", CODE, *pieces, "ABCD"]) == ["diff", CODE, CODE, "ABCD"]
    assert with_whole_codes(["chat", "--adapter", *pieces, "--prompt", "A"]) == [
        "chat", "--adapter", CODE, "--prompt", "A",
    ]  # fmt: skip


def test_what_is_no_code_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["train", "demo"], ["eval", "runs/x", "--task", "demo"], ["inspect", "tiny-llama", "0.5"], []):
        assert with_whole_codes(words) == words
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert with_whole_codes(["inspect", "tiny", "-h"]) == ["inspect", "tiny", "-h"]
