"""recipes and cache: what comes with the program, and what it keeps."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from tinylora.cli.common import Json, app, print_json, verb
from tinylora.talk import show


@app.command()
@verb
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete all of it; it comes back when it is needed.")] = False,
    as_json: Json = False,
) -> None:
    """Show what is cached, where and how large, or delete it.

    \b
    Examples:
      tinylora cache
      tinylora cache --clear
    """
    from tinylora.system.cache import cache_report, clear_cache
    from tinylora.system.paths import cache_dir

    if clear:
        freed = clear_cache()
        if as_json:
            print_json({"folder": str(cache_dir()), "freed_bytes": freed})
        else:
            show(f"freed {freed / 1e6:,.1f} MB in {cache_dir()}")
        return
    entries = cache_report()
    if as_json:
        print_json({"folder": str(cache_dir()), "entries": [dataclasses.asdict(entry) for entry in entries]})
        return
    show(f"{cache_dir()} ($TINYLORA_CACHE moves it)")
    for entry in entries:
        show(f"  {entry.kind:<12} {entry.total_bytes / 1e6:>9,.1f} MB  {entry.num_files:>4} files  {entry.about}")
    show(f"  {'total':<12} {sum(entry.total_bytes for entry in entries) / 1e6:>9,.1f} MB")


@app.command()
@verb
def recipes(as_json: Json = False) -> None:
    """List the recipes that come with tinylora.

    \b
    Examples:
      tinylora recipes
      tinylora train demo --dry-run
    """
    from tinylora.system.paths import recipes_dir

    found = {
        path.stem: _first_comment(path) for path in sorted(recipes_dir().glob("*.toml"), key=lambda path: path.stem)
    }
    if as_json:
        print_json({"folder": str(recipes_dir()), "recipes": found})
        return
    width = max((len(name) for name in found), default=0)
    for name, about in found.items():
        show(f"{name:<{width}}  {about}")


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")
