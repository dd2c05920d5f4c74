"""What a report tells of a network besides mean IoU, measured in a pass of its own over a split.

The evaluations of training stay as fast as they are: this pass wants the probabilities, which those
never leave the device for.
"""

import base64
import binascii
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from csc_jax import config as config_lib
from csc_jax import data
from csc_jax.data import codec
from csc_jax.evaluation.boundary import BoundaryIoU, boundary_iou
from csc_jax.evaluation.calibration import BINS, Calibration, calibration_of, sort_into_bins
from csc_jax.evaluation.metrics import Scores
from csc_jax.parallel.sharding import fetch, place_whole
from csc_jax.reporting import visualize
from csc_jax.state import Network
from csc_jax.training.experiment import Experiment

_FILE = Path("evaluation") / "report.json"
_MOST_BYTES = 256 * 2**20  # of that file
_NOT_OURS = (ValueError, TypeError, AttributeError, RecursionError)  # of values read back
_JPEG = (cv2.IMWRITE_JPEG_QUALITY, 90)


@dataclasses.dataclass(frozen=True)
class Example:
    """An image that the network found hard or easy.

    Attributes:
      kind: "worst" or "best".
      name: id of the image.
      miou: its own mean IoU, in [0, 1].
      picture: a JPEG or PNG, clockwise from the upper left: image, ground truth, what is wrong,
        prediction.
    """

    kind: str
    name: str
    miou: float
    picture: bytes


@dataclasses.dataclass(frozen=True)
class Detail:
    """Measured on one split with one network.

    Attributes:
      step: of the network.
      fields: `eval.*` of the config, as JSON holds them: what was scored, and how.
      class_names: C names.
      palette: (C, 3) uint8 RGB.
      scores: with the mean IoU of each image.
      boundary: see `boundary.py`.
      calibration: see `calibration.py`; None in mode `center_crop`.
      examples: worst images first, then the best, `eval.panels` of each.
    """

    step: int
    fields: Mapping[str, Any]
    class_names: tuple[str, ...]
    palette: np.ndarray
    scores: Scores
    boundary: BoundaryIoU
    calibration: Calibration | None
    examples: tuple[Example, ...]


def measure(
    experiment: Experiment,
    network: Network,
    step: int,
    source: data.Source,
    before_batch: Callable[[], None] = lambda: None,
) -> Detail:
    """Goes through a split once, as `config.eval` says; all of several processes call it.

    Args:
      experiment: of the network.
      network: what is measured.
      step: of the network.
      source: a split with labels.
      before_batch: may raise to end it early, on all processes at the same batch.
    """
    config, num_classes = experiment.config, experiment.num_classes
    look = _without_logits if config.eval.mode == "center_crop" else _with_logits
    batch_size = -(-config.batch.eval // experiment.mesh.size) * experiment.mesh.size
    confusion = np.zeros((num_classes, num_classes), np.int64)
    per_image: dict[str, float] = {}
    boundary, calibration = BoundaryIoU.nothing(num_classes), Calibration.nothing()
    extremes = _Extremes(config.eval.panels)

    def finish(batch: Mapping[str, Any], found: tuple[jax.Array, jax.Array | None]) -> None:
        nonlocal boundary, calibration
        height, width = batch["label"].shape[1:]
        classes = fetch(found[0])[:, :height, :width]
        if found[1] is not None:
            calibration += calibration_of(fetch(found[1]))
        for i, name in enumerate(batch["ids"]):
            if not batch["valid"][i]:
                continue
            counts = _confusion(batch["label"][i], classes[i], num_classes)
            np.add(confusion, counts, out=confusion)
            per_image[name] = Scores(counts).miou
            boundary += boundary_iou(batch["label"][i], classes[i], num_classes)
            extremes.add(per_image[name], name, classes[i])

    pending = None
    for batch in data.eval_batches(source, batch_size):
        before_batch()
        found = look(experiment, network, batch)
        if pending is not None:  # one batch late: the host counts while the device works
            finish(*pending)
        pending = batch, found
    if pending is not None:
        finish(*pending)

    note = "center_crop" if config.eval.mode == "center_crop" else ""
    return Detail(
        step,
        scored_fields(config),
        tuple(experiment.class_names),
        experiment.palette,
        Scores(confusion, per_image, note),
        boundary,
        calibration if calibration.count.any() else None,
        tuple(_draw(experiment, source, extremes)),
    )


def scored_fields(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields that say what is scored and how."""
    return {k: v for k, v in config_lib.to_plain(config).items() if k.startswith("eval.")}


def save(detail: Detail, workdir: Path) -> None:
    """Keeps what was measured in `workdir`, for reports to come; OSError if that is not possible.

    It replaces what an earlier measurement left.
    """
    values = {
        "step": detail.step,
        "fields": dict(detail.fields),
        "class_names": list(detail.class_names),
        "palette": detail.palette.tolist(),
        "confusion": detail.scores.confusion.tolist(),
        "note": detail.scores.note,
        "per_image_miou": {
            name: None if math.isnan(miou) else miou
            for name, miou in detail.scores.per_image.items()
        },
        "boundary": _lists(detail.boundary),
        "calibration": detail.calibration and _lists(detail.calibration),
        "examples": [
            dataclasses.asdict(example)
            | {"picture": base64.b64encode(example.picture).decode("ascii")}
            for example in detail.examples
        ],
    }
    path = workdir / _FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(values) + "\n", encoding="utf-8")
    unfinished.replace(path)


def load(workdir: Path) -> Detail | None:
    """Returns what `save` kept in `workdir`; None if there is nothing, or nothing whole."""
    path = workdir / _FILE
    try:
        if path.stat().st_size > _MOST_BYTES:
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
        names = tuple(map(str, values["class_names"]))
        count = len(names)
        per_image = {
            str(name): math.nan if miou is None else float(miou)
            for name, miou in values["per_image_miou"].items()
        }
        stored = values["calibration"]
        boundary = (_array(values["boundary"][k], (count,)) for k in ("intersection", "union"))
        bins = stored and [_array(stored[k], (BINS,)) for k in ("count", "confidence", "right")]
        return Detail(
            int(values["step"]),
            dict(values["fields"]),
            names,
            _array(values["palette"], (count, 3), 255).astype(np.uint8),
            Scores(
                _array(values["confusion"], (count, count)).astype(np.int64),
                per_image,
                str(values["note"]),
            ),
            BoundaryIoU(*boundary),
            Calibration(*bins) if bins else None,
            tuple(map(_example, values["examples"])),
        )
    except (OSError, LookupError, ArithmeticError, *_NOT_OURS):
        return None


def _with_logits(
    experiment: Experiment, network: Network, batch: Mapping[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """Class ids (B, H', W') of a batch, and its pixels sorted by confidence."""
    logits = experiment.predict_logits(network.variables, batch["image"])
    labels = np.full(logits.shape[:3], 255, np.uint8)
    _, height, width = batch["label"].shape
    labels[:, :height, :width] = np.where(batch["valid"][:, None, None], batch["label"], 255)
    config = experiment.config.eval
    averaged = config.flip or tuple(config.scales) != (1.0,)
    return _look(logits, place_whole(labels, logits.sharding), summed=bool(averaged))


def _without_logits(
    experiment: Experiment, network: Network, batch: Mapping[str, Any]
) -> tuple[jax.Array, None]:
    return experiment.predict(network.variables, batch["image"]), None


@functools.partial(jax.jit, static_argnames="summed")
def _look(logits: jax.Array, labels: jax.Array, summed: bool) -> tuple[jax.Array, jax.Array]:
    """What of (B, H, W, C) logits, or sums of probabilities, goes to the host.

    Args:
      logits: as `make_predictor` gives them.
      labels: (B, H, W) uint8.
      summed: whether they are sums of probabilities.

    Returns:
      (B, H, W) uint8 class ids, and what `sort_into_bins` returns.
    """
    classes = jnp.argmax(logits, axis=-1)
    most = jnp.max(logits, axis=-1)
    if summed:
        confidence = most / jnp.sum(logits, axis=-1)
    else:
        confidence = 1 / jnp.sum(jnp.exp(logits - most[..., None]), axis=-1)
    counted = labels < logits.shape[-1]
    rows = sort_into_bins(confidence, classes == labels.astype(classes.dtype), counted)
    return classes.astype(jnp.uint8), rows


def _confusion(label: np.ndarray, classes: np.ndarray, num_classes: int) -> np.ndarray:
    """As `metrics.confusion_matrix`, of one image and on the host; (C, C) int64."""
    counted = (label < num_classes) & (classes < num_classes)
    pair = label[counted].astype(np.int64) * num_classes + classes[counted]
    return np.bincount(pair, minlength=num_classes**2).reshape(num_classes, num_classes)


class _Extremes:
    """Keeps the images with the lowest and the highest mean IoU."""

    def __init__(self, count: int):
        self._count = count
        self.worst: list[tuple[float, str, np.ndarray]] = []
        self.best: list[tuple[float, str, np.ndarray]] = []

    def add(self, miou: float, name: str, classes: np.ndarray) -> None:
        if math.isnan(miou) or not self._count:
            return
        row = miou, name, classes
        self.worst = sorted([*self.worst, row], key=lambda r: (r[0], r[1]))[: self._count]
        self.best = sorted([*self.best, row], key=lambda r: (-r[0], r[1]))[: self._count]


def _draw(experiment: Experiment, source: data.Source, extremes: _Extremes) -> list[Example]:
    position = {name: index for index, name in enumerate(source.ids)}
    examples = []
    for kind, rows in (("worst", extremes.worst), ("best", extremes.best)):
        for miou, name, classes in rows:
            example = source[position[name]]
            label = example["label"]
            wrong = (label < experiment.num_classes) & (classes != label)
            pictures = (
                *(example["image"], label, classes),
                np.where(wrong, classes, np.uint8(255)),
            )
            picture = visualize.four(pictures, experiment.palette)
            examples.append(Example(kind, name, miou, _encode(picture)))
    return examples


def _encode(picture: np.ndarray) -> bytes:
    """Returns the smaller of a PNG and a good JPEG of (H, W, 3) uint8 RGB."""
    bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    jpeg: bytes = cv2.imencode(".jpg", bgr, _JPEG)[1].tobytes()
    return min(jpeg, codec.encode_png(picture), key=len)


def _lists(counts: BoundaryIoU | Calibration) -> dict[str, list[float]]:
    return {name: value.tolist() for name, value in vars(counts).items()}


def _array(values: Any, shape: tuple[int, ...], most: float = 2.0**53) -> np.ndarray:
    """Returns float64 numbers of a shape in [0, most]; ValueError for anything else."""
    array = np.asarray(values, np.float64)
    if array.shape != shape or not ((array >= 0) & (array <= most)).all():
        raise ValueError(f"not {shape} numbers up to {most}")
    return array


def _example(values: Mapping[str, Any]) -> Example:
    try:
        picture = base64.b64decode(values["picture"], validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error
    return Example(str(values["kind"]), str(values["name"]), float(values["miou"]), picture)
