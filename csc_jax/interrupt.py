"""SIGTERM and SIGINT end a run in order: the step is finished and a checkpoint written."""

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Notes the first of these signals; a second one ends the process at once.

    A context manager. Of several processes only one may be told: `jax.distributed` passes SIGTERM
    on, and all of them stop at the same step.
    """

    def __init__(self) -> None:
        self._name = ""
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        # Python allows handlers in the main thread alone; elsewhere nobody interrupts a run.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._before = {number: signal.getsignal(number) for number in _SIGNALS}
            for number in _SIGNALS:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def reached(self, step: int) -> bool:
        """Whether the run is to stop after `step`; each process calls it at every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self._name = "SIGTERM"
        return bool(self._name)

    @property
    def name(self) -> str:
        """Of the signal that came; "" if none has."""
        return self._name

    def _note(self, number: int, _: FrameType | None) -> None:
        self._name = signal.Signals(number).name
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
