"""The one exception a user is meant to read."""


class MlxtxError(Exception):
    """A problem the user can act on: one line that says what is wrong and what to do.

    Commands print it on stderr and exit with code 2; a traceback appears only with ``--debug``.
    """
