"""Config files by path, or by the name of one that comes with the package."""

import ast
import difflib
from pathlib import Path

from csc_jax.errors import UserError

_PACKAGE = Path(__file__).parents[1]
_MOST_BYTES = 1 << 20  # of a config file


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
      UserError: neither a file nor a name, or a file of something else.
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
        _check_file(path)
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


def _check_file(path: Path) -> None:
    """Raises UserError for a file that is no Python, or that defines no `get_config`."""
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES)
        body = ast.parse(text, str(path)).body
    except OSError as error:
        raise UserError(f"--config={path} cannot be read: {error.strerror}.") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise UserError(
            f"--config={path} is no config: it is not Python ({error.args[0]}{line})."
        ) from error
    names: set[str] = set()
    for statement in body:
        if isinstance(statement, ast.FunctionDef):
            names.add(statement.name)
        elif isinstance(statement, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in statement.names)
        elif isinstance(statement, ast.Assign):
            names.update(part.id for part in statement.targets if isinstance(part, ast.Name))
    if not names & {"get_config", "*"}:
        raise UserError(
            f"--config={path} is no config: it has no function get_config. The files in "
            f"{folder()} are examples."
        )
