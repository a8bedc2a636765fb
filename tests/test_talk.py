"""Text of strangers reaches no terminal as it is: escapes, control characters and marks of direction are shown."""

import ast
import csv
import io
import json
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from report_runs import make_run
from tiny_run import adapter_run
from typer.testing import CliRunner

from tinylora.adapter.explicit import ExplicitFactors, ExplicitModule, save_explicit
from tinylora.adapter.portable import PortableAdapter
from tinylora.cli import app
from tinylora.config.recipe import apply_overrides
from tinylora.config.run import RunConfig
from tinylora.interop.card import model_card
from tinylora.reporting.figures import Figure, cell
from tinylora.reporting.page import Numbers
from tinylora.store.adapter import Adapter
from tinylora.store.adapter_file import save_vector
from tinylora.talk import harmless, one_line, say_to_stderr, show

ROOT = Path(__file__).parents[1]
RUNNER = CliRunner()
ESC, BEL, RLO, DEL, CSI, LINE = "\x1b", "\x07", "\u202e", "\x7f", "\x9b", "\u2028"
EVIL = f"a{ESC}]0;owned{BEL}{ESC}[2J{RLO}b{DEL}{CSI}31m{LINE}c\r\x08\u200b\u2066d"
NAME = "".join(one for one in EVIL if unicodedata.category(one) != "Cc")
"""A name of a model or a task holds no control character: such a file is refused before anything is shown."""
PRINTS = {
    "talk.py": 2, "training/progress.py": 1, "cli/__init__.py": 1, "cli/common.py": 1, "cli/chat.py": 1,
    "store/own.py": 1,
}  # fmt: skip
"""Files that call print, and how often: each is a gate, or prints a constant."""


def is_harmless(text: str) -> bool:
    bad = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")
    return not [c for c in text if c not in "\n\t\u200c\u200d" and unicodedata.category(c) in bad]


def test_every_print_goes_through_a_gate() -> None:
    found: dict[str, int] = {}
    for path in sorted((ROOT / "tinylora").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                name = str(path.relative_to(ROOT / "tinylora"))
                found[name] = found.get(name, 0) + 1
    assert {name: count for name, count in found.items() if count > PRINTS.get(name, 0)} == {}


def test_what_is_shown_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    show(EVIL)
    say_to_stderr(EVIL)
    out, err = capsys.readouterr()
    assert out == err and is_harmless(out) and "owned" in out and "\u241b]0;owned\u2407" in out
    assert harmless("naïve 東京 שלום 👩‍👩‍👧 a\nb\tc") == "naïve 東京 שלום 👩‍👩‍👧 a\nb\tc"
    assert one_line("a\nb") == "a␊b" and len(one_line("x" * 10**6)) < 1100


@pytest.fixture
def evil_files(tmp_path: Path) -> list[Path]:
    """Adapter files whose every text is hostile."""
    module = ExplicitModule(torch.ones(4, 1), torch.ones(1), torch.ones(4, 1), torch.ones(1, 1, 1), 0)
    explicit = tmp_path / "explicit.safetensors"
    explicit.write_bytes(save_explicit(ExplicitFactors(torch.ones(1, 1), {EVIL: module}, EVIL, "")))
    run = tmp_path / "run.safetensors"
    config = apply_overrides(RunConfig(), ["adapter.n_tie=8"])
    config = replace(
        config,
        model=replace(config.model, name=NAME, revision=EVIL),
        adapter=replace(config.adapter, targets=(EVIL,)),
        task=replace(config.task, name=NAME),
        reward={EVIL: 1.0},
    )
    save_vector(run, torch.ones(1, 1), config)
    return [explicit, run]


@pytest.mark.parametrize("verb", ["decode", "inspect", "verify", "card", "eval", "chat", "encode", "diff"])
def test_files_of_strangers(evil_files: list[Path], verb: str) -> None:
    for file in evil_files:
        for more in ([], ["--json"]):
            if verb == "card" and more:
                continue
            second = [str(file)] if verb == "diff" else []
            done = RUNNER.invoke(app, [verb, str(file), *second, *more])
            assert is_harmless(done.stdout) and is_harmless(done.stderr), (done.stdout, done.stderr)
            assert done.exit_code in (0, 2), done.exception
            if more and done.stdout.strip():
                told = json.loads(done.stdout)
                assert EVIL in json.dumps(told, ensure_ascii=False) or "\\u001b" in done.stdout or verb == "diff"


def test_json_keeps_the_value(evil_files: list[Path]) -> None:
    told = json.loads(RUNNER.invoke(app, ["decode", str(evil_files[0]), "--json"]).stdout)
    assert told["origin"] == EVIL


def test_replies_of_models(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = adapter_run(tiny_folder, tmp_path)
    monkeypatch.setattr("tinylora.serving.chat._reply", _evil_reply)
    done = RUNNER.invoke(app, ["chat", str(run), "--prompt", "1 + 1"])
    assert done.exit_code == 0 and "owned" in done.stdout and is_harmless(done.stdout)


def _evil_reply(*_: Any) -> Any:
    from tinylora.serving.chat import ChatReply

    return ChatReply(text=EVIL, num_tokens=3, stopped=True)


MARKUP = 'x"\n---\nevil: [1]\n# <script>alert(1)</script> [link](https://evil.example) `code` **b** www.evil.example'


def _on_one_line(text: str) -> str:
    return "".join(one for one in text if unicodedata.category(one) != "Cc")


@pytest.fixture
def card() -> Callable[..., str]:
    def make(name: str, **more: Any) -> str:
        config = RunConfig()
        config = replace(
            config,
            model=replace(config.model, name=_on_one_line(name), revision=more.pop("revision", "")),
            task=replace(config.task, name=_on_one_line(MARKUP)),
            reward={MARKUP: 1.0},
            adapter=replace(config.adapter, targets=(MARKUP,)),
        )
        opened = Adapter(label="x", v=torch.ones(1, 1), config=config.adapter, run=config)
        portable = PortableAdapter(config=RunConfig().adapter, fingerprint=b"x" * 12, check=b"abcd",
                                   values=opened.v.numpy())  # fmt: skip
        return model_card(opened, portable, base_name=name, **more)

    return make


@pytest.mark.parametrize(
    "name",
    [
        MARKUP,
        'org/name", trust_remote_code=True)\nimport os; os.system("x") #',
        "org/name\nlicense: mit",
        "org/name: {a: b}",
        "org/na me",
        "a/b/c",
        f"org/{EVIL}",
    ],
)
def test_a_card_of_a_strangers_names(card: Callable[..., str], name: str) -> None:
    text = card(name, licence="mit\nevil: 1", revision='main", trust_remote_code=True, x="')
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "tinylora", "license": "other", "pipeline_tag": "text-generation",
        "tags": ["tinylora", "reinforcement-learning"],
    }  # fmt: skip
    assert "```python" not in body and "<script" not in body.replace("\\<", "") and is_harmless(text)
    assert "](" not in body.replace("\\]", "") and "https://evil" not in body and "www.evil" not in body
    assert [line for line in body.splitlines() if line.startswith(("evil", "import", "license", "# \\<"))] == []


def test_a_card_of_usual_names_is_as_it_was(card: Callable[..., str]) -> None:
    text = card("Qwen/Qwen2.5-0.5B", licence="apache-2.0", revision="refs/pr/1")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "Qwen/Qwen2.5-0.5B" and front["license"] == "apache-2.0"
    assert 'from_pretrained("Qwen/Qwen2.5-0.5B", revision="refs/pr/1")' in text


@pytest.mark.parametrize("evil", ["=1+1", "+1+cmd", "-1+1", "@SUM(A1)", "\t=1", "\r=1", " =1", "－1+1"])
def test_cells_of_a_csv_are_no_formulas(evil: str) -> None:
    figure = Figure(name="n", title="", caption="", section="", columns=(evil,), rows=((evil, 1, None, -2.5),),
                    svg="", png=b"")  # fmt: skip
    names, row = csv.reader(io.StringIO(figure.csv(), newline=""))
    told = f"'{evil}" if evil[0] != "\r" else "␍=1"
    assert names == [told] and row == [told, "1", "", "-2.5"]
    numbers = Numbers()
    numbers.rows[evil, evil] = (-2.5, evil)
    assert list(csv.reader(io.StringIO(numbers.csv(), newline="")))[1] == [told, told, "-2.5", told]


def test_numbers_and_words_in_a_csv_stay() -> None:
    for usual in ("-2.5", "+1", "-1e-9", "a=b", "", "tinylora", "-inf", 3, None, -0.5):
        assert cell(usual) == usual


def test_names_in_a_report(tmp_path: Path, undrawn: None) -> None:
    run = make_run(tmp_path / f"a{ESC}[31m{RLO}")
    done = RUNNER.invoke(app, ["report", str(run)])
    assert done.exit_code == 0 and is_harmless(done.stdout) and is_harmless(done.stderr)
    assert is_harmless((run / "report.html").read_text().replace(str(run), ""))
