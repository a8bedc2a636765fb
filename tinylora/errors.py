"""The one exception a user is meant to read."""


class UserError(ValueError):
    """Something the user can act on: says the value, what is allowed and the next step.

    The command line prints it as one sentence and exits with code 2.
    """
