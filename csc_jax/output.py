"""What a command says: safe to print, and no reason to end when nobody reads it any more.

`csc-jax … | head -1` closes the pipe after a line, a terminal hangs up, a disk with the log fills.
None of these may cost a run its next checkpoint.
"""

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from csc_jax.text import printable


class Formatter(logging.Formatter):
    """Formats records for a terminal, see `text.printable`."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line or lines of a record."""
        return printable(super().format(record))


class Outliving:
    """A text stream that goes on, in silence, once it cannot be written to any more.

    What it cannot encode comes out as an escape. All else is the stream's own.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        with contextlib.suppress(AttributeError):  # not of every stream: a notebook's, a test's
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        """Writes, and returns the number of characters, also of those that nobody will see."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Flushes."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self, error: OSError) -> None:
        # The descriptor leads nowhere from now on: libraries write to it too, and Python flushes
        # what is left in its buffer at the end.
        with contextlib.suppress(OSError, ValueError):
            descriptor = self._stream.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
        if self is sys.stdout:
            reason = error.strerror or error
            print(f"Standard output has gone ({reason}); this goes on without it", file=sys.stderr)


def outlive_readers() -> None:
    """Makes standard output and standard error `Outliving`; opens those that are closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # `>&-`: the next file to be opened would take the descriptor's place
            stream = Path(os.devnull).open("w")  # noqa: SIM115 - for good
        if not isinstance(stream, Outliving):
            setattr(sys, name, Outliving(stream))
