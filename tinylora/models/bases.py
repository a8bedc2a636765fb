"""Base models seen on this machine, by fingerprint: to find the base of an adapter, and to say what is wrong with
another one."""

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tinylora.models.base import BaseModel
from tinylora.models.fingerprint import Fingerprint, Identity, from_json, identify, to_json
from tinylora.models.names import HUB_ID
from tinylora.system.digest import save_memo
from tinylora.system.paths import cache_dir

SAME_TO_ROUNDING = 3e-3
"""Relative distance up to which weights differ by another number format; rounding to bfloat16 is some 2e-3."""
NEAR = 0.25
"""Relative distance up to which two checkpoints come from one training: 2 to 20 % is what 4 to 8 bits cost."""


@dataclass(frozen=True, eq=False, slots=True)
class SeenBase:
    """A base model that was loaded here once."""

    identity: Identity
    names: tuple[str, ...]
    """As given to load it, the latest first."""
    seen: str
    """Date of the last time, ISO 8601."""


def folder() -> Path:
    """Where they are kept; it can be deleted at any time."""
    return cache_dir() / "bases"


def remember(base: BaseModel, *, hashed: bool = False) -> Identity:
    """The identity of a base model as it was loaded, noted among those seen; `hashed`: of its weights as they are now,
    not of what was remembered of its files."""
    identity = identify(base.model, () if hashed else base.files)
    name = base.name if base.kind in ("hub", "embedded") else str(Path(base.name).expanduser().resolve())
    name = written_name(name, base.revision, base.quantization)
    known = lookup(identity.fingerprint)
    names = (name, *(other for other in (known.names if known else ()) if other != name))
    today = datetime.now(UTC).date().isoformat()
    if known is None or known.names != names or known.seen != today:
        entry = {"names": names, "seen": today, **to_json(identity)}
        save_memo(folder() / f"{identity.fingerprint.hex()}.json", json.dumps(entry))
    return identity


def written_name(name: str, revision: str, quantization: str) -> str:
    """A base in one text: its name, the commit of a hub model, and how it was quantised."""
    return name + (f"@{revision}" if revision else "") + (f" [{quantization}]" if quantization != "none" else "")


def read_name(text: str) -> tuple[str, str, str]:
    """Name, revision and quantisation of what `written_name` gave, or of a name that somebody typed."""
    text, _, kind = text.partition(" [") if text.endswith("]") and not Path(text).exists() else (text, "", "")
    name, _, revision = (text, "", "") if Path(text).exists() else text.partition("@")
    return name, revision, kind.removesuffix("]") or "none"


def lookup(fingerprint: Fingerprint) -> SeenBase | None:
    """The base with this fingerprint, if it has been seen; a damaged entry counts as not seen."""
    try:
        entry = json.loads((folder() / f"{fingerprint.hex()}.json").read_text())
        names = tuple(map(str, entry["names"]))
        return SeenBase(from_json(entry), names, str(entry["seen"])) if names else None
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        return None


def has_been_seen(name: str, revision: str = "") -> bool:
    """Whether a base was loaded on this machine under that name; with a revision, that commit of it."""
    try:
        path = Path(os.path.expanduser(name))
        if not HUB_ID.fullmatch(name) or path.exists():
            name, revision = str(path.resolve()), ""
    except (OSError, ValueError):  # too long, or no path at all
        return False
    for file in folder().glob("*.json"):
        try:
            names = json.loads(file.read_text())["names"]
            known = [read_name(str(one))[:2] for one in names]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged entry counts as not seen
        if any(one == name and revision in ("", commit) for one, commit in known):
            return True
    return False


def explain_difference(wanted: Fingerprint, found: Identity) -> str:
    """What is different about a base that an adapter was not made for: the end of a sentence."""
    known = lookup(wanted)
    name = f" ({known.names[0]})" if known else ""
    if wanted.shape != found.fingerprint.shape:
        this = f"this is a {found.architecture} of {found.num_weights:,} weights"
        if known is None:
            return f"another architecture or other shapes; {this}"
        other = f"a {known.identity.architecture} of {known.identity.num_weights:,} weights{name}"
        return f"another architecture or other shapes: {other} was expected, {this}"
    if known is None:
        return "the same architecture and shapes, but other weights; the right base has not been seen on this machine"
    distance = known.identity.distance(found)
    if distance is None:
        return f"the same architecture and shapes, but other weights than {known.names[0]}"
    near = f"{_guess(distance)} {known.names[0]}?"
    return f"the same architecture and shapes, weights differ by {_percent(distance)}: {near}"


def _percent(distance: float) -> str:
    return f"{100 * distance:.2g} %"


def _guess(distance: float) -> str:
    if distance < SAME_TO_ROUNDING:
        return "a copy in another number format, or a fine-tune, of"
    return "a quantised copy, or a fine-tune, of" if distance < NEAR else "another training run than"
