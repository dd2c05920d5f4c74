"""`--mode=evaluate`: scores a checkpoint on a split, draws its worst and best images."""

import itertools
import json
import logging
import math
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from csc_jax import config as config_lib
from csc_jax import data, evaluation
from csc_jax.config import bands
from csc_jax.config import checks as config_checks
from csc_jax.errors import UserError
from csc_jax.evaluation import Scores
from csc_jax.parallel import distributed
from csc_jax.reporting import visualize
from csc_jax.state import Network, TrainState
from csc_jax.text import name as printable
from csc_jax.training import identity
from csc_jax.training.checkpoint import Checkpointer
from csc_jax.training.experiment import Experiment, build

log = logging.getLogger("csc_jax")


def score(
    config: ConfigDict, workdir: Path, checkpoint: str, save_predictions: Path | None = None
) -> Scores:
    """Scores `config.eval.network` on `config.eval.split` and prints the table.

    Leaves in `workdir`/evaluation a JSON file and panels of the worst and the best images, named
    `<split>_<network>_<step>_<mode>` with `_tta` for flips or scales and `_<height>x<width>` for
    `data.image_size`. A report of the same name but another setting, such as another window or
    other data, stays; the new one then ends in `_2`, `_3` and so on. Of several processes the first
    alone writes.

    Args:
      config: of the run; `config.eval` says what is scored, and how.
      workdir: of the run.
      checkpoint: latest | best | a step.
      save_predictions: folder for a PNG an image, in the format of the data set (see
        `evaluation.PredictionWriter`); None = none.

    Raises:
      UserError: no such checkpoint, one of another class count, model or method, or a folder that
        cannot be written to.
    """
    config_checks.validate(config)
    if save_predictions is not None:
        if config.eval.mode == "center_crop":
            raise UserError(
                "--save_predictions wants whole images, but eval.mode is 'center_crop'. Set "
                "--config.eval.mode=whole or sliding."
            )
        evaluation.check_folder(save_predictions, config.data.root)
    out = _make_folder(workdir)
    run = _described(workdir, checkpoint)
    class_names = tuple(run["class_names"])
    config = bands.with_measured(config, bands.found_by(run["config"], config.data.bands))
    dataset = data.load(config.data)
    if dataset.class_names != class_names:
        raise UserError(
            f"The checkpoint in {workdir} knows {len(class_names)} classes "
            f"({_some(class_names)}), the data set {dataset.name} has "
            f"{len(dataset.class_names)} ({_some(dataset.class_names)}). Evaluate it on the data "
            "it was trained for (--config.data.name, --config.data.root)."
        )
    source = dataset.source(config.eval.split)
    trained_on = identity.trained_on(run, source)
    _warn_of_trained(trained_on, config.eval.split, len(source))
    extremes = _Extremes(config.eval.panels)
    on_image: list[evaluation.OnImage] = [extremes] if config.eval.panels else []
    if save_predictions is not None:
        resized = any(config.data.image_size)
        on_image.append(
            evaluation.PredictionWriter(dataset.name, source.ids, save_predictions, resized=resized)
        )

    experiment, network, step = load(config, workdir, checkpoint)
    if not distributed.is_first():
        on_image = [_nothing] * bool(on_image)  # predictions are fetched on all processes or none
    scores = experiment.evaluate(network, source, on_image)
    title = f"{config.eval.network} at step {step} on {config.eval.split} of {dataset.name}"
    log.info("%s (%s):\n%s", title, _manner(config), scores.table(dataset.class_names))
    if save_predictions is not None:
        log.info("%d predictions written to %s", len(scores.per_image), save_predictions)
    if not distributed.is_first():
        return scores
    content = _report(experiment, scores, step)
    content |= {"images_digest": identity.digest(source), "trained_on": trained_on}
    try:
        stem = _free_stem(out, f"{config.eval.split}_{config.eval.network}_{step}", content)
        report = out / f"{stem}.json"
        report.write_text(json.dumps(content, indent=1) + "\n")
        for kind, rows in (("worst", extremes.worst), ("best", extremes.best)):
            if rows:
                heading = f"{kind} images of {config.eval.split}: {experiment.title}, "
                heading += f"{config.eval.network} at step {step}"
                _draw(out / f"{stem}_{kind}.png", heading, experiment, source, rows)
    except OSError as error:
        raise _not_written(out, error) from error
    log.info("written to %s", report)
    return scores


def load(config: ConfigDict, workdir: Path, checkpoint: str) -> tuple[Experiment, Network, int]:
    """Restores the network that `config.eval.network` names, with its experiment and its step."""
    experiment, state = restore(config, workdir, checkpoint)
    return experiment, getattr(state, config.eval.network), int(state.step)


def restore(config: ConfigDict, workdir: Path, checkpoint: str) -> tuple[Experiment, TrainState]:
    """Restores a whole state, with its experiment."""
    config_checks.validate(config)
    config = config_lib.resolve(config, steps_per_epoch=1)  # lengths do not matter here
    with Checkpointer(workdir, read_only=True) as checkpointer:
        run = checkpointer.describe(checkpoint)
        config = bands.with_measured(config, bands.found_by(run["config"], config.data.bands))
        palette = np.asarray(run["palette"], np.uint8)
        experiment = build(config, tuple(run["class_names"]), palette)
        restored = checkpointer.restore(experiment.abstract_state(), checkpoint)
    assert restored is not None  # `describe` has found it
    return experiment, restored.state


def _nothing(name: str, classes: np.ndarray, miou: float) -> None:
    """A callback of `evaluate`."""


class _Extremes:
    """Keeps the images with the lowest and the highest mean IoU; a callback of `evaluate`.

    Attributes:
      worst, best: up to `count` of (mean IoU, id, class ids (H, W) uint8), most extreme first.
    """

    def __init__(self, count: int):
        self._count = count
        self.worst: list[tuple[float, str, np.ndarray]] = []
        self.best: list[tuple[float, str, np.ndarray]] = []

    def __call__(self, name: str, classes: np.ndarray, miou: float) -> None:
        if math.isnan(miou):
            return
        row = miou, name, classes
        self.worst = sorted([*self.worst, row], key=lambda r: (r[0], r[1]))[: self._count]
        self.best = sorted([*self.best, row], key=lambda r: (-r[0], r[1]))[: self._count]


def _draw(
    path: Path,
    title: str,
    experiment: Experiment,
    source: data.Source,
    rows: list[tuple[float, str, np.ndarray]],
) -> None:
    position = {name: index for index, name in enumerate(source.ids)}
    examples = [source[position[name]] for _, name, _ in rows]
    short = {name: PurePosixPath(name).name for _, name, _ in rows}
    titles = {
        name: last if visualize.can_draw(last) else f"image {position[name]}"
        for name, last in short.items()
    }
    wrong = [
        np.where(
            (example["label"] < experiment.num_classes) & (classes != example["label"]),
            classes,
            np.uint8(255),
        )
        for example, (_, _, classes) in zip(examples, rows, strict=True)
    ]
    visualize.save_panel(
        path,
        {
            "image": [example["image"] for example in examples],
            "ground truth": [example["label"] for example in examples],
            experiment.config.eval.network: [classes for _, _, classes in rows],
            "wrong, hatched where right": wrong,
        },
        experiment.palette,
        experiment.class_names,
        title,
        row_titles=[f"{titles[name]}: mIoU {100 * m:.1f}%" for m, name, _ in rows],
        hatched="ignored or correct",
    )


def _report(experiment: Experiment, scores: Scores, step: int) -> dict[str, Any]:
    """Returns the content of the JSON file; ratios in [0, 1], None where there is no score."""
    config = experiment.config
    flat = config_lib.to_plain(config)
    settings = ("eval.", "data.name", "data.image_size")
    return {
        **scores.as_dict(experiment.class_names),
        "step": step,
        "manner": _manner(config),
        "data": config.data.name,
        "config": {name: value for name, value in flat.items() if name.startswith(settings)},
        "images": len(scores.per_image),
        "pixels": int(scores.confusion.sum()),
        "absent_classes": scores.absent(experiment.class_names),
        "class_names": list(experiment.class_names),
        "confusion": scores.confusion.tolist(),  # [truth][prediction], pixels
        "per_image_miou": {
            name: None if math.isnan(miou) else miou for name, miou in scores.per_image.items()
        },
    }


def _manner(config: ConfigDict) -> str:
    views = config.eval.flip or tuple(config.eval.scales) != (1.0,)
    return config.eval.mode + ("_tta" if views else "")


def _free_stem(out: Path, which: str, content: dict[str, Any]) -> str:
    """Returns the name of a report: of none that is there, or of one with the same settings."""
    height, width = content["config"]["data.image_size"]
    size = f"_{height}x{width}" if height else ""
    first = f"{which}_{content['manner']}{size}"
    for number in itertools.count(1):
        stem = first if number == 1 else f"{first}_{number}"
        try:
            before = json.loads((out / f"{stem}.json").read_text())
            same = before["config"] == content["config"]
            same = same and before["per_image_miou"].keys() == content["per_image_miou"].keys()
        except FileNotFoundError:
            return stem
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
        ):  # cut off, or of something else
            same = True
        if same:
            return stem
    raise AssertionError


def _warn_of_trained(trained_on: dict[str, list[str]], split: str, images: int) -> None:
    count = sum(map(len, trained_on.values()))
    if count:
        labeled = trained_on["labeled"]
        first = printable((labeled or trained_on["unlabeled"])[0])
        log.warning(
            "%d of the %d images of %s were trained on, %d of them with labels (the first is %s): "
            "their scores say nothing of new images",
            *(count, images, split, len(labeled), first),
        )


def _described(workdir: Path, checkpoint: str) -> dict[str, Any]:
    with Checkpointer(workdir, read_only=True) as checkpointer:
        return checkpointer.describe(checkpoint)


def _make_folder(workdir: Path) -> Path:
    out = workdir / "evaluation"
    try:
        if not workdir.is_dir():
            raise UserError(
                f"--workdir={workdir} is no folder. Give the --workdir of a training run."
            )
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise _not_written(out, error) from error
    return out


def _not_written(out: Path, error: OSError) -> UserError:
    return UserError(
        f"{out} cannot be written: {error.strerror}. Grant or free space there, or copy the run "
        "and give the copy as --workdir."
    )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(map(printable, names[:4])) + (", …" if len(names) > 4 else "")
