"""The one exception a user is meant to read, and the checks of settings that raise it."""

from collections.abc import Mapping


class UserError(ValueError):
    """Something the user can act on: says the value, what is allowed and the next step.

    The command line prints it as one sentence and exits with code 2.
    """


def require(ok: bool, key: str, allowed: str, value: object) -> None:
    """Raises: UserError, unless ok, that names a setting, what it must be, and what it is."""
    if not ok:
        raise UserError(f"{key} must be {allowed}, got {value!r}")


def require_at_least(least: int, section: str, config: object, *names: str) -> None:
    """`require` for several numbers of one section that have the same lower bound."""
    for name in names:
        value = getattr(config, name)
        require(value >= least, f"{section}.{name}", f"at least {least}", value)


BACKSLASH = r"""write a Windows path in single quotes ('C:\data\mine.jsonl') or with forward slashes"""


def check_path(key: str, value: str) -> None:
    """Raises: UserError for a path with a control character, which "C:\\new" holds for TOML, and one of half
    characters, which stand for bytes that are not UTF-8 and which no settings file can keep."""
    if any(ord(c) < 32 or ord(c) == 127 for c in value):
        raise UserError(f"{key} holds a control character: {value!r}; {BACKSLASH}")
    check_text(key, value, "; rename the file")


def is_text(value: str) -> bool:
    """Whether UTF-8 has it: not so half characters (lone surrogates), which also stand for bytes of other encodings."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_text(key: str, value: object, then: str = "") -> None:
    """Raises: UserError for half characters in a text, or in one of a list's or a table's, which no file can keep."""
    if isinstance(value, str):
        require(is_text(value), key, f"text that UTF-8 has{then}", value)
    elif isinstance(value, Mapping):
        for name, one in value.items():
            check_text(key, name)
            check_text(f"{key}.{name}", one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            check_text(key, one)
