"""Names that are code, and marks that steer a terminal or a spreadsheet (attack: card and decode)."""

import json
import re
import shutil
from pathlib import Path

from bench.trust.robustness_cases.inputs import Trial, tried
from bench.trust.robustness_cases.strangers import metadata_changed

HOSTILE = "evil\"\nlicense: mit\ntags: [pwned]\n---\n'''; import os; os.system('touch pwned') #\x1b[31m\u202e=1+1"


def hostile(t: Trial) -> Path:
    """An adapter file whose base has a hostile name."""
    run = t.folder / "run"
    shutil.copytree(t.world.first_run, run)
    for path in (run / "adapter.safetensors", run / "last.safetensors"):
        metadata_changed(path, r'name = "[^"]*"', f"name = {json.dumps(HOSTILE)}")
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(
        re.sub(r'name = "[^"]*"', lambda _: f"name = {json.dumps(HOSTILE)}", text, count=1)
    )
    return run


for verb in ("card", "decode", "inspect", "report", "encode"):
    for what in ("run", "run/adapter.safetensors"):
        if verb == "report" and "/" in what:
            continue

        @tried(
            f"27 hostile model.name: {verb} {what.split('/')[-1]}",
            "no ESC, no right-to-left mark, no new YAML key, no code",
        )
        def _(t: Trial, verb: str = verb, what: str = what) -> None:
            hostile(t)
            came = t.run(verb, t.folder / what)
            t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")
            for bad in ("\x1b[31m", "\u202e"):
                t.check(bad not in came.out + came.err, f"{bad!r} reaches the terminal")
            lines = came.out.splitlines()
            front = lines[: lines[1:].index("---") + 2] if lines[:1] == ["---"] and "---" in lines[1:] else []
            t.check("license: mit" not in front and "tags: [pwned]" not in front, f"a key of its own: {front}")
            t.check("'''; import os" not in came.out or "```python" not in came.out, "code of its own in the card")
            page = t.folder / "run" / "report.html"
            if verb == "report" and page.exists():
                t.check("\u202e" not in page.read_text(), "a right-to-left mark in the page")


FOLDER = 'a"\nlicense: mit\n---\n\x1b[31m\u202e'


@tried("27 hostile model.name: card, decode, inspect and report of an own run on a folder of such a name", "as above")
def _(t: Trial) -> None:
    shutil.copytree(t.world.model("llama"), t.folder / FOLDER)
    came = t.run("train", t.recipe(model=t.folder / FOLDER, eval={"num_test": 2}).name)
    t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")
    for verb in ("card", "decode", "inspect", "report") if came.code == 0 else ():
        came = t.run(verb, "runs/t-001")
        t.check(came.code in (0, 2), f"{verb}: exit code {came.code}: {came.err[-300:]}")
        t.check("\x1b[31m" not in came.out and "\u202e" not in came.out, f"{verb}: ESC or a mark reaches the terminal")
        t.check("\nlicense: mit\n" not in came.out, f"{verb}: a key of its own")


@tried("27 CSV cells that begin with =, + or @", "quoted for spreadsheets")
def _(t: Trial) -> None:
    run = hostile(t)
    for path in (run / "config.toml",):
        text = path.read_text()
        path.write_text(text.replace(json.dumps(HOSTILE), json.dumps("=HYPERLINK(1)")))
    prompt = run / "result.json"
    text = prompt.read_text().replace('"own"', '"=1+1"').replace("'own'", "'=1+1'")
    prompt.write_text(text)
    came = t.run("report", run)
    t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")
    import csv

    for path in (run / "report_files").glob("*.csv"):
        for row in csv.reader(path.open(encoding="utf-8")):
            bad = [cell for cell in row if cell.lstrip()[:1] in ("=", "@") or re.match(r"\+[^0-9.]", cell)]
            t.check(not bad, f"{path.name}: {bad[:2]}")
