"""Work that goes on while its caller does: compilers, reading and writing leave Python free."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_background(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Returns the result to come of a call in a thread of its own; Python waits for its end."""
    thread = ThreadPoolExecutor(1, getattr(function, "__name__", "background"))
    result = thread.submit(function, *args, **kwargs)
    thread.shutdown(wait=False)
    return result
