"""What `tinylora eval` shows on a terminal and what it does not show anywhere else: real processes, a tiny model."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from pseudo_terminal import finish, screen, start, terminal
from tiny_run import adapter_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_cache")]

HELPERS = Path(__file__).parents[1] / "helpers"
CTRL_C_WORKS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
EVAL = f"{CTRL_C_WORKS}; from tinylora.cli import main; main()"


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path) -> Path:
    return adapter_run(tiny_folder, tmp_path)


def talk(text: str) -> list[str]:
    """The lines of an evaluation, without what depends on the machine."""
    return [line for line in text.splitlines() if not line.startswith("other processes take ")]


def known(headline: str, count: int) -> list[str]:
    return [headline, f"untrained: {count}/{count} items", f"adapter: {count}/{count} items"]


def test_on_a_terminal_bars_come_and_go(run: Path) -> None:
    with terminal() as one:
        code, out, _ = finish(start(["-c", EVAL, "eval", str(run)], one, stdout=subprocess.PIPE, COLUMNS="60"))
    assert code == 0, one.text
    headline, *table = out.splitlines()
    count = int(table[1].split()[1].partition("/")[2])
    for label in ("basis 0/21 modules ━", f"untrained 0/{count} items ━", f"adapter 0/{count} items ━"):
        assert label in one.words
    lines, cursor = screen(one.text, 10_000)
    assert talk("\n".join(lines)) == [headline] and cursor  # the bars say what the other lines said


@pytest.mark.parametrize(
    ("words", "environment", "where"),
    [
        (["--json"], {}, "terminal"),
        ([], {"TERM": "dumb"}, "terminal"),
        ([], {}, "file"),
        ([], {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}, "pipe"),
    ],
    ids=["json", "dumb", "log", "pipe"],
)
def test_elsewhere_there_are_the_lines_alone(
    run: Path, tmp_path: Path, words: list[str], environment: dict[str, str], where: str
) -> None:
    log = tmp_path / "log"
    arguments = ["-c", EVAL, "eval", str(run), *words]
    with terminal() as one, log.open("w") as file:
        stderr = {"terminal": None, "file": file.fileno(), "pipe": subprocess.PIPE}[where]
        code, out, err = finish(start(arguments, one, stdout=subprocess.PIPE, stderr=stderr, **environment))
    said = {"terminal": one.text, "file": log.read_text(), "pipe": err}[where]
    assert code == 0 and "\x1b" not in said + out and (where == "terminal" or not one.text)
    if words:
        told = json.loads(out)
        headline, count = told["compared"], told["num_items"]
    else:
        headline, count = out.splitlines()[0], int(out.splitlines()[2].split()[1].partition("/")[2])
    assert talk(said.replace("\r\n", "\n")) == known(headline, count)


def test_ctrl_c_in_an_evaluation_takes_the_bar_away(run: Path) -> None:
    long = ["--samples", "5000", "--temperature", "1", "--set", "generation.max_new_tokens=100"]
    with terminal() as one:
        process = start(["-c", EVAL, "eval", str(run), *long], one)
        one.wait_for("samples ━", process)
        code, _, _ = finish(process, interrupt=True)
    lines, cursor = screen(one.text)
    assert (code, lines[-1], cursor) == (130, "tinylora: interrupted", True), one.text
    assert not any("━" in line for line in lines) and "\x1b[?25l" not in one.text


def test_training_from_python_shows_no_bar(tiny_folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom tiny_run import ByteTask, tiny_config\nimport tinylora\n"
        f"config = tiny_config(Path({str(tiny_folder)!r}), train={{'steps': 2}}, eval={{'num_test': 2}})\n"
        f"tinylora.train(config, ByteTask(), out=Path({str(tmp_path)!r}))\n"
        "assert 'rich.live' not in sys.modules"
    )
    path = os.pathsep.join([str(HELPERS), *filter(None, [os.environ.get("PYTHONPATH")])])
    with terminal() as one:
        code_, _, _ = finish(start(["-c", code], one, PYTHONPATH=path))
    assert code_ == 0, one.text
    assert "\x1b" not in one.text and "━" not in one.text
    assert "step 2/2 | " in one.text
