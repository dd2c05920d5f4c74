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
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.sharding import Mesh
from ml_collections import ConfigDict

from csc_jax import config as config_lib

log = logging.getLogger("csc_jax")

_MISS = "/jax/compilation_cache/cache_misses"  # JAX's event: compiled, and put into its cache
_HEADER = hashlib.sha256().digest_size  # bytes: the digest of the program


class KeptStep:
    """What the last run of a config had compiled; it is read from the construction on."""

    def __init__(self, path: Path, mesh: Mesh):
        """Reads `path`, where there is such a file, for the devices of `mesh`."""
        self._path = path
        self._devices = list(mesh.devices.flat)
        self._thread = ThreadPoolExecutor(1, "kept step")
        self._digest = b""
        self._reading: Future[jax.stages.Compiled | None] | None = None
        with contextlib.suppress(OSError):
            stored = path.read_bytes()
            self._digest = stored[:_HEADER]
            self._reading = self._thread.submit(self._load, stored[_HEADER:])

    def compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Returns `lowered.compile()`, or what was read if that is the same program.

        What had to be compiled, and went to JAX's cache, takes its place, written in the
        background. What came from JAX's cache does not: written out and read a second time, an
        executable of a CPU lacks its functions.
        """
        digest = _digest(lowered)
        if self._reading is not None and self._digest == digest:
            program = self._reading.result()
            if program is not None:
                return program
        with _misses() as misses:
            program = lowered.compile()
        if misses:
            self._thread.submit(self._save, digest, program)
        return program

    def _load(self, stored: bytes) -> jax.stages.Compiled | None:
        try:
            program, in_tree, out_tree = pickle.loads(zlib.decompress(stored))
            return serialize_executable.deserialize_and_load(
                program, in_tree, out_tree, execution_devices=self._devices
            )
        except Exception as error:  # cut off, or of something that has changed since
            log.warning("%s cannot be read, so the step is compiled: %s", self._path, error)
            return None

    def _save(self, digest: bytes, program: jax.stages.Compiled) -> None:
        unfinished = self._path.with_suffix(f".{os.getpid()}")
        try:
            stored = pickle.dumps(serialize_executable.serialize(program))
            self._path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(digest + zlib.compress(stored, level=1))
            unfinished.replace(self._path)  # in one go: another run may be reading it
        except Exception as error:  # a full disk, or an executable that cannot be written out
            log.warning("The compiled step cannot be kept as %s: %s", self._path, error)
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)


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
    # Besides the program, all of this decides about its machine code.
    versions = [jax.__version__, jaxlib.__version__]
    machine = [os.environ.get("XLA_FLAGS"), sorted(settings.items()), mesh.devices.shape, _cpu()]
    known = json.dumps([plain, versions, machine], default=repr)
    name = hashlib.sha256(known.encode()).hexdigest()
    return KeptStep(Path(folder) / "csc_jax_steps" / name, mesh)


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


def _digest(lowered: jax.stages.Lowered) -> bytes:
    """Returns the digest of a program's text: constants, shardings and donations, but no lines."""
    return hashlib.sha256(lowered.as_text().encode()).digest()


def _cpu() -> str:
    """Returns what tells machines apart that do not run each other's machine code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    features = [line for line in lines if line.startswith(("flags", "Features"))]
    return f"{platform.machine()} {features[0] if features else platform.processor()}"
