"""`--mode=predict`: a run's network on the user's files, whichever kind they are."""

from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from csc_jax import evaluation
from csc_jax.config import bands
from csc_jax.deploy import images as images_lib
from csc_jax.deploy import tiles, video
from csc_jax.deploy.load import from_run
from csc_jax.errors import UserError
from csc_jax.evaluation.predict import Extras, predict_folder


def predict_files(
    config: ConfigDict,
    workdir: Path,
    checkpoint: str,
    images: Path,
    out: Path,
    *,
    extras: Extras,
    tile: int | None = None,
) -> None:
    """Writes what `predict_folder` does, or of a video `NAME_overlay.mp4`.

    Args:
      config: of the run.
      workdir: of the run.
      checkpoint: latest | best | a step.
      images: an image, a folder of images, or a video.
      out: folder to write to.
      extras: what else is written; nothing for a video.
      tile: px, sides of the tiles in which TIFFs go; None = they are read whole.

    Raises:
      UserError: a file or combination that cannot be; what is not installed is said first.
    """
    evaluation.check_outside(out, config.data.root, "--out")
    is_video = images.suffix.lower() in video.FORMATS and images.is_file()
    if is_video:
        if extras != Extras():
            raise UserError(
                f"--images={images} is a video, of which an overlay is written: leave out "
                "--confidence, --soft and --polygons."
            )
        video.library(images)
    if tile is not None:
        size = tuple(config.data.image_size)
        if any(size):
            raise UserError(
                f"--tile is {tile}, but data.image_size is {size}: the network was trained on "
                "whole images, resized, and not on parts of them."
            )
        tiles.library()
    model = from_run(config, workdir, checkpoint)
    data = model.description.config.data
    if is_video:
        if bands.keeps_values(data) and (data.bands, data.pixel_type) != (3, "uint8"):
            raise UserError(
                f"--images={images} is a video, whose frames are RGB of 8 bits, but the network "
                f"was trained on {data.bands} bands of {data.pixel_type}."
            )
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out={out} cannot be made: {error}. Choose another.") from error
        video.segment(model.predict, images, out / f"{images.stem}_overlay.mp4")
        return
    in_tiles = None
    if tile is not None:
        in_tiles = partial(tiles.segment, model.predict, model.palette, data=data, tile=tile)
    predict_folder(
        lambda image: model.predict(image, probabilities=extras.soft),
        images,
        out,
        class_names=model.class_names,
        extras=extras,
        read=partial(images_lib.read, data=data),
        in_tiles=in_tiles,
    )
