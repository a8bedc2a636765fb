"""The one exception a user is meant to read, and the checks of settings that raise it."""


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
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{key} must be text in UTF-8, got {value!r}; rename the file")
