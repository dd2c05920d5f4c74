"""What the host loop learns from each step's metrics: averages, a bank's state, divergence."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from csc_jax import config as config_lib
from csc_jax.errors import Diverged
from csc_jax.evaluation import Scores
from csc_jax.parallel import distributed
from csc_jax.reporting.writers import MetricWriter, Progress

log = logging.getLogger("csc_jax")


@contextlib.contextmanager
def open_recorder(
    config: ConfigDict, workdir: Path, start: int, steps_per_epoch: int
) -> Iterator["Recorder"]:
    """Yields the recorder of a run that goes on after step `start`, and closes what it writes to.

    That is metrics.jsonl, TensorBoard, perhaps wandb, and the terminal; nothing on all processes
    but the first.

    Raises:
      UserError: the files cannot be written, or wandb is asked for but not installed.
    """
    wandb = config_lib.to_plain(config) if config.wandb else None
    with contextlib.ExitStack() as stack:
        writer = distributed.first_only(
            lambda: stack.enter_context(MetricWriter(workdir, resume_step=start, wandb=wandb))
        )
        progress = None
        if distributed.is_first():
            progress = stack.enter_context(contextlib.closing(Progress(config.train.steps, start)))
        yield Recorder(config, writer, progress, steps_per_epoch)


class Recorder:
    """Averages the metrics of `log_every` steps and watches the memory bank.

    Holds each step's metrics back until the next step is dispatched: fetching them at once would
    leave the device idle while the host waits.
    """

    def __init__(
        self,
        config: ConfigDict,
        writer: MetricWriter | None,
        progress: Progress | None,
        steps_per_epoch: int,
    ):
        """Writes and shows nothing where both are None, on all processes but the first."""
        self._every = config.train.log_every
        self._images = config.batch.labeled + config.batch.unlabeled
        self._writer = writer
        self._progress = progress
        self._bank = _BankWatch(steps_per_epoch)
        self._max_rejected = config.train.max_rejected
        self._steepest = (0.0, 0)  # largest finite gradient norm so far, and its step
        self._pending: tuple[int, dict[str, jax.Array], dict[str, list[str]]] | None = None
        self._window: list[dict[str, float]] = []
        self._since = time.perf_counter()  # of the steps in the window

    def add(self, step: int, metrics: dict[str, jax.Array], images: dict[str, list[str]]) -> None:
        """Takes metrics of a step just dispatched, and its ids; flushes those of the one before."""
        self.flush()
        self._pending = (step, metrics, images)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps, as JSON holds it; nothing may be held back."""
        return {"window": self._window, "bank": self._bank.state()}

    def resume(self, state: dict[str, Any]) -> None:
        """Takes what `state` gave."""
        self._window = state["window"]
        self._bank.resume(state["bank"])

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records values that are not averaged."""
        if self._writer is not None:
            self._writer.write(step, values)

    def evaluated(self, step: int, scores: Scores) -> None:
        """Shows new scores; what they took is no training time."""
        if self._progress is not None:
            self._progress.evaluated(step, scores.miou, scores.note, scores.occurring)
        self._since = time.perf_counter()

    def flush(self) -> None:
        """Fetches what is held back.

        Raises:
          Diverged: too many steps in a row were rejected.
        """
        if self._pending is None:
            return
        step, on_device, images = self._pending
        self._pending = None
        metrics = {name: float(value) for name, value in jax.device_get(on_device).items()}
        self._bank.watch(step, metrics)
        if metrics["rejected"] >= self._max_rejected:
            raise Diverged(_why(step, metrics, images, self._steepest))
        if metrics["rejected"]:
            log.warning("step %d is not finite and was left out (%s)", step, _names(images))
        else:
            self._steepest = max(self._steepest, (metrics["gradient_norm"], step))
        self._window.append(metrics)
        if step % self._every:
            return
        values = {f"train/{name}": _mean(self._window, name) for name in metrics}
        now = time.perf_counter()
        values["train/images_per_second"] = self._images * len(self._window) / (now - self._since)
        self._window, self._since = [], now
        self.write(step, values)
        if self._progress is not None:
            self._progress.update(step, values)


class _BankWatch:
    """Says when the bank became ready, and when its gate all but freezes it (decisions.md 4)."""

    def __init__(self, steps_per_epoch: int):
        self._epoch = steps_per_epoch
        self._ready = False
        self._asked = 0
        self._accepted = 0.0

    def state(self) -> dict[str, Any]:
        return {"ready": self._ready, "asked": self._asked, "accepted": self._accepted}

    def resume(self, state: dict[str, Any]) -> None:
        self._ready, self._asked = state["ready"], state["asked"]
        self._accepted = state["accepted"]

    def watch(self, step: int, metrics: dict[str, float]) -> None:
        if metrics.get("ready") == 1.0 and not self._ready:
            self._ready = True
            log.info("step %d: every class is in the memory bank; L_c replaces L_p", step)
        accepted = metrics.get("enqueue_accepted", math.nan)
        if not math.isnan(accepted):
            self._asked += 1
            self._accepted += accepted
        if step % self._epoch == 0:
            if self._asked and self._accepted < 0.1 * self._asked:
                log.warning(
                    "step %d: the enqueue gate accepted %d of %d updates in the last epoch; the "
                    "memory bank is close to frozen (contrast.enqueue_gate, contrast.margin)",
                    step,
                    round(self._accepted),
                    self._asked,
                )
            self._asked, self._accepted = 0, 0.0


def _mean(window: list[dict[str, float]], name: str) -> float:
    """Mean over the steps in which the metric was defined; NaN if in none."""
    values = np.array([metrics[name] for metrics in window])
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


def _names(images: dict[str, list[str]]) -> str:
    return "; ".join(f"{half} images: {', '.join(ids)}" for half, ids in images.items())


def _why(
    step: int,
    metrics: dict[str, float],
    images: dict[str, list[str]],
    steepest: tuple[float, int],
) -> str:
    """The report of a run that diverged."""
    losses = {k: v for k, v in metrics.items() if k.startswith("loss")}
    culprits = [name for name, value in losses.items() if not math.isfinite(value)]
    what = f"{', '.join(culprits)} is not finite" if culprits else "a gradient is not finite"
    shown = ", ".join(f"{name} {value:g}" for name, value in losses.items())
    before = f", the largest before {steepest[0]:g} at step {steepest[1]}" if steepest[1] else ""
    return (
        f"Step {step}: {what}, as in the {metrics['rejected']:.0f} steps up to it, none of which "
        f"was learnt from ({shown}; norm of the gradient {metrics['gradient_norm']:g}{before}; "
        f"learning rate {metrics['learning_rate']:g}; {_names(images)}). The last checkpoint is "
        "kept. Lower "
        "optimizer.learning_rate or set optimizer.clip_norm, in another --workdir; "
        "--config.debug.nans=True finds the operation."
    )
