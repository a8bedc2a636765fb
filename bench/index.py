"""Write README.md of this folder: every question, its command, its results, the number in them, and who quotes it.

    python -m bench.index

Questions are the first lines of the scripts, numbers come from the results, commands and key paths from
results/index.toml. A page quotes a result if it names the file: README.md and docs/ are searched.
tests/bench/test_index.py holds the page to what this writes.
"""

import ast
import json
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import RESULTS, ROOT

PAGE = ROOT / "bench" / "README.md"
INDEX = RESULTS / "index.toml"
FOLDERS = {
    "speed": "## speed: is it fast, and in how much memory?",
    "trust": "## trust: is it right?",
    "studies": "## studies: what did training do?\n\n"
    "Before `keep_answers --results NAME` comes `tinylora sweep docs/studies/NAME.toml --out RUNS`.",
}
HEAD = """# Measurements

*Written by `python -m bench.index`.* A script answers one question. Run it from the repository's root with the command
beside it. What it found is one JSON object, its last line, with machine, versions, load and commit; `--save` keeps it
under `results/`. [peers/](peers/README.md) holds what we compare with; `make bench-setup` and `make interop-setup`
install it. Shares are strict accuracy on held-out items, points are differences of two shares.
"""


@dataclass(frozen=True)
class Entry:
    """One result, as index.toml has it."""

    name: str
    """Folder and name, as in `speed/rollout`."""
    command: str
    number: str
    note: str = ""

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}.json"

    @property
    def script(self) -> Path:
        """What wrote the file: a script of bench/, or a verb of tinylora."""
        if found := re.match(r"python -m (bench\.[\w.]+)", self.command):
            return ROOT / f"{found[1].replace('.', '/')}.py"
        if found := re.match(r"tinylora (\w+)", self.command):
            return ROOT / "tinylora" / "cli" / f"{found[1]}.py"
        raise ValueError(f"{INDEX.name}: the command of {self.name} names no script: {self.command}")


def entries() -> list[Entry]:
    """All of index.toml, in its order."""
    return [Entry(name=name, **fields) for name, fields in tomllib.loads(INDEX.read_text(encoding="utf-8")).items()]


def lookup(result: Any, path: str) -> Any:
    """What stands at a key path such as `cells/rl-full/summary`; an item of a list by its name, model or place."""
    for key in path.split("/"):
        if isinstance(result, list):
            named = [item for item in result if isinstance(item, dict) and key in (item.get("name"), item.get("model"))]
            result = named[0] if named else result[int(key)]
        else:
            result = result[key]
    return result


def said(value: Any, form: str) -> str:
    """A number in words: a format of Python's, or `points` for a difference of two shares."""
    if form == "points":
        return f"{100 * value:+.1f} points"
    return format(value, form).replace("%", " %")


def number(entry: Entry) -> str:
    """The entry's sentence with the result's own numbers in it."""
    result = json.loads(entry.file.read_text(encoding="utf-8"))
    return re.sub(r"\{([^{}:]+):?([^{}]*)\}", lambda found: said(lookup(result, found[1]), found[2]), entry.number)


def docstring(script: Path) -> str:
    return ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""


def question(script: Path) -> str:
    """The first line of a script; of a verb, that it is one."""
    if script.parent.name == "cli":
        return f"What `tinylora {script.stem}` itself wrote"
    return docstring(script).splitlines()[0]


def usage(script: Path) -> str:
    """The first command of a script's docstring."""
    found = re.search(r"^ {4}(python -m bench\..+)$", docstring(script), re.MULTILINE)
    if found is None:
        raise ValueError(f"{script.name} does not say how it is run")
    return found[1].strip()


def link(text: str, target: Path) -> str:
    return f"[{text}]({os.path.relpath(target, PAGE.parent)})"


def quoted_in(entry: Entry) -> str:
    """Links to the pages that name the result's file."""
    name = re.compile(rf"(?<![\w.-]){re.escape(entry.file.name)}")
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return ", ".join(link(page.stem, page) for page in pages if name.search(page.read_text(encoding="utf-8")))


def row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table(folder: str) -> str:
    """One folder's rows: a script's question stands beside the first of its results."""
    found: dict[Path, list[Entry]] = {script: [] for script in sorted((ROOT / "bench" / folder).glob("[!_]*.py"))}
    for entry in entries():
        if entry.name.startswith(f"{folder}/"):
            found.setdefault(entry.script, []).append(entry)
    rows = [row("question", "command", "result", "the number in it", "quoted in"), row(*["---"] * 5)]
    for script, results in found.items():
        asked = link(question(script), script)
        if not results:
            rows.append(row(asked, f"`{usage(script)}`", "", "", ""))
        for entry in results:
            note = f" ({entry.note})" if entry.note else ""
            result = link(entry.file.name, entry.file)
            rows.append(row(asked, f"`{entry.command}`{note}", result, number(entry), quoted_in(entry)))
            asked = ""
    return "\n".join(rows)


def page() -> str:
    """The whole page."""
    parts = [f"{words}\n\n{table(folder)}\n" for folder, words in FOLDERS.items()]
    return "\n".join([HEAD, *parts])


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}: {len(entries())} results")


if __name__ == "__main__":
    main()
