"""`launches.jsonl`: how a run was started, each time, with which versions, and how long it took.

A line at each start and one at each end, which fails to appear where a process was killed.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import csc_jax

log = logging.getLogger("csc_jax")

_FILE = "launches.jsonl"
_MOST_BYTES = 16 * 2**20
_NOT_OURS = (LookupError, ArithmeticError, ValueError, TypeError, AttributeError, RecursionError)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


@dataclasses.dataclass(frozen=True)
class Launch:
    """A part of a run.

    Attributes:
      begin: time at its start, ISO 8601, UTC.
      command: words after `csc-jax`; None if it was started from Python.
      versions: of this package, the packages that compute, Python and the platform.
      devices: their number and kind.
      processes: how many.
      seconds: to its end; None if it did not come to tell.
    """

    begin: str
    command: tuple[str, ...] | None
    versions: Mapping[str, str]
    devices: str
    processes: int
    seconds: float | None = None

    @property
    def line(self) -> str:
        """The command, to be given to a shell; "" if there was none."""
        return "" if self.command is None else shlex.join(["csc-jax", *self.command])

    @property
    def config(self) -> str:
        """What --config was given; "" if nothing."""
        return self._flags().get("config", "")

    @property
    def overrides(self) -> dict[str, str]:
        """Field -> value as typed, of those that the command line set."""
        return {
            name.removeprefix("config."): value
            for name, value in self._flags().items()
            if name.startswith("config.")
        }

    def _flags(self) -> dict[str, str]:
        flags, words = {}, list(self.command or ())
        while words:
            name, equals, value = words.pop(0).partition("=")
            if not name.startswith("-"):
                continue
            if not equals and words and not words[0].startswith("-"):
                value = words.pop(0)
            flags[name.lstrip("-")] = value
        return flags


@contextlib.contextmanager
def launched(workdir: Path, devices: Sequence[jax.Device], began: float) -> Iterator[None]:
    """Notes when a part of a run began and when it ends; never a reason for it to fail.

    It is entered once nothing is left that could refuse the run.

    Args:
      workdir: of the run.
      devices: that it computes on.
      began: by `time.perf_counter`.
    """
    since = datetime.timedelta(seconds=time.perf_counter() - began)
    launch = Launch(
        (datetime.datetime.now(datetime.UTC) - since).isoformat(timespec="seconds"),
        _command(sys.argv),
        _versions(),
        f"{len(devices)} x {devices[0].device_kind}",
        jax.process_count(),
    )
    key = f"{launch.begin} {time.time_ns()}"
    _append(workdir, {"launch": key} | dataclasses.asdict(launch))
    try:
        yield
    finally:
        _append(workdir, {"launch": key, "seconds": round(time.perf_counter() - began, 1)})


def read_launches(workdir: Path) -> list[Launch]:
    """Returns the launches of a run in their order; lines that are none are passed over."""
    path = workdir / _FILE
    try:
        if path.stat().st_size > _MOST_BYTES:
            return []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found: dict[str, Launch] = {}
    for line in lines:
        with contextlib.suppress(*_NOT_OURS):
            values = json.loads(line)
            key = str(values["launch"])
            if key in found:
                found[key] = dataclasses.replace(found[key], seconds=float(values["seconds"]))
                continue
            command = values["command"]
            found[key] = Launch(
                str(values["begin"]),
                None if command is None else tuple(map(str, command)),
                {str(name): str(value) for name, value in values["versions"].items()},
                str(values["devices"]),
                int(values["processes"]),
            )
    return list(found.values())


def _append(workdir: Path, values: Mapping[str, Any]) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with (workdir / _FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:
        log.warning("%s cannot be written (%s); training goes on", workdir / _FILE, error)


def _command(argv: Sequence[str]) -> tuple[str, ...] | None:
    """Returns the words after the command if it is this package's, else None."""
    program = Path(argv[0]) if argv else Path()
    ours = program.stem == "csc-jax" or program.parts[-2:] == ("csc_jax", "main.py")
    return tuple(argv[1:]) if ours else None


def _versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in _PACKAGES}
    system = f"{platform.system()} {platform.machine()}"
    return {
        "csc_jax": csc_jax.__version__,
        **packages,
        "Python": platform.python_version(),
        "platform": system,
    }
