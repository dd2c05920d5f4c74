"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Bad input from outside: a file, a config field, a command line.

    The message is one paragraph that names the file or field, the offending value and the way
    out. `main` prints it without a traceback and exits with status 2.
    """
