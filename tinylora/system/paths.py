"""Where things lie on disk: the cache folder, the data folder and the recipes that come with the package."""

import os
from pathlib import Path

ELSEWHERE = "choose another folder with TINYLORA_CACHE"
"""What to do where the cache folder cannot be used."""


def real(path: str | Path) -> Path:
    """A path in full, links and ~ followed. Unlike Path.resolve it raises nothing.

    Who uses the path meets what is wrong with it, such as a loop of links, as an OSError, and says it in its own words.
    """
    return Path(os.path.realpath(os.path.expanduser(path)))


def cache_dir() -> Path:
    """The folder for everything that can be fetched or computed again; it may not exist yet.

    $TINYLORA_CACHE if set, else $XDG_CACHE_HOME/tinylora, else ~/.cache/tinylora. `tinylora.system.cache` tells what is
    in it and empties it.
    """
    if chosen := os.environ.get("TINYLORA_CACHE"):
        return real(chosen)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return real(xdg) / "tinylora"
    return Path.home() / ".cache" / "tinylora"


def data_dir() -> Path:
    """The folder for what this user has decided and nothing can compute again; it may not exist yet.

    $TINYLORA_DATA if set, else $XDG_DATA_HOME/tinylora, else ~/.local/share/tinylora. See `tinylora.store.own`.
    """
    if chosen := os.environ.get("TINYLORA_DATA"):
        return real(chosen)
    if xdg := os.environ.get("XDG_DATA_HOME"):
        return real(xdg) / "tinylora"
    return Path.home() / ".local" / "share" / "tinylora"


def recipes_dir() -> Path:
    """The folder of the recipes that come with tinylora: inside an installed wheel, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"
