"""The one exception, and the one warning, that a user is meant to read."""


class MlxtxError(Exception):
    """A problem the user can act on: one line that says what is wrong and what to do.

    Commands print it on stderr and exit with code 2; a traceback appears only with ``--debug``.
    """

    def __init__(self, message: str) -> None:
        """Names and texts in ``message`` may come from anybody: line ends become spaces, and what
        cannot be printed, such as a terminal's escape sequences, shows as its code."""
        words = " ".join(message.splitlines())
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in words))


class MlxtxWarning(UserWarning):
    """Something the user should know while the work goes on. Commands print it as one line on
    stderr, the terminal app shows it as a notice."""
