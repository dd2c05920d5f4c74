"""SIGTERM and SIGINT end a run in order: the step is finished and a checkpoint written.

Of several processes one alone may be told. Whether any was is one bit that they add up on their
devices, at every step and every batch of an evaluation, and read when they add up the next: nobody
waits for it, and all stop at the same place.
"""

import signal
import threading
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np

from csc_jax.parallel.sharding import make_mesh, replicated, shard_batch

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class EvaluationStopped(Exception):
    """A signal came; the evaluation is left to the run's next part."""


class StopRequest:
    """Notes the first of these signals; a second one ends the process at once.

    A context manager.
    """

    def __init__(self) -> None:
        self._name = ""
        self._before: dict[int, object] = {}
        self._any_told: jax.Array | None = None  # of several processes, when it was last asked

    def __enter__(self) -> "StopRequest":
        if jax.process_count() > 1:
            self._mesh = make_mesh()
            self._any = jax.jit(jnp.any, out_shardings=replicated(self._mesh))
        # Python allows handlers in the main thread alone; elsewhere nobody interrupts a run.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in _SIGNALS}
            for number in _SIGNALS:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: of a handler that Python has not set.
            signal.signal(number, handler or signal.SIG_DFL)  # type: ignore[arg-type]

    def reached(self) -> bool:
        """Whether the run is to stop here; all processes ask at the same places."""
        if jax.process_count() == 1:
            return bool(self._name)
        told = np.full(jax.local_device_count(), bool(self._name))
        before, self._any_told = self._any_told, self._any(shard_batch(told, self._mesh))
        return before is not None and bool(before)

    def interrupt_evaluation(self) -> None:
        """Raises EvaluationStopped if the run is to stop here."""
        if self.reached():
            raise EvaluationStopped

    @property
    def name(self) -> str:
        """Of the signal that came to this process."""
        return self._name or "a signal to another process"

    def _note(self, number: int, _: FrameType | None) -> None:
        self._name = signal.Signals(number).name
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
