"""settings: every setting that a recipe and --set take."""

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from tinylora.cli.common import Json, app, print_json, verb
from tinylora.errors import UserError
from tinylora.talk import show

if TYPE_CHECKING:
    from tinylora.config.help import FieldHelp, SectionHelp


@app.command()
@verb
def settings(
    name: Annotated[
        str, typer.Argument(metavar="SECTION", help="A section, such as optim, or one setting, such as optim.lr.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Print every setting with its default. Each can stand in a recipe or behind --set.

    \b
    Examples:
      tinylora settings
      tinylora settings optim
      tinylora settings optim.lr
      tinylora settings | grep seed
    """
    from tinylora.config.help import describe_sections

    found = _named(name, describe_sections())
    if as_json:
        print_json(_for_machines(found))
    else:
        width = min(max(shutil.get_terminal_size().columns, 50), 110)
        show("\n\n".join("\n".join(_lines(section, width)) for section in found))


def _named(name: str, sections: "Sequence[SectionHelp]") -> "list[SectionHelp]":
    """All sections, one of them, or one with a single setting. Raises: UserError for a name that is none."""
    from tinylora.config.help import SectionHelp
    from tinylora.config.schema import closest

    if not name:
        return list(sections)
    for section in sections:
        if section.name == name:
            return [section]
        for row in section.settings:
            if row.key == name:
                return [SectionHelp(section.name, section.about, (row,))]
    names, keys = [section.name for section in sections], [row.key for section in sections for row in section.settings]
    homes = [key for key in keys if key.endswith(f".{name}")]  # a key without its section is a common slip
    hint = f", did you mean {' or '.join(map(repr, homes))}?" if homes else closest(name, [*names, *keys])
    raise UserError(f"unknown section or setting {name!r}{hint}; the sections are {', '.join(names)}")


def _lines(section: "SectionHelp", width: int) -> Iterator[str]:
    """A section as text: its heading, then each setting as TOML writes it, and below that what it is."""
    yield from textwrap.wrap(f"[{section.name}]  {section.about}", width, subsequent_indent="  ")
    for row in section.settings:
        yield ""
        first = f"  {row.key} = {row.default}"
        if len(first) + len(row.type) + 4 <= width:
            yield f"{first}  ({row.type})"
        else:
            yield first
            yield from _wrapped(f"({row.type})", width)
        if row.help != section.about:
            yield from _wrapped(row.help, width)


def _wrapped(text: str, width: int) -> list[str]:
    # names such as bnb-4bit and train.jsonl stay whole, so that they can be searched for and copied
    return textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)


def _for_machines(found: "Sequence[SectionHelp]") -> dict[str, object]:
    """One object; defaults are values, not TOML."""
    import tomllib

    def plain(row: "FieldHelp") -> dict[str, object]:
        default = tomllib.loads(f"default = {row.default}")["default"]
        return {"key": row.key, "type": row.type, "default": default, "help": " ".join(row.help.split())}

    return {
        "sections": {section.name: section.about for section in found},
        "settings": [plain(row) for section in found for row in section.settings],
    }
