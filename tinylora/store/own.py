"""Whose settings: this user's own, or a stranger's, which are data (config/strangers.py).

Own is what was made here. When a run begins, what its settings say beyond a stranger's list goes into the user's data
folder, under a hash of it; settings that say the same later are the user's, wherever they lie: in the run, moved or
copied, or in an adapter file. No folder and no file can bring such a mark along. Code that is looked up in the working
folder (a scorer, a model's own code) is own in the folders in which it was used, and where the same code lies. What was
made before there were marks, or on another machine, is taken in by `trust`.
"""

import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import fields
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from tinylora.config.run import RunConfig
from tinylora.config.strangers import beyond
from tinylora.errors import UserError
from tinylora.models.bases import has_been_seen
from tinylora.system.files import replace_file
from tinylora.system.paths import data_dir
from tinylora.talk import Say, one_line

MOST_PLACES, MOST_ENTRIES, MOST_BYTES = 40, 5000, 20_000_000
Ask = Callable[[str], bool | None]
"""A question with a yes or a no; None where there is nobody to ask."""


def is_own(config: RunConfig) -> bool:
    """Whether this user has made or trusted settings that say the same, or these say nothing that matters."""
    said = beyond(config)
    if not said:
        return True
    known, place = _places(said), _place(config)
    if not known or not place:
        return bool(known)
    here = [one for one in (place, _code_in(place)) if one]
    if not set(here) & set(known):
        return False
    if not set(here) <= set(known):  # moved as a whole, or with another module beside it: known from now on
        with suppress(OSError):
            _write(said, [*known, *here])
    return True


def remember_own(config: RunConfig, say: Say) -> None:
    """Note settings as this user's own. Where that cannot be written, `say` tells what follows from it."""
    said = beyond(config)
    if not said or is_own(config):
        return
    file, place = _file(said), _place(config)
    try:
        for folder in (data_dir(), file.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_safe():
            raise UserError("others may write there")
        _write(said, [*_places(said), place, _code_in(place)])
    except (OSError, UserError) as error:
        why = (getattr(error, "strerror", None) or str(error)).lower()
        say(
            f"that these settings are yours could not be noted in {file.parent} ({why}), so later commands will want "
            "--trust; TINYLORA_DATA names another folder"
        )


def unsettled(config: RunConfig, sections: Iterable[str], settled: Iterable[str] = ()) -> dict[str, Any]:
    """What a stranger's settings say beyond the list, in these sections, and nobody has settled.

    settled: names of settings, or of whole sections, that the command line has taken over. A base that was loaded here
    before is settled. Empty for the user's own settings.
    """
    if is_own(config):
        return {}
    wanted, taken = tuple(sections), set(settled)
    said = {key: value for key, value in beyond(config).items() if key.partition(".")[0] in wanted}
    if has_been_seen(config.model.name, config.model.revision):
        taken |= {"model.name", "model.revision"}
    if "task.scorer" in said:  # its options go with it
        said.pop("task.scorer_options", None)
    return {key: value for key, value in said.items() if key not in taken and key.partition(".")[0] not in taken}


def _nobody(question: str) -> None:
    """For calls from Python."""


def settle_run(
    run: Path,
    config: RunConfig,
    settled: Iterable[str] = (),
    *,
    trust: bool = False,
    ask: Ask = _nobody,
    say: Say,
) -> None:
    """See to it that a run may be gone on with: everything that its settings say is this user's own, or harmless.

    Raises: UserError where it is not, and is not trusted.
    """
    left = unsettled(config, [field.name for field in fields(RunConfig)], settled)
    if left or trust:
        refuse_or_trust(str(run), config, left, trust=trust, ask=ask, say=say)


def refuse_or_trust(
    label: str, config: RunConfig, left: dict[str, Any], *, trust: bool, ask: Ask, say: Say, instead: str = ""
) -> None:
    """Take settings that say `left` (see `unsettled`) for this user's own from now on, by --trust or by an answer.

    instead: another way to go on than --trust, such as "name the task with --task". Raises: UserError where they are
    not trusted.
    """
    if trust:
        remember_own(config, say)
        return
    what = ", ".join(f"{key} = {_short(value)}" for key, value in left.items())
    told = f"{label} was not made by you on this machine, and it says what to run, read or load here: {what}"
    if ask(f"{told}. Trust it, now and later?"):
        remember_own(config, say)
        return
    raise UserError(f"{told}; if you trust that, add --trust (once){f', or {instead}' if instead else ''}")


def ask_on_terminal(question: str) -> bool | None:
    """Ask the person at the terminal; None where there is none."""
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    print(f"{one_line(question, 4000)} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _short(value: Any) -> str:
    text = ascii(value)  # a stranger's text, and nothing in it reaches the terminal as it is
    return text if len(text) <= 120 else f"{text[:117]}..."


def _file(said: dict[str, Any]) -> Path:
    text = json.dumps(said, sort_keys=True, ensure_ascii=True)
    return data_dir() / "own" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def _places(said: dict[str, Any]) -> list[str]:
    """Working folders in which these settings are the user's own; empty if they are not."""
    if not _is_safe():
        return []
    try:
        return [str(one) for one in json.loads(_file(said).read_text())["places"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _write(said: dict[str, Any], places: Iterable[str]) -> None:
    kept = list(dict.fromkeys(places))[-MOST_PLACES:]
    text = json.dumps({"said": said, "places": kept}, indent=1)
    replace_file(_file(said), lambda scratch: scratch.write_text(text + "\n"))


def _code_in(place: str) -> str:
    """A hash of all that Python could import from a folder, by which it is known when it was moved or copied as a
    whole; nothing for a folder with so much in it, or with links, that this would say little."""
    digest, entries, num_bytes = hashlib.sha256(), 0, 0
    if not place:
        return ""
    for folder, folders, files in os.walk(place):
        folders[:] = sorted(one for one in folders if one.isidentifier())
        entries += len(folders) + len(files)
        code = [one for one in sorted(files) if one.endswith((".py", ".pyc", ".so", ".pyd"))]
        paths = [Path(folder, one) for one in (*folders, *code)]
        try:
            num_bytes += sum(one.stat().st_size for one in paths if one.is_file())
            if entries > MOST_ENTRIES or num_bytes > MOST_BYTES or any(one.is_symlink() for one in paths):
                return ""
            for one in code:
                content = hashlib.sha256(Path(folder, one).read_bytes()).hexdigest()
                digest.update(f"{Path(folder, one).relative_to(place)}\0{content}\0".encode("utf-8", "replace"))
        except OSError:
            return ""
    return f"code {digest.hexdigest()}"


def _is_safe() -> bool:
    """Whether nobody but this user can write the marks."""
    if os.name != "posix":
        return True
    try:
        outer, inner = data_dir().stat(), (data_dir() / "own").stat()
    except OSError:
        return False
    of_others = outer.st_mode & stat.S_IWOTH or inner.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return {outer.st_uid, inner.st_uid} == {os.geteuid()} and not of_others


def _place(config: RunConfig) -> str:
    """The working folder, where code that the settings name would be taken from it; else nothing."""
    here = os.getcwd()
    module, colon, _ = config.task.scorer.partition(":")
    if colon and PathFinder.find_spec(module.partition(".")[0], [here]) is not None:
        return here
    model = Path(config.model.name)
    return here if config.model.trust_remote_code and not model.is_absolute() and model.is_dir() else ""
