"""The systems of the paper's tables, one readable file each.

A method is a class `METHOD` in a module of this package; the module's name is the method's name
(`--config.method.name`). `base.py` says what a method provides and what it is given.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable

from csc_jax.errors import UserError
from csc_jax.methods.base import LossOutputs, Method, Pixels, Task

__all__ = ["LossOutputs", "Method", "Pixels", "Task", "available", "build"]


def available() -> list[str]:
    """Returns the names of all methods."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if name not in ("base", "shared"))


def build(task: Task) -> Method:
    """Returns the method that `config.method` names, with the contrastive module on top or not.

    Raises:
      UserError: there is no such method, or it is that module already.
    """
    name, on_top = task.config.method.name, task.config.method.contrast
    if name not in available():
        close = difflib.get_close_matches(name, available(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"method.name is {name!r}, which is not a method.{hint} "
            f"Available: {', '.join(available())}."
        )
    if on_top == name:
        raise UserError(
            f"method.contrast puts {on_top} on top of method.name, which is {name} already. Name "
            "another method below, or leave method.contrast at none."
        )
    if on_top == "none":
        method = _class(name)(task)
    else:
        method = _class(on_top)(task, _class(name)(task, with_pixels=True))
    if task.config.train.accumulate > 1 and not method.accumulates:
        raise UserError(
            f"train.accumulate is {task.config.train.accumulate}, but {name} needs its batch in "
            "one piece. Set it to 1; --config.model.remat=True saves memory as well."
        )
    return method


def _class(name: str) -> Callable[..., Method]:
    return importlib.import_module(f"{__name__}.{name}").METHOD
