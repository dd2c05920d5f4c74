"""Commands beside the modes of `main.py`, one module each: `csc-jax NAME` calls its `main`.

Nothing here imports JAX, nor a command before it is asked for.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from csc_jax.errors import Interrupted, UserError
from csc_jax.text import printable

__all__ = ["NAMES", "at_least_one", "run"]

# The module of "import-weights" is import_weights.py; its docstring says what the command does.
NAMES = (
    "demo",
    "prepare",
    "import-annotations",
    "import-weights",
    "export-torch",
    "reproduce",
    "compare",
)


def run(name: str, arguments: Sequence[str]) -> int:
    """Runs a command and returns its exit status: 0, or that of the error (`errors.py`).

    Args:
      name: of NAMES.
      arguments: what follows the name.
    """
    command = importlib.import_module(f"csc_jax.commands.{name.replace('-', '_')}")
    try:
        status: int = command.main(arguments)
    except (UserError, OSError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return UserError.exit_status
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_status
    return status


def at_least_one(text: str) -> int:
    """Returns the number that an argument of a command gives, 1 or more."""
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1")
    return int(text)
