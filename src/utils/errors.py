"""The one exception of this repository that a user is meant to see."""


class UserError(Exception):
    """Bad input: one line that says what was given, what was wanted and what to type."""
