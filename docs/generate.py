"""Write what of docs/ comes from the program: settings.md, and in cli.md the help of every verb.

    python docs/generate.py

tests/docs/test_generated.py fails where a page is not what this writes.
"""

import contextlib
import io
import os
import re
from pathlib import Path

from tinylora.cli import app
from tinylora.config.help import FieldHelp, SectionHelp, describe_sections

DOCS = Path(__file__).parent
COLUMNS = "80"
BEGIN, END = "<!-- help: written by docs/generate.py -->", "<!-- /help -->"
GROUPS = {
    "Train and prove": ("train", "eval", "report", "sweep", "figure"),
    "Look and play": ("chat", "inspect", "bench", "recipes", "settings", "cache"),
    "Carry elsewhere": (
        "encode", "decode", "verify", "export", "import", "diff", "mix", "card", "push", "pull",
    ),
}  # fmt: skip
"""Every verb, once, as a user meets it."""
MORE = {
    "train": "[training](#training), [dry runs](#dry-runs), [every setting](settings.md)",
    "eval": "[evaluating](#evaluating), [evaluation.md](evaluation.md)",
    "report": "[the report](#the-report)",
    "sweep": "[sweeps.md](sweeps.md)",
    "figure": "[sweeps.md](sweeps.md)",
    "chat": "[talking](#talking)",
    "inspect": "[looking at a model](#looking-at-a-model)",
    "bench": "[speed](#speed)",
    "settings": "[settings.md](settings.md)",
    **dict.fromkeys(("encode", "decode", "verify", "diff", "mix"), "[adapters](#adapters), [format.md](format.md)"),
    **dict.fromkeys(("export", "import"), "[other tools](#other-tools)"),
    **dict.fromkeys(("card", "push", "pull"), "[the hub](#the-hub)"),
}
"""Where a verb is told of at length."""


def help_of(*words: str) -> str:
    """What `tinylora WORDS --help` prints on 80 columns."""
    printed, before = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = COLUMNS
    try:
        with contextlib.redirect_stdout(printed):
            app([*words, "--help"], prog_name="tinylora", standalone_mode=False)
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    return printed.getvalue().rstrip() + "\n"


def verbs() -> str:
    """The help of all verbs, in their groups."""
    parts = [f"```text\n{help_of()}```"]
    for group, names in GROUPS.items():
        parts.append(f"## {group}")
        for name in names:
            parts += [f"### {name}", f"```text\n{help_of(name)}```"]
            if name in MORE:
                parts.append(f"More: {MORE[name]}.")
    return "\n\n".join(parts)


def cli_page(page: str) -> str:
    """cli.md with the part between the markers written anew."""
    above, _, rest = page.partition(BEGIN)
    _, _, below = rest.partition(END)
    return f"{above}{BEGIN}\n\n{verbs()}\n\n{END}{below}"


def settings_page() -> str:
    """settings.md, whole."""
    sections = describe_sections()
    head = f"""<!-- Written by docs/generate.py from the dataclasses in tinylora/config; change it there. -->

# Settings

Every setting of a run: {sum(len(section.settings) for section in sections)} of them, in {len(sections)} sections.
A setting stands in a recipe, under its section:

```toml
[optim]
lr = 0.02
```

or behind `--set`, which wins over the recipe:

    tinylora train demo --set optim.lr=0.02

There the value is TOML, too, but text needs no quotes. What neither names has the default below; a public set brings
some of its own ([tasks.md](tasks.md#public-sets)). The run's folder keeps all of them in `config.toml`.

`tinylora settings` prints this list, `tinylora settings optim` one section of it, and `tinylora settings optim.lr` one
setting.

Sections: {", ".join(f"[{section.name}](#{section.name})" for section in sections)}."""
    return "\n\n".join([head, *map(_section, sections)]) + "\n"


def _section(section: SectionHelp) -> str:
    rows = ["| key | what it is | default | allowed |", "| --- | --- | --- | --- |", *map(_row, section.settings)]
    about = [] if section.about == section.settings[0].help else [_plain(section.about)]
    return "\n\n".join([f"## {section.name}", *about, "\n".join(rows)])


def _row(row: FieldHelp) -> str:
    return f"| `{row.key}` | {_plain(row.help)} | `{row.default}` | {_allowed(row.type)} |"


def _allowed(words: str) -> str:
    if words.startswith("one of "):
        return ", ".join(f"`{choice}`" for choice in words.removeprefix("one of ").split(", "))
    what, such_as, example = words.partition("such as ")
    return f"{what}{such_as}`{example}`" if example else words


def _plain(text: str) -> str:
    """Text for a cell: on one line, with nothing that Markdown would take for its own; pages of docs/ become links."""
    escaped = re.sub(r"([*|<\[\]])", r"\\\1", " ".join(text.split()))
    return re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", escaped)


def pages() -> dict[Path, str]:
    """Each page that is written here, and what it has to be."""
    cli = DOCS / "cli.md"
    return {cli: cli_page(cli.read_text(encoding="utf-8")), DOCS / "settings.md": settings_page()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(DOCS.parent)}")
