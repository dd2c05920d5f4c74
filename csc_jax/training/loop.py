"""The host loop: feeds the step, records, evaluates, draws, saves; continues where it stopped."""

import contextlib
import functools
import json
import logging
import math
import operator
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import csc_jax
from csc_jax import class_weights, data
from csc_jax import config as config_lib
from csc_jax.config import bands, choose
from csc_jax.config import checks as config_checks
from csc_jax.data import census
from csc_jax.errors import Interrupted, UserError
from csc_jax.evaluation import Scores
from csc_jax.parallel import distributed
from csc_jax.parallel.sharding import shard_batch
from csc_jax.reporting import visualize
from csc_jax.reporting.launches import launched
from csc_jax.reporting.probe import PSEUDO_LABEL, Probe
from csc_jax.reporting.recorder import Recorder, open_recorder
from csc_jax.reporting.report import after_training
from csc_jax.reporting.writers import read_metrics
from csc_jax.state import TrainState
from csc_jax.text import name as printable
from csc_jax.training import early_stopping, identity
from csc_jax.training.background import in_background
from csc_jax.training.checkpoint import Checkpointer, Restored
from csc_jax.training.choice import fill_open
from csc_jax.training.experiment import Experiment, build, load_data
from csc_jax.training.interrupt import EvaluationStopped, StopRequest
from csc_jax.training.lock import lock
from csc_jax.training.step import Step, compile_ahead, compile_step

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
    before = None
    keeps_values = bands.keeps_values(config.data)
    if choose.open_fields(config) or keeps_values or config.checkpoint.allow_new_unlabeled:
        before = _run_before(workdir)
    config = fill_open(config, dataset, partition, before and before["config"])
    if config.train.steps and config.train.epochs:
        log.info(
            "train.steps = %d counts, train.epochs = %g of the config does not",
            *(config.train.steps, config.train.epochs),
        )
    steps_per_epoch = data.steps_per_epoch(config, partition)
    if config.checkpoint.allow_new_unlabeled and before is not None:
        # All lengths stay as the run began with them.
        steps_per_epoch = before.get("data", {}).get("steps_per_epoch") or steps_per_epoch
    # Nor does the network come to see its images differently where some have come or gone.
    found = before and bands.found_by(before["config"], config.data.bands)
    config = bands.with_measured(config, found or dataset.pixels)
    if config.optimizer.scale_rate:
        log.info(
            "learning rate %g: %g of the recipe, for batches of %d labelled images, times %d / %d",
            *(config.optimizer.learning_rate * config_lib.rate_scale(config),),
            *(config.optimizer.learning_rate, config.optimizer.recipe_batch),
            *(config.batch.labeled, config.optimizer.recipe_batch),
        )
    config = config_lib.resolve(config, steps_per_epoch)
    iterator = data.train_iterator(
        config, dataset, partition, jax.process_index(), jax.process_count()
    )
    val = dataset.source(config.eval.split)
    images = identity.describe(dataset, partition, config.eval.split, steps_per_epoch)
    pixels: tuple[int, ...] = ()
    if config.loss.class_weights in class_weights.RULES:
        source = dataset.sources["train"]
        pixels = source.count_pixels(partition.labeled, dataset.num_classes)
    experiment = build(config, dataset.class_names, dataset.palette, labeled_pixels=pixels)
    _look_at_labels(experiment, dataset, partition)

    with contextlib.ExitStack() as stack:
        distributed.first_only(lambda: stack.enter_context(lock(workdir)))
        stop = stack.enter_context(StopRequest())
        checkpointer = stack.enter_context(Checkpointer(workdir, config.checkpoint.keep))
        run = describe(experiment) | {"data": images}
        return _train(
            experiment, dataset, partition, run, iterator, val, checkpointer, stop, workdir
        )


def _train(
    experiment: Experiment,
    dataset: data.Dataset,
    partition: data.Partition,
    run: dict[str, Any],
    iterator: data.TrainIterator,
    val: data.Source,
    checkpointer: Checkpointer,
    stop: StopRequest,
    workdir: Path,
) -> Scores:
    config, total = experiment.config, experiment.config.train.steps
    began = time.perf_counter()
    state, step_fn, restored = _prepare(experiment, run, checkpointer, iterator)
    start = int(state.step)
    distributed.first_only(lambda: _write_what_is_run(run, dataset, partition, workdir))
    _log_what_is_run(experiment, partition, len(val), start, workdir)

    probe = Probe(experiment, val)
    if restored is not None:
        probe.resume(restored.probe, restored.loop.get("probe"))
    probe.measure(start, state)
    scores: Scores | None = None
    with contextlib.ExitStack() as stack:
        devices = experiment.mesh.devices.flatten().tolist()
        distributed.first_only(lambda: stack.enter_context(launched(workdir, devices, began)))
        recorder = stack.enter_context(
            open_recorder(config, workdir, start, run["data"]["steps_per_epoch"])
        )
        # A run that was stopped before it could evaluate leaves that to the next, which then saves
        # the step again, with the score that decides whether it is the best.
        evaluation_due = False
        if restored is not None:
            recorder.resume(restored.loop["recorder"])
            evaluation_due = restored.loop["evaluation_due"]
        history = _history(restored)
        save_now = evaluation_due
        for step in range(start, total + 1):
            if step > start:
                state, metrics = step_fn(state, shard_batch(next(iterator), experiment.mesh))
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
                    history.append((step, -1.0 if math.isnan(miou) else miou))
                except EvaluationStopped:
                    stopping = True
            ended = early_stopping.has_ended(history, config.train.patience)
            save_now = save_now or (ended and miou is not None)
            # What is restored is saved again only with the score that it lacked.
            is_new = step > start or not evaluation_due
            if is_new and (save_now or stopping):
                loop = {
                    "iterator": iterator.get_state(),
                    "recorder": recorder.state(),
                    "evaluation_due": evaluation_due,
                    "probe": probe.ids,
                    "scores": history,
                }
                if step == start and restored is not None:  # saved before it had its score
                    checkpointer.delete(step)
                checkpointer.save(step, state, loop, run, miou, probe.features_to_keep(step))
            if stopping:
                checkpointer.wait()
                raise Interrupted(
                    f"Stopped by {stop.name} after step {step} of {total}, with a checkpoint; the "
                    "same command continues from there."
                )
            if ended and step < total:
                _log_early_end(step, history, config.train.patience)
                break
    if scores is None:  # nothing was left to do
        scores = experiment.evaluate(getattr(state, config.eval.network), val)
    table = scores.table(experiment.class_names)
    log.info("%s on %s:\n%s", config.eval.network, config.eval.split, table)
    if config.train.report:
        network = getattr(state, config.eval.network)
        after_training(
            experiment, network, int(state.step), val, workdir, stop.interrupt_evaluation
        )
    return scores


def _prepare(
    experiment: Experiment,
    run: dict[str, Any],
    checkpointer: Checkpointer,
    iterator: data.TrainIterator,
) -> tuple[TrainState, Step, Restored | None]:
    """Returns the state to go on from, the step, perhaps still compiling, and what was restored.

    A run that continues has its `iterator` set to where it was.
    """
    config = experiment.config
    abstract_state = experiment.abstract_state()
    restored = checkpointer.restore(
        abstract_state, check=lambda stored: _check_resumed(stored, run, config)
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
    over = start >= config.train.steps
    over |= early_stopping.has_ended(_history(restored), config.train.patience)
    if not over and not config.debug.nans:  # which runs it by operations
        step_fn = compile_ahead(step_fn, abstract_state, data.abstract_batch(config))
    return initial.result() if restored is None else restored.state, step_fn, restored


def _history(restored: Restored | None) -> list[early_stopping.Score]:
    """Returns the scores of all evaluations of a run so far."""
    kept = [] if restored is None else restored.loop.get("scores", [])  # versions before have none
    return [(step, miou) for step, miou in kept]


def _log_early_end(step: int, history: list[early_stopping.Score], patience: int) -> None:
    at, miou = early_stopping.best(history)
    log.info(
        "step %d: the val mIoU has not risen above the %.2f%% of step %d in %d evaluation%s, so "
        "training ends here (train.patience); --checkpoint=best takes the best one that is kept",
        *(step, 100 * miou, at, patience, "s" * (patience > 1)),
    )


def evaluate_and_draw(
    experiment: Experiment,
    state: TrainState,
    val: data.Source,
    step: int,
    probe: Probe,
    recorder: Recorder,
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
    note = f" ({scores.note})" if scores.note else ""
    of = f" ({scores.occurring})" if scores.occurring else ""
    panel = probe.panel(state) if experiment.config.train.panels else None
    if not distributed.is_first():
        return
    if panel is not None:
        split = experiment.config.eval.split
        visualize.save_panel(
            workdir / "plots" / f"panel_{step:06d}.png",
            panel,
            experiment.palette,
            experiment.class_names,
            f"{experiment.title}, step {step}: mIoU {100 * scores.miou:.1f}%{of} on {split}{note}",
            hatched="ignored or not kept" if PSEUDO_LABEL in panel else "ignored",
        )
    curves = workdir / "plots" / "curves.png"
    visualize.save_curves(curves, read_metrics(workdir), f"{experiment.title}{note}")


def describe(experiment: Experiment) -> dict[str, Any]:
    """Returns what a checkpoint says of itself, as JSON holds it.

    The version of this package, the config, class names and palette.
    """
    return {
        "version": csc_jax.__version__,
        "config": config_lib.to_plain(experiment.config),
        "class_names": list(experiment.class_names),
        "palette": experiment.palette.tolist(),
    }


def _write_what_is_run(
    run: dict[str, Any], dataset: data.Dataset, partition: data.Partition, workdir: Path
) -> None:
    largest = {split: source.max_size for split, source in dataset.sources.items()}
    counted = census.as_json(dataset.census, dataset.class_names, largest)
    counted = {"data": dataset.name} | counted
    try:
        data.write_partition(partition, workdir)
        (workdir / "config.json").write_text(json.dumps(run["config"], indent=1) + "\n")
        (workdir / "data.json").write_text(json.dumps(counted, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{workdir} cannot be written: {error}. Make room, or choose another --workdir."
        ) from error


def _run_before(workdir: Path) -> dict[str, Any] | None:
    """Returns what the run in a work directory says of itself; None where none has begun."""
    if not (workdir / "checkpoints").is_dir():
        return None
    with Checkpointer(workdir, read_only=True) as checkpointer:
        return checkpointer.describe_newest()


def _look_at_labels(
    experiment: Experiment, dataset: data.Dataset, partition: data.Partition
) -> None:
    """Says what the labelled images mean for this run.

    Raises:
      UserError: none of them has a pixel of any class.
    """
    held = dict(zip(dataset.sources["train"].ids, dataset.sources["train"].classes, strict=False))
    if not held:  # a data set that was not counted
        return
    present = functools.reduce(operator.or_, (held[image] for image in partition.labeled), 0)
    if not present:
        raise UserError(
            f"None of the {len(partition.labeled)} labelled images has a pixel of any class; all "
            "of them are to be ignored. Take more images (data.labeled_fraction), others (seed), "
            "or a list (data.labeled_list)."
        )
    contrast = experiment.config.contrast
    if jax.eval_shape(experiment.method.init_bank) is None or not contrast.memory_bank:
        return
    absent = [
        i
        for i in range(dataset.num_classes)
        if not present >> i & 1 and i not in contrast.absent_classes
    ]
    if absent:
        ids = sorted({*absent, *contrast.absent_classes})
        log.warning(
            "No labelled image of this run holds %s: the memory bank will have no feature of it, "
            "so L_c will never start and L_p stays. If the data lack it, say so: "
            "--config.contrast.absent_classes=%s",
            census.names(dataset.class_names, absent),
            ",".join(map(str, ids)) + ("," if len(ids) == 1 else ""),
        )


def _log_what_is_run(
    experiment: Experiment, partition: data.Partition, evaluated: int, start: int, workdir: Path
) -> None:
    config, device = experiment.config, experiment.mesh.devices.flat[0]
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    log.info(
        "%s on %s: %d labelled, %d unlabelled, %d %s images, %d classes, %s; step %d of %d in %s",
        config.method.name,
        config.data.name,
        len(partition.labeled),
        len(partition.unlabeled),
        evaluated,
        config.eval.split,
        experiment.num_classes,
        f"{experiment.mesh.size} x {device.device_kind}{processes}",
        start,
        config.train.steps,
        workdir,
    )
    if weights := experiment.method.task.class_weights:
        of_class = zip(experiment.class_names, weights, strict=True)
        shown = ", ".join(f"{printable(name)} {weight:.3g}" for name, weight in of_class)
        log.info("weights of the classes in the supervised loss: %s", shown)


def _check_resumed(stored: dict[str, Any], run: dict[str, Any], config: ConfigDict) -> None:
    version = stored.get("version", "0.1.0")  # which did not say so
    compared = "data" in stored
    lines = config_checks.check_resumed(stored["config"], config, version, images_compared=compared)
    lines += identity.compare(stored, run, config.checkpoint.allow_new_unlabeled)
    for line in lines:
        log.info("changed since the checkpoint: %s", line)
    if not compared:
        log.warning(
            "The checkpoint does not say which images it was trained on, as those of earlier "
            "versions do not; the run goes on with the images of now"
        )
