"""The compiled train step on disk, read back while its program is still being traced.

JAX's compilation cache knows a program by its text, so it cannot begin to read before all is traced
and lowered. On a CPU the reading takes as long as both. Here it goes on meanwhile, in a thread:
what the last run of the same config had compiled is read, and taken if the program comes out the
same to the letter. If not, or if it cannot be read, the step is compiled as ever.
"""

import contextlib
import hashlib
import json
import logging
import os
import pickle
import platform
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh
from ml_collections import ConfigDict

from csc_jax import config as config_lib
from csc_jax.training.background import in_background

log = logging.getLogger("csc_jax")

_MISS = "/jax/compilation_cache/cache_misses"  # JAX's event: compiled, and put into its cache


class KeptStep:
    """The step that the last run of a config took; it is read from the construction on.

    A folder holds steps, named by the digests of their programs, and for each config the name of
    its last.
    """

    def __init__(self, folder: Path, config: str, machine: str, mesh: Mesh):
        """Begins to read.

        Args:
          folder: where steps are kept; need not be there.
          config: a digest of all that may decide about the program.
          machine: all that decides about its machine code besides.
          mesh: the devices.
        """
        self._folder, self._machine = folder, machine
        self._last = folder / f"{config}.last"
        self._devices = list(mesh.devices.flat)
        self._name = ""
        self._reading: Future[jax.stages.Compiled | None] | None = None
        self.saved: Future[None] | None = None  # done when all that `compile` keeps is written
        with contextlib.suppress(OSError):
            self._name = self._last.read_text()
            self._reading = in_background(self._load, folder / self._name)

    def compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Returns `lowered.compile()`, or what was read if that is the same program.

        What had to be compiled, and went to JAX's cache, is kept, written in the background. What
        came from JAX's cache cannot be: written out and read a second time, an executable of a CPU
        lacks its functions.
        """
        name = _digest(self._machine, lowered.as_text())
        if self._reading is not None and self._name == name:
            program = self._reading.result()
            if program is not None:
                return program
        with _misses() as misses:
            program = lowered.compile()
        self.saved = in_background(self._save, name, program if misses else None)
        return program

    def _load(self, path: Path) -> jax.stages.Compiled | None:
        try:
            program, in_tree, out_tree = pickle.loads(zlib.decompress(path.read_bytes()))
            return serialize_executable.deserialize_and_load(
                program, in_tree, out_tree, execution_devices=self._devices
            )
        except FileNotFoundError:  # somebody has cleared up
            return None
        except Exception as error:  # cut off, or of something that has changed since
            log.warning("%s is removed, as it cannot be read: %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def _save(self, name: str, program: jax.stages.Compiled | None) -> None:
        path = self._folder / name
        try:
            if program is not None:
                stored = pickle.dumps(serialize_executable.serialize(program))
                self._folder.mkdir(parents=True, exist_ok=True)
                _write(path, zlib.compress(stored, level=1))
            if path.exists():
                _write(self._last, name.encode())
        except Exception as error:  # a full disk, or an executable that cannot be written out
            log.warning("The compiled step cannot be kept as %s: %s", path, error)


def kept_step(config: ConfigDict, mesh: Mesh) -> KeptStep | None:
    """Returns the `KeptStep` of a config, beside JAX's compilation cache, or None.

    None is for runs without that cache or with one that is no folder, for several processes, and
    for anything but a CPU, where none of this has been tried.
    """
    settings = jax.config.values
    folder, device = settings["jax_compilation_cache_dir"], mesh.devices.flat[0]
    local = folder and settings["jax_enable_compilation_cache"] and "://" not in folder
    if not local or device.platform != "cpu" or jax.process_count() > 1:
        return None
    plain = {name: x for name, x in config_lib.to_plain(config).items() if name != "seed"}
    versions = [version("jax"), version("jaxlib"), os.environ.get("XLA_FLAGS")]
    machine = repr([versions, sorted(settings.items()), mesh.devices.shape, _cpu()])
    name = _digest(machine, json.dumps(plain))
    return KeptStep(Path(folder) / "csc_jax_steps", name, machine, mesh)


def _write(path: Path, content: bytes) -> None:
    """Writes a file in one go: another run may be reading it."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def _misses() -> Iterator[list[str]]:
    """Lists the programs, a word for each, that this thread compiles and JAX's cache takes."""
    seen: list[str] = []
    thread = threading.get_ident()

    def listen(event: str, **_: object) -> None:
        if event == _MISS and threading.get_ident() == thread:
            seen.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_listener(listen)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _cpu() -> str:
    """Returns what tells machines apart that do not run each other's machine code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    features = [line for line in lines if line.startswith(("flags", "Features"))]
    return f"{platform.machine()} {features[0] if features else platform.processor()}"
