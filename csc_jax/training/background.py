"""Work that goes on while its caller does: compilers, reading and writing leave Python free."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("csc_jax")

_FIRST, _THEN = 10.0, 30.0  # s after which `wait_for` says first and again what it waits for


def in_background(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Returns the result to come of a call in a thread of its own; Python waits for its end."""
    thread = ThreadPoolExecutor(1, getattr(function, "__name__", "background"))
    result = thread.submit(function, *args, **kwargs)
    thread.shutdown(wait=False)
    return result


def wait_for(result: Future[T], what: str, since: float) -> T:
    """Returns a result to come; where that takes long, the user hears what is waited for.

    Args:
      result: of `in_background`.
      what: goes on, as "compiling the train step".
      since: `time.perf_counter()` at its begin.
    """
    patience = _FIRST
    while True:
        try:
            return result.result(patience)
        except TimeoutError:
            if result.done():  # its own error
                raise
            log.info("%s, %.0f s so far", what, time.perf_counter() - since)
            patience = _THEN
