"""Timing of candidates that take turns, and their memory."""

import dataclasses
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

_STATM = Path("/proc/self/statm")
_PAGE = 4096  # bytes, of the counts in statm


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One row of a table."""

    call: Callable[[], Any]  # runs it `times` times and returns when that is done
    temporaries: int | None = None  # bytes beside arguments and results, as the compiler plans them
    peak: int | None = None  # bytes at the worst moment, arguments and results included, likewise
    times: int = 1


@dataclasses.dataclass
class Timing:
    """What was measured of one candidate."""

    seconds: list[float]
    busy: list[float]  # seconds of the process on a CPU, all threads together
    rss_growth: float  # bytes, largest growth of the process's memory during a call; NaN off Linux
    temporaries: int | None

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


def compiled(function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> Any:
    """Returns the compiled program of `function` for these arguments."""
    return jax.jit(function, donate_argnums=donate).lower(*arguments).compile()


def in_a_row() -> int:
    """Returns how often a call is to run what it times: once, off the CPU ten times.

    There the host hands out work ahead of the device, as it does in training and in evaluation, and
    its own time for that counts only where it is the longer.
    """
    return 1 if jax.default_backend() == "cpu" else 10


def candidate(function: Callable[..., Any], *arguments: Any) -> Candidate:
    """Returns a Candidate that runs the compiled `function` on these arguments."""
    program = compiled(function, *arguments)
    memory = program.memory_analysis()
    return Candidate(
        lambda: jax.block_until_ready(program(*arguments)),
        None if memory is None else memory.temp_size_in_bytes,
    )


def side_by_side(function: Callable[..., Any], arguments: Iterable[Any]) -> list[Any]:
    """Returns `function` of each argument, in threads: for what spends its time compiling."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, arguments))


def take_turns(candidates: Mapping[str, Candidate], repeats: int) -> dict[str, Timing]:
    """Times every candidate `repeats` times, in turns, after one round that does not count."""
    timings = {
        name: Timing([], [], float("nan"), entry.temporaries) for name, entry in candidates.items()
    }
    for round_ in range(repeats + 1):
        for name, entry in candidates.items():
            with _PeakMemory() as memory:
                started, began = time.perf_counter(), time.process_time()
                entry.call()
                busy = (time.process_time() - began) / entry.times
                seconds = (time.perf_counter() - started) / entry.times
            if round_:
                timings[name].seconds.append(seconds)
                timings[name].busy.append(busy)
                timings[name].rss_growth = max(memory.growth, timings[name].rss_growth)
    return timings


def table(timings: Mapping[str, Timing], *, ratios: bool = True) -> str:
    """Returns a table; ratios are those of the medians to the first row's."""
    first = next(iter(timings.values()))
    width = max(map(len, timings))
    lines = [
        f"{'':<{width}}  {'median':>10}  {'fastest':>10}  {'ratio' if ratios else '':>6}  "
        f"{'temporaries':>11}  {'process grew':>12}"
    ]
    for name, timing in timings.items():
        planned = "-" if timing.temporaries is None else _mebibytes(timing.temporaries)
        grew = "-" if timing.rss_growth != timing.rss_growth else _mebibytes(timing.rss_growth)
        ratio = f"{timing.median / first.median:.2f}" if ratios else ""
        lines.append(
            f"{name:<{width}}  {1e3 * timing.median:>7.1f} ms  {1e3 * min(timing.seconds):>7.1f} ms"
            f"  {ratio:>6}  {planned:>11}  {grew:>12}"
        )
    return "\n".join(lines)


def machine() -> str:
    """Returns one line that says what the numbers were measured on."""
    device = jax.devices()[0]
    return (
        f"{jax.device_count()} x {device.device_kind} ({device.platform}), "
        f"Python {platform.python_version()}, jax {jax.__version__}"
    )


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"


class _PeakMemory:
    """Samples the process's resident memory while a block runs; a context manager."""

    growth = float("nan")

    def __enter__(self) -> "_PeakMemory":
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if _STATM.exists():
            self._before = self._peak = _resident()
            self._thread = threading.Thread(target=self._watch)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self.growth = self._peak - self._before

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._peak = max(self._peak, _resident())


def _resident() -> int:
    """Bytes."""
    return int(_STATM.read_text().split()[1]) * _PAGE
