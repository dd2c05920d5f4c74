"""The host loop: feeds the step, records, evaluates, draws, saves; continues where it stopped."""

import contextlib
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from csc_jax import config as config_lib
from csc_jax import config_checks, data, distributed, visualize
from csc_jax.background import in_background
from csc_jax.checkpoint import Checkpointer, Restored
from csc_jax.errors import Diverged, Interrupted, UserError
from csc_jax.evaluation import Scores
from csc_jax.experiment import Experiment, build, load_data
from csc_jax.interrupt import EvaluationStopped, StopRequest
from csc_jax.kept_step import kept_step
from csc_jax.lock import lock
from csc_jax.probe import Probe
from csc_jax.sharding import shard_batch
from csc_jax.state import TrainState
from csc_jax.train_step import Step, compile_ahead, compile_step
from csc_jax.writers import MetricWriter, Progress, read_metrics

log = logging.getLogger("csc_jax")


def train(config: ConfigDict, workdir: Path) -> Scores:
    """Trains, or continues, the run in `workdir`, and returns its last scores.

    Order at each step: batch, step, record, evaluate, save. A checkpoint is saved before the next
    batch is drawn, so that a restart continues with the very next one, and everything comes out as
    if there had been none.

    Of several processes each calls this, and the first alone writes, but for its share of a
    checkpoint. A run continues on any number of processes and devices.

    Raises:
      UserError: anything wrong with config, data or work directory, before the first compilation.
      Diverged: too many steps in a row had no finite loss or gradient.
      Interrupted: SIGTERM or SIGINT came; a checkpoint has been written.
    """
    dataset = distributed.first_only(lambda: load_data(config))
    if dataset is None:  # the first process has prepared it, unless it is on another host
        dataset = load_data(config)
    partition = data.partition(config.data, dataset, config.seed)
    config = config_lib.resolve(config, data.steps_per_epoch(config, partition))
    iterator = data.train_iterator(
        config, dataset, partition, jax.process_index(), jax.process_count()
    )
    val = dataset.source(config.eval.split)
    experiment = build(config, dataset.class_names, dataset.palette)

    with contextlib.ExitStack() as stack:
        distributed.first_only(lambda: stack.enter_context(lock(workdir)))
        stop = stack.enter_context(StopRequest())
        checkpointer = stack.enter_context(Checkpointer(workdir, config.checkpoint.keep))
        return _train(experiment, partition, iterator, val, checkpointer, stop, workdir)


def _train(
    experiment: Experiment,
    partition: data.Partition,
    iterator: data.TrainIterator,
    val: data.Source,
    checkpointer: Checkpointer,
    stop: StopRequest,
    workdir: Path,
) -> Scores:
    config, total = experiment.config, experiment.config.train.steps
    run = describe(experiment)
    state, step_fn, restored = _prepare(experiment, checkpointer, iterator)
    start = int(state.step)
    distributed.first_only(lambda: _write_what_is_run(run, partition, workdir))
    log.info(
        "%s on %s: %d labelled, %d unlabelled, %d %s images, %d classes, %s; step %d of %d in %s",
        config.method.name,
        config.data.name,
        len(partition.labeled),
        len(partition.unlabeled),
        len(val),
        config.eval.split,
        experiment.num_classes,
        _devices(experiment),
        start,
        total,
        workdir,
    )

    probe = Probe(experiment, val)
    if restored is not None:
        probe.resume(restored.probe)
    probe.measure(start, state)
    scores: Scores | None = None
    wandb = run["config"] if config.wandb else None
    with contextlib.ExitStack() as stack:
        writer = distributed.first_only(
            lambda: stack.enter_context(MetricWriter(workdir, resume_step=start, wandb=wandb))
        )
        progress = Progress(total, start) if distributed.is_first() else None
        recorder = _Recorder(config, writer, progress, data.steps_per_epoch(config, partition))
        # A run that was stopped before it could evaluate leaves that to the next, which then saves
        # the step again, with the score that decides whether it is the best.
        evaluation_due = False
        if restored is not None:
            recorder.resume(restored.loop["recorder"])
            evaluation_due = restored.loop["evaluation_due"]
        save_now = evaluation_due
        for step in range(start, total + 1):
            if step > start:
                batch = shard_batch(next(iterator), experiment.mesh)
                state, metrics = step_fn(state, batch)
                recorder.add(step, metrics, iterator.images)
                if (cons := probe.measure(step, state)) is not None:
                    recorder.write(step, {"train/consistency": cons})
                evaluation_due = step % config.train.eval_every == 0 or step == total
                save_now = step % config.checkpoint.every == 0 or step == total
            stopping, miou = stop.reached(), None
            if evaluation_due or save_now or stopping:
                recorder.flush()
            if evaluation_due and not stopping:
                try:
                    scores = evaluate_and_draw(
                        experiment, state, val, step, probe, recorder, workdir, stop
                    )
                    miou, evaluation_due = scores.miou, False
                except EvaluationStopped:
                    stopping = True
            # What is restored is saved again only with the score that it lacked.
            is_new = step > start or not evaluation_due
            if is_new and (save_now or stopping):
                loop = {
                    "iterator": iterator.get_state(),
                    "recorder": recorder.state(),
                    "evaluation_due": evaluation_due,
                }
                features = probe.features_to_keep(step)
                if step == start and restored is not None:  # saved before it had its score
                    checkpointer.delete(step)
                checkpointer.save(step, state, loop, run, miou, features)
            if stopping:
                checkpointer.wait()
                raise Interrupted(
                    f"Stopped by {stop.name} after step {step} of {total}, with a checkpoint; the "
                    "same command continues from there."
                )
        recorder.close()
    if scores is None:  # nothing was left to do
        scores = experiment.evaluate(getattr(state, config.eval.network), val)
    log.info(
        "%s on %s:\n%s",
        config.eval.network,
        config.eval.split,
        scores.table(experiment.class_names),
    )
    return scores


def _prepare(
    experiment: Experiment, checkpointer: Checkpointer, iterator: data.TrainIterator
) -> tuple[TrainState, Step, Restored | None]:
    """Returns the state to go on from, the step, perhaps still compiling, and what was restored.

    A run that continues has its `iterator` set to where it was.
    """
    config = experiment.config
    kept = kept_step(config, experiment.mesh)
    abstract_state = experiment.abstract_state()
    restored = checkpointer.restore(
        abstract_state, check=lambda stored: _check_resumed(stored, config)
    )
    # Nothing compiles before all is there that a user may have to repair: a compiler cannot be
    # stopped.
    if restored is None:
        start, pretrained = 0, experiment.load_pretrained()
        initial = in_background(experiment.compile_init(pretrained))
    else:
        start = int(restored.state.step)
        iterator.set_state(restored.loop["iterator"])
    step_fn = compile_step(experiment.method, experiment.tx, experiment.mesh, abstract_state)
    if start < config.train.steps and not config.debug.nans:  # which runs it by operations
        compile = kept.compile if kept is not None else jax.stages.Lowered.compile
        step_fn = compile_ahead(step_fn, abstract_state, data.abstract_batch(config), compile)
    return initial.result() if restored is None else restored.state, step_fn, restored


def evaluate_and_draw(
    experiment: Experiment,
    state: TrainState,
    val: data.Source,
    step: int,
    probe: Probe,
    recorder: "_Recorder",
    workdir: Path,
    stop: StopRequest,
) -> Scores:
    """Scores the network under `config.eval`, records it and redraws the PNGs in W/plots."""
    name = experiment.config.eval.network
    scores = experiment.evaluate(getattr(state, name), val, before_batch=stop.interrupt_evaluation)
    iou = {
        f"val/{name}_iou/{cls}": float(value)
        for cls, value in zip(experiment.class_names, scores.iou, strict=True)
    }
    recorder.write(step, {f"val/{name}_miou": scores.miou, **iou})
    try:
        _draw(experiment, state, step, probe, scores, workdir)
    except OSError as error:  # a full disk must not end a run for a picture
        log.warning("step %d: plots cannot be written (%s); training goes on", step, error)
    recorder.evaluated(step, scores)
    return scores


def _draw(
    experiment: Experiment,
    state: TrainState,
    step: int,
    probe: Probe,
    scores: Scores,
    workdir: Path,
) -> None:
    method = experiment.config.method.name
    note = f" ({scores.note})" if scores.note else ""
    panel = probe.panel(state) if experiment.config.train.panels else None
    if not distributed.is_first():
        return
    if panel is not None:
        visualize.save_panel(
            workdir / "plots" / f"panel_{step:06d}.png",
            panel,
            experiment.palette,
            experiment.class_names,
            f"{method}, step {step}, mIoU {100 * scores.miou:.1f}%{note}",
        )
    curves = workdir / "plots" / "curves.png"
    visualize.save_curves(curves, read_metrics(workdir), f"{method}{note}")


def describe(experiment: Experiment) -> dict[str, Any]:
    """Returns what a checkpoint says of itself, as JSON holds it: config, class names, palette."""
    return {
        "config": config_lib.to_plain(experiment.config),
        "class_names": list(experiment.class_names),
        "palette": experiment.palette.tolist(),
    }


def _write_what_is_run(run: dict[str, Any], partition: data.Partition, workdir: Path) -> None:
    try:
        data.write_partition(partition, workdir)
        (workdir / "config.json").write_text(json.dumps(run["config"], indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{workdir} cannot be written: {error}. Make room, or choose another --workdir."
        ) from error


def _check_resumed(stored: dict[str, Any], config: ConfigDict) -> None:
    for line in config_checks.check_resumed(stored["config"], config):
        log.info("changed since the checkpoint: %s", line)


class _Recorder:
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
        self.restart_clock()

    def restart_clock(self) -> None:
        """Starts timing afresh, so that evaluation does not count as training time."""
        self._since = time.perf_counter()

    def add(self, step: int, metrics: dict[str, jax.Array], images: dict[str, list[str]]) -> None:
        """Takes metrics of a step just dispatched, and its ids; fetches those of the one before."""
        self._fetch()
        self._pending = (step, metrics, images)

    def flush(self) -> None:
        """Fetches what is held back.

        Raises:
          Diverged: too many steps in a row were rejected.
        """
        self._fetch()

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
            self._progress.evaluated(step, scores.miou, scores.note)
        self.restart_clock()

    def close(self) -> None:
        """Ends the progress line."""
        if self._progress is not None:
            self._progress.close()

    def _fetch(self) -> None:
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


def _devices(experiment: Experiment) -> str:
    device = experiment.mesh.devices.flat[0]
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{experiment.mesh.size} x {device.device_kind}{processes}"
