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
