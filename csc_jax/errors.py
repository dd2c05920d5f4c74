"""How a run ends other than well: what the user can do something about, and what stopped it."""


class UserError(Exception):
    """Something the user can put right; the message names the file or field and the way out."""

    exit_status = 2


class Diverged(UserError):
    """Loss or gradient was not finite for too many steps in a row."""

    exit_status = 3


class Interrupted(Exception):
    """A signal ended the run after a checkpoint; the same command continues it."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: try again
