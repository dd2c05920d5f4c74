"""One run per work directory: a lock that dies with its process."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from csc_jax.errors import UserError


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Holds `workdir/run.lock` while the block runs.

    The operating system lets go of it when the process ends, however it ends, so that a lock left
    by a dead process is simply taken over.

    Raises:
      UserError: another process holds it (the message names host and process), or the work
        directory cannot be written.
    """
    path = workdir / "run.lock"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise _not_writable(path, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{workdir} is in use by {_holder(path)}. Wait for that run, stop it, or choose "
                "another --workdir."
            ) from error
        try:
            file.truncate(0)
            json.dump({"host": socket.gethostname(), "process": os.getpid()}, file)
            file.flush()
        except OSError as error:
            raise _not_writable(path, error) from error
        yield
        file.truncate(0)


def _not_writable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be written: {error}. Make room, or choose another --workdir.")


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['process']} on {holder['host']}"
    except (OSError, ValueError, KeyError):  # caught between taking the lock and signing it
        return "another process"
