"""The judge of docs/evaluation.md, as it is written there, against a stand-in for the model that judges."""

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tinylora.config.recipe import load_recipe
from tinylora.tasks import build_task
from tinylora.tasks.base import ScorerError

DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"


@pytest.fixture
def judge():
    """Says yes if the reply holds the reference answer, and something else if it is told to. `asked` are the bodies."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(body)
            content = body["messages"][0]["content"]
            answer, reply = re.search(r"Reference answer: (.*?)\nReply: (.*?)\n\nDoes", content, re.DOTALL).groups()
            verdict = "Perhaps" if "shrug" in reply else " Yes." if answer in reply else "no"
            data = json.dumps({"choices": [{"message": {"content": verdict}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join(60)
    server.server_close()


@pytest.fixture
def task(judge, tmp_path, monkeypatch):
    """The task of the documented recipe, with the documented judge.py, on two questions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    section = DOCS.read_text(encoding="utf-8").partition("## A model as judge")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (recipe,) = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
    assert code.startswith("# file: judge.py") and "http://127.0.0.1:8000" in recipe
    Path("judge.py").write_text(code, encoding="utf-8")
    Path("recipe.toml").write_text(recipe.replace("8000", str(judge.server_address[1])), encoding="utf-8")
    rows = [{"question": f"Capital {i}?", "answer": f"Paris {i}"} for i in range(60)]
    Path("capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sys.modules.pop("judge", None)
    config = load_recipe("recipe.toml")
    yield build_task(config.task, config.prompt)
    sys.modules.pop("judge", None)


def test_the_documented_judge_scores_replies(task, judge):
    item = task.items("test")[0]
    one = {"reward": 1.0, "strict": 1.0, "value_only": 1.0}
    assert task.score(item, f"I would say {item.answer}, {{braces}} and all.") == one
    assert set(task.score(item, "I do not know.").values()) == {0.0}
    assert task.score(item, f"I would say {item.answer}, {{braces}} and all.") == one
    assert len(judge.asked) == 2  # the same reply is asked about once, so it cannot get two scores
    body = judge.asked[0]
    assert (body["model"], body["temperature"]) == ("judge-7b", 0) and item.question in body["messages"][0]["content"]


def test_a_judge_that_fails_is_never_a_zero(task, judge):
    item = task.items("test")[0]
    with pytest.raises(ScorerError, match="said 'Perhaps', which is neither yes nor no"):
        task.score(item, "shrug")
    judge.shutdown()
    judge.server_close()
    with pytest.raises(ScorerError, match="URLError"):
        task.score(item, "another reply")
