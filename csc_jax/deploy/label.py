"""`--mode=label`: what to label next, with masks to start from.

`ranking.csv` orders a run's unlabelled images (`acquisition`), `contact_sheet.png` shows the first
of them, and `masks/` has the network's own labels and confidence, to be corrected.
"""

import csv
import dataclasses
import io
import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from csc_jax import data, evaluation
from csc_jax.data import codec, transforms
from csc_jax.data.example import BadExample, Example, Pair
from csc_jax.deploy import acquisition, weights
from csc_jax.deploy.acquisition import Measures, Ranking
from csc_jax.deploy.description import Description
from csc_jax.deploy.load import from_weights, on_one_device
from csc_jax.deploy.model import Model
from csc_jax.errors import UserError
from csc_jax.evaluation import score
from csc_jax.evaluation.predict import Extras, check_outputs, coco_file, write_file, write_one
from csc_jax.models.resize import nearest_multiple
from csc_jax.reporting import visualize
from csc_jax.state import TrainState
from csc_jax.text import name as printable
from csc_jax.training.experiment import Experiment

log = logging.getLogger("csc_jax")

RANKING, SHEET, MASKS = "ranking.csv", "contact_sheet.png", "masks"
_SHOWN = 20  # images on the contact sheet
_OTHER = {"teacher": "student", "student": "teacher"}


@dataclasses.dataclass(frozen=True)
class _Image:
    """An unlabelled image as it lies in the data set.

    Attributes:
      name: relative path of what is written for it.
      example: with which it is read.
      file: that it is; None where it is drawn, or in an archive.
    """

    name: str
    example: Example
    file: Path | None


def label(
    config: ConfigDict,
    workdir: Path,
    checkpoint: str,
    out: Path | None = None,
    *,
    polygons: str | None = None,
) -> Path:
    """Ranks the unlabelled images of a run, and writes a mask and its confidence for each.

    Which images have labels follows from `config.data`, as at the start of a training. Masks have
    the images' own sizes, and are written in the order of the ranking.

    Args:
      config: of the run; `config.eval` says which network is asked, and how it predicts.
      workdir: of the run.
      checkpoint: latest | best | a step.
      out: folder to write to, new or empty; None = `workdir`/label.
      polygons: as in `Extras`.

    Returns:
      The path of the ranking.

    Raises:
      UserError: no unlabelled images, a folder that holds something, or no checkpoint of these
        classes. Or images that cannot be read any more, which are named when the others are done.
    """
    config = on_one_device(config)
    out = out or workdir / "label"
    _check_new(out)
    dataset = data.load(config.data)
    source = dataset.sources["train"]
    partition = data.partition(config.data, dataset, config.seed)
    labeled = list(partition.labeled)
    taken = set(labeled)  # with full supervision, both lists name all images
    unlabeled = [image for image in partition.unlabeled if image not in taken]
    if not unlabeled:
        raise UserError(
            f"The run in {workdir} has no unlabelled images to rank: all {len(labeled)} train "
            "images are labelled ones. Add images without labels to data.root, or lower "
            "data.labeled_fraction."
        )
    extras = Extras(confidence=True, polygons=polygons)
    images = _images(config, unlabeled, extras)
    experiment, state = score.restore(config, workdir, checkpoint)
    if dataset.class_names != experiment.class_names:
        raise UserError(
            f"The checkpoint in {workdir} and the data set {dataset.name} have other classes. Give "
            "the data that it was trained for (--config.data.name, --config.data.root)."
        )
    evaluation.check_folder(out, config.data.root, "--out")
    config.data = experiment.config.data  # with what the run had measured

    of_labeled = _measure(experiment, state, source, labeled)
    found = _measure(experiment, state, source, unlabeled)
    ranking = acquisition.rank(found.uncertainty, found.features, of_labeled.features)
    path = out / RANKING
    write_file(path, _table(ranking, found, labeled, unlabeled).encode())
    log.info("written to %s; the first: %s", path, _first(unlabeled, ranking))
    model = _model(config, experiment, state, workdir)
    in_order = [images[unlabeled[index]] for index in ranking.order]
    title = f"What to label next: {experiment.title}, step {int(state.step)}"
    _write_masks(model, in_order, ranking.score, out, extras, title)
    return path


def _check_new(out: Path) -> None:
    """Raises UserError for a folder that holds something: masks may have been corrected in it."""
    try:
        used = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise UserError(f"{out} cannot be read: {error.strerror}. Choose another --out.") from error
    if used:
        raise UserError(
            f"{out} is there already, and may hold masks that somebody has corrected. Move it "
            "away, or choose another folder with --out."
        )


def _images(config: ConfigDict, unlabeled: Sequence[str], extras: Extras) -> dict[str, _Image]:
    """Returns where to read the unlabelled images from, by id."""
    examples = {example.id: example for example in data.find(config.data).splits["train"]}
    images = {}
    for image in unlabeled:
        example = examples[image]
        file = example.image if isinstance(example, Pair) else None
        suffix = ".png" if file is None else file.suffix
        name = PurePosixPath(f"{image}{suffix}")
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"The image id {image!r} cannot name a file in --out.")
        path = file if isinstance(file, Path) else None
        if path is None and extras.polygons == "labelme":
            raise UserError(
                f"--polygons=labelme refers to the file of each image, but {printable(image)} of "
                f"{config.data.name} is in no file of its own. Use --polygons=coco."
            )
        images[image] = _Image(name.as_posix(), example, path)
    check_outputs(
        (each.name for each in images.values()), extras, f"The data set {config.data.name}"
    )
    return images


def _measure(
    experiment: Experiment, state: TrainState, source: data.Source, ids: Sequence[str]
) -> Measures:
    """Measures images one by one, at the size that the network was trained on."""
    evaluated = experiment.config.eval
    network, other = getattr(state, evaluated.network), getattr(state, _OTHER[evaluated.network])
    measure = acquisition.make_measure(experiment.method.task)
    position = {name: index for index, name in enumerate(source.ids)}
    rows = []
    for name in tqdm(ids, unit="image", disable=None):
        image = source[position[name]]["image"]
        height, width = (nearest_multiple(n, evaluated.size_multiple) for n in image.shape[:2])
        if (height, width) != image.shape[:2]:
            image = transforms.resize_image(image, (height, width))
        row = measure(network, other, image[None])
        if not all(np.isfinite(values).all() for values in row):
            raise UserError(
                f"The network of step {int(state.step)} gives no finite numbers for the image "
                f"{printable(name)}. Choose another --checkpoint."
            )
        rows.append(row)
    return Measures(*map(np.concatenate, zip(*rows, strict=True)))


def _table(
    ranking: Ranking, measures: Measures, labeled: Sequence[str], unlabeled: Sequence[str]
) -> str:
    """Returns the content of `ranking.csv`."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("rank", "image", "score", "entropy", "disagreement", "distance", "nearest"))
    known = [*labeled, *unlabeled]
    for place, index in enumerate(ranking.order):
        numbers = (
            ranking.score[place],
            measures.entropy[index],
            measures.disagreement[index],
            ranking.distance[place],
        )
        writer.writerow(
            (
                place + 1,
                unlabeled[index],
                *(f"{number:.6g}" for number in numbers),
                known[ranking.nearest[place]],
            )
        )
    return file.getvalue()


def _model(config: ConfigDict, experiment: Experiment, state: TrainState, source: Path) -> Model:
    description = Description(experiment.class_names, experiment.palette, config, int(state.step))
    network = getattr(state, config.eval.network)
    return from_weights(description, weights.evaluated(network.variables), source)


def _write_masks(
    model: Model,
    images: Sequence[_Image],
    scores: np.ndarray,
    out: Path,
    extras: Extras,
    title: str,
) -> None:
    """Writes masks in the order of `images`, and the contact sheet."""
    unreadable = list[str]()
    thumbnails, captions = list[np.ndarray](), list[str]()
    with coco_file(out / MASKS, model.class_names, extras) as coco:
        for place, image in enumerate(tqdm(images, unit="image", disable=None)):
            try:
                pixels, _, _ = image.example.read()
            except BadExample as error:
                unreadable.append(printable(error))
                continue
            result = model.predict(pixels)
            write_one(result, image.name, image.file or Path(), out / MASKS, extras, coco)
            if place < _SHOWN:
                thumbnails.append(visualize.thumbnail(result.overlay()))
                captions.append(_caption(place, scores[place], image.name))
    if thumbnails:
        sheet = visualize.draw_contact_sheet(
            thumbnails, captions, model.palette, model.class_names, title
        )
        write_file(out / SHEET, codec.encode_png(sheet))
    log.info("%d masks written to %s", len(images) - len(unreadable), out / MASKS)
    if unreadable:
        raise UserError(
            f"{len(unreadable)} of {len(images)} images cannot be read any more: "
            f"{'; '.join(unreadable[:5])}. Replace or remove them; the others are done."
        )


def _caption(place: int, score: float, name: str) -> str:
    """Returns rank, score and name of an image; of a long name the end, which differs most."""
    start, name = f"{place + 1}: {score:.3f}  ", PurePosixPath(name).stem
    room = visualize.CAPTION - len(start)
    return start + (name if len(name) <= room else f"…{name[1 - room :]}")


def _first(unlabeled: Sequence[str], ranking: Ranking) -> str:
    return ", ".join(printable(unlabeled[index]) for index in ranking.order[:3])
