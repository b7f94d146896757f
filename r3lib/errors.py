"""The one error a user sees: a line that says what is wrong and what to do."""


class R3Error(Exception):
    """Bad input or a broken precondition; the command line prints it as one line and exits with 2."""
