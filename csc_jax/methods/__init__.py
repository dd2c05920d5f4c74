"""The systems of the paper's tables, one readable file each.

A method is a class `METHOD` in a module of this package; the module's name is the method's name
(`--config.method.name`). `base.py` says what a method provides and what it is given.
"""

import difflib
import importlib
import pkgutil

from csc_jax.errors import UserError
from csc_jax.methods.base import LossOutputs, Method, Pixels, Task

__all__ = ["LossOutputs", "Method", "Pixels", "Task", "available", "build"]


def available() -> list[str]:
    """Returns the names of all methods."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if name != "base")


def build(task: Task) -> Method:
    """Returns the method that `config.method.name` names.

    Raises:
      UserError: there is no such method.
    """
    name = task.config.method.name
    if name not in available():
        close = difflib.get_close_matches(name, available(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"method.name is {name!r}, which is not a method.{hint} "
            f"Available: {', '.join(available())}."
        )
    return importlib.import_module(f"{__name__}.{name}").METHOD(task)
