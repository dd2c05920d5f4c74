"""Config files by path, or by the name of one that comes with the package."""

import difflib
from pathlib import Path

from csc_jax.errors import UserError

_PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """Returns the folder of the files that come with the package."""
    installed = _PACKAGE / "configs"  # a wheel has them here, a checkout beside the package
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """Returns their names, such as `camvid`."""
    return sorted(path.stem for path in folder().glob("*.py"))


def find(value: str) -> str:
    """Returns the path of the config file that `value` stands for.

    Args:
      value: a path or a name; `camvid`, `camvid.py` and `configs/camvid.py` all name one file. A
        file that exists goes before a name. What follows a colon is kept: `get_config` takes it.

    Raises:
      UserError: neither a file nor a name.
    """
    text, colon, argument = value.partition(":")
    path = Path(text)
    try:
        there = path.is_file()
    except OSError as error:  # a folder on the way that may not be looked into
        raise UserError(
            f"--config={text} cannot be read: {error.strerror}. Grant access to it."
        ) from error
    if there:
        return value
    name = path.stem if path.suffix == ".py" else path.name
    if path.parent in (Path(), Path("configs")) and name in names():
        return f"{folder() / name}.py{colon}{argument}"
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f" Did you mean --config={near[0]}?" if near else ""
    raise UserError(
        f"--config={text} is neither a file nor the name of a config.{hint} There are "
        f"{', '.join(names())}."
    )
