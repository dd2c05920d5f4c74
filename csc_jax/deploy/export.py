"""`--mode=export`: writes the evaluated network to a file or folder and checks what it wrote."""

import dataclasses
import functools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from csc_jax.config import bands
from csc_jax.deploy import card, hub, onnx, program, weights
from csc_jax.deploy.load import from_run, from_weights, load
from csc_jax.deploy.model import Model
from csc_jax.errors import UserError

log = logging.getLogger("csc_jax")

FORMATS = {
    "stablehlo": program.SUFFIX,
    "safetensors": ".safetensors",
    "bundle": "",
    "onnx": ".onnx",
}
_LARGEST_SIDE = 1 << 14  # px
# Largest difference of a probability by the compute type: rounding, and nothing else, differs.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
_SIZES = ((64, 96), (97, 65))  # px of the images to compare with, of a program for any size


def export(
    config: ConfigDict,
    workdir: Path,
    checkpoint: str,
    *,
    file_format: str,
    out: Path,
    size: tuple[int, int] | None = None,
    push: str | None = None,
) -> Path:
    """Writes the network that `config.eval.network` names, reads it again and compares the two.

    Args:
      config: of the run.
      workdir: of the run.
      checkpoint: latest | best | a step.
      file_format: a key of `FORMATS`.
      out: the file or folder to write; must not be there yet.
      size: (height, width) px of all images, for onnx and stablehlo; None = any, or where that is
        not possible `program.default_size`.
      push: hf:OWNER/REPO to publish a bundle as; None = nowhere.

    Returns:
      `out`.

    Raises:
      UserError: it cannot be written, or gives other results than the run.
    """
    check(file_format, out, size, push)
    model = from_run(config, workdir, checkpoint)
    description, arrays = model.description, model.arrays
    reference = _whole(model)
    unfinished = out.with_name(f".unfinished-{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove(unfinished)
        sizes = list(_SIZES)
        if file_format == "bundle":
            unfinished.mkdir()
            network = description.config.eval.network
            scores = card.find_scores(workdir, network, description.step)
            weights.write_bundle(unfinished, description, arrays, card.write(description, scores))
        elif file_format == "safetensors":
            weights.write_file(unfinished, description, arrays)
        elif file_format == "onnx":
            sizes = [size or program.default_size(description)]
            onnx.write(unfinished, description, arrays, sizes[0])
        else:
            fixed = program.write(unfinished, description, arrays, size)
            sizes = sizes if fixed is None else [fixed]
        written: Callable[[np.ndarray], np.ndarray]
        if file_format == "onnx":
            written = functools.partial(onnx.probabilities, unfinished)
        else:
            written = load(unfinished, mode="whole", scales=(1.0,), flip=False).probabilities
        draw = functools.partial(_random_images, config=description.config)
        difference, changed = _compare(reference.probabilities, written, sizes, draw)
        dtype = description.config.model.dtype
        if not difference <= _TOLERANCE[dtype]:  # also where it is no number
            raise UserError(
                f"The {file_format} of step {description.step} differs from the run by "
                f"{difference:.2g} in a probability, more than {_TOLERANCE[dtype]:g}. It was not "
                "kept; please report this."
            )
        unfinished.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}.") from error
    finally:
        _remove(unfinished)
    seen = "images of any size" if sizes == list(_SIZES) else f"images of {sizes[0]} px"
    log.info(
        "%s written to %s, for %s\nread again: probabilities differ by at most %.2g, "
        "class ids in %.4f%% of the pixels",
        file_format,
        out,
        seen,
        difference,
        100 * changed,
    )
    if push is not None:
        log.info("published: %s", hub.push(out, push))
    return out


def check(
    file_format: str, out: Path, size: tuple[int, int] | None = None, push: str | None = None
) -> None:
    """Raises UserError for what cannot be exported, before anything is restored."""
    if file_format not in FORMATS:
        raise UserError(f"--format is {file_format!r}; it takes one of {', '.join(FORMATS)}.")
    suffix = FORMATS[file_format]
    if suffix and out.suffix != suffix:
        raise UserError(f"--out={out} must end in {suffix} for --format={file_format}.")
    if out.exists() or out.is_symlink():
        raise UserError(f"--out={out} is there already. Remove it, or choose another name.")
    if push is not None:
        if file_format != "bundle":
            raise UserError("--push goes with --format=bundle.")
        hub.repository(push)
    if size is not None:
        if file_format not in ("onnx", "stablehlo"):
            raise UserError("--size goes with --format=onnx or stablehlo.")
        if not all(1 <= side <= _LARGEST_SIDE for side in size):
            raise UserError(f"--size is {size}; each side is 1 to {_LARGEST_SIDE} px.")


def _whole(model: Model) -> Model:
    """Returns the model as it is without windows, flips and scales."""
    config = model.description.config.copy_and_resolve_references()
    config.eval.mode, config.eval.scales, config.eval.flip = "whole", (1.0,), False
    description = dataclasses.replace(model.description, config=config)
    return from_weights(description, model.arrays, "the run")


def _compare(
    expected: Callable[[np.ndarray], np.ndarray],
    written: Callable[[np.ndarray], np.ndarray],
    sizes: list[tuple[int, int]],
    draw: Callable[[np.random.Generator, tuple[int, int]], np.ndarray],
) -> tuple[float, float]:
    """Returns the largest difference of a probability and the share of other class ids."""
    rng = np.random.default_rng(0)
    differences, changed = [], []
    for size in sizes:
        images = draw(rng, size)
        first, second = expected(images), written(images)
        differences.append(np.abs(first - second).max())
        changed.append(np.mean(first.argmax(axis=-1) != second.argmax(axis=-1)))
    return float(np.max(differences)), float(np.mean(changed))


def _random_images(
    rng: np.random.Generator, size: tuple[int, int], config: ConfigDict
) -> np.ndarray:
    """Returns (2, height, width, K) of what the network was trained on."""
    data = config.data
    if not bands.keeps_values(data):
        return rng.integers(0, 256, (2, *size, 3), np.uint8)
    values = rng.normal(data.mean, data.std, (2, *size, data.bands))
    dtype = np.dtype(data.pixel_type)
    if dtype.kind == "u":
        values = values.round().clip(0, np.iinfo(dtype).max)
    return values.astype(dtype)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
