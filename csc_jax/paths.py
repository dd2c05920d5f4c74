"""Paths that a user gives, before anything is looked for there."""

from pathlib import Path

from csc_jax.errors import UserError
from csc_jax.text import name


def given(field: str, text: str) -> Path:
    """Returns the path that a field or flag holds, "~" expanded.

    Args:
      field: as an error names it, such as `data.cache_dir` or `--out`.
      text: its value.

    Raises:
      UserError: "~" of a user that there is not, or of one without a home, or a NUL.
    """
    if "\0" in text:
        raise UserError(f"{field} is {name(text)!r}; no path holds a NUL. Give another one.")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # what pathlib raises where there is no such home
        raise UserError(
            f"{field} is {text!r}, but {_whose(text)} home folder is not known (an unknown user, "
            "or HOME is not set). Give a path without '~', or set HOME."
        ) from error


def cache_folder(field: str, text: str) -> Path:
    """Returns the folder that `field` names, or ~/.cache/csc_jax where it is "".

    Raises:
      UserError: as `given`; without a home, the message names `field`.
    """
    if text:
        return given(field, text)
    try:
        return Path.home() / ".cache" / "csc_jax"
    except RuntimeError as error:
        raise UserError(
            f"{field} is not set, and its default, ~/.cache/csc_jax, cannot be found: HOME is not "
            f"set and this user is unknown here. Give a folder, --config.{field}=DIR, or set HOME."
        ) from error


def _whose(text: str) -> str:
    user = text.removeprefix("~").partition("/")[0]
    return f"{name(user)}'s" if user else "your"
