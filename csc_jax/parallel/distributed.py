"""Several processes: they find each other, wait for the first of them, and end together.

Only process 0 writes metrics, plots and lists. Arrays on the mesh belong to all processes, so that
whatever computes on them, evaluation and panels too, runs on every process in the same order.
"""

import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from importlib import util
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from csc_jax.errors import Interrupted, UserError

log = logging.getLogger("csc_jax")

T = TypeVar("T")

_LONGEST_WAIT = 24 * 3600  # s, for process 0 to prepare a data set; its death ends the wait
_SHORT_WAIT = 15  # s, for the others to come to the same error
_LONGEST_MESSAGE = 4096  # bytes

_turns = 0  # of process 0; the name of a barrier must be new


class _Launcher(NamedTuple):
    """How a process knows that it was started as one of several."""

    sets: tuple[str, ...]  # environment variables that are all there
    number: str = ""  # one that holds their number or a list of hosts; "" = `sets` alone says so


# Where `jax.distributed.initialize()` finds out by itself who the processes are.
_LAUNCHERS = {
    "Slurm": _Launcher(
        ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"), "SLURM_NTASKS"
    ),
    "Open MPI": _Launcher(("OMPI_COMM_WORLD_RANK",), "OMPI_COMM_WORLD_SIZE"),
    "TPU pod (GKE)": _Launcher(("TPU_WORKER_ID",), "TPU_WORKER_HOSTNAMES"),
    "TPU slices": _Launcher(("MEGASCALE_COORDINATOR_ADDRESS",), "MEGASCALE_NUM_SLICES"),
    "Kubernetes": _Launcher(("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")),
}
# Machines of a TPU pod on Compute Engine are told by a server and not by their environment; one
# machine alone is a cluster of one there.
_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")


def cluster(environment: Mapping[str, str]) -> str:
    """Returns the name of the launcher that started this process as one of several; "" if none.

    Looks at environment variables and devices alone, so that it costs nothing on a laptop.
    """
    for name, launcher in _LAUNCHERS.items():
        number = environment.get(launcher.number, "")
        if launcher.number and not ("," in number or (number.isdigit() and int(number) > 1)):
            continue
        if all(variable in environment for variable in launcher.sets):
            return name
    on_tpu = util.find_spec("libtpu") and any(Path(device).exists() for device in _TPU_DEVICES)
    return "TPU VM" if on_tpu and "TPU_SKIP_MDS_QUERY" not in environment else ""


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Joins the other processes of this run, if there are any; before JAX is used.

    Args:
      coordinator: HOST:PORT where process 0 listens. Without it the launcher says (`cluster`).
      num_processes: of the run; 1 alone keeps this process to itself whatever the launcher says.
      process_id: of this one, from 0.
      initialization_timeout: s for all processes to come.
      heartbeat_timeout: s without a sign of life after which a process counts as dead and all
        others end.

    Raises:
      UserError: some of the three are given and others are not, a value that cannot be, or a
        launcher that does not say enough. Processes that do not come end this one with status 2.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value in (None, "")]
    if len(missing) == 3:
        launcher = cluster(os.environ)
        if not launcher:
            return
    elif coordinator is None and num_processes == 1:
        return
    elif missing:
        raise UserError(
            f"{' and '.join(missing)} is missing: --coordinator=HOST:PORT, --num_processes and "
            "--process_id go together. Leave all three out where Slurm, Open MPI, Kubernetes or a "
            "TPU pod starts the processes."
        )
    else:
        assert coordinator is not None
        assert num_processes is not None
        assert process_id is not None
        if not coordinator.rpartition(":")[2].isdigit() or ":" not in coordinator:
            raise UserError(
                f"--coordinator={coordinator} is no address; give HOST:PORT of process 0, with any "
                "free port, as --coordinator=10.0.0.1:1234."
            )
        if not 0 <= process_id < num_processes:
            raise UserError(
                f"--process_id={process_id} is not one of the {num_processes} processes; they are "
                f"numbered 0 to {num_processes - 1}."
            )
        launcher = ""
    who = launcher or f"process {process_id} of {num_processes}, coordinator {coordinator}"
    log.info("Waiting up to %d s for all processes (%s)", initialization_timeout, who)
    # JAX would end the process with a stack trace of its own.
    timer = threading.Timer(initialization_timeout, _give_up, (who, initialization_timeout))
    timer.daemon = True
    timer.start()
    # `training/interrupt.py` does this, for SIGINT too and within an evaluation.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=None if launcher else "deactivate",
            initialization_timeout=initialization_timeout + 60,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except Exception as error:  # each launcher's client has exceptions of its own
        raise UserError(
            f"The processes of this run cannot be joined ({who}): {error} Name them by hand with "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I, or give --num_processes=1 "
            "for a run of this process alone."
        ) from error
    finally:
        timer.cancel()


def _give_up(who: str, seconds: int) -> None:
    print(
        f"error: Not all processes of this run came within {seconds} s ({who}). Check that all of "
        "them were started, that they give the same --coordinator and --num_processes, and that "
        "the address of process 0 can be reached from here; --initialization_timeout waits longer.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(UserError.exit_status)


def several() -> bool:
    """Whether this is one of several processes; does not touch the accelerator if not."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes: number 0 of several, or the only one."""
    return not several() or jax.process_index() == 0


def first_only(action: Callable[[], T]) -> T | None:
    """Returns what `action` does on process 0, None on the others, which wait for it.

    Raises:
      UserError: `action` raised it on process 0; all processes do.
    """
    if not several():
        return action()
    result, message = None, b""
    if is_first():
        try:
            result = action()
        except UserError as error:
            message = str(error).encode()[:_LONGEST_MESSAGE]
    global _turns
    _turns += 1
    _barrier(f"turn {_turns}", _LONGEST_WAIT)  # a collective operation would not wait so long
    buffer = np.zeros(_LONGEST_MESSAGE, np.uint8)
    buffer[: len(message)] = np.frombuffer(message, np.uint8)
    message = np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes().rstrip(b"\0")
    if message:
        raise UserError(message.decode(errors="replace"))
    return result


def leave(exit_status: int) -> int:
    """Returns the exit status once all processes have come to the end, be it an error of all.

    Where the others do not come, it ends this process at once: they hear of that, while an orderly
    exit would wait for them, and they for it.
    """
    if not several():
        return exit_status
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        well = exit_status in (0, Interrupted.exit_status)
        _barrier("end", _LONGEST_WAIT if well else _SHORT_WAIT)
    except jax.errors.JaxRuntimeError:
        os._exit(exit_status)
    return exit_status


def abandon() -> None:
    """Ends one of several processes after an unexpected error, which has been printed."""
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} ends, and with it the run. "
        "Where the cause is another process that ended before, its own output says why. The same "
        "commands continue from the last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _barrier(name: str, seconds: int) -> None:
    """Waits for all processes, at most so long, through the coordinator and not the devices."""
    wait = multihost.get_barrier_sync_fn()
    wait(key=f"csc_jax {name}", timeout_ms=1000 * seconds)
