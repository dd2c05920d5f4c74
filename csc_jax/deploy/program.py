"""A network as StableHLO: one zip archive with a program for all platforms, weights and a header.

The program is `jax.export`'s and takes the weights as an argument, so that it stays small enough to
be looked through before XLA compiles it.
"""

import functools
import io
import json
import re
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors.numpy import save

from csc_jax.config import bands
from csc_jax.deploy.description import Description, decode, parse
from csc_jax.deploy.network import function
from csc_jax.deploy.weights import WEIGHTS, Arrays
from csc_jax.errors import UserError
from csc_jax.evaluation import make_predictor
from csc_jax.models import plain
from csc_jax.models.weight_files import read_weights
from csc_jax.parallel import sharding
from csc_jax.text import name as printable_name

SUFFIX = ".stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")
HEADER, PROGRAM = "header.json", "program.bin"
_MOST_HEADER = 1 << 20  # bytes
_MOST_PROGRAM = 1 << 28  # bytes
_MOST_SIDE = 1 << 14  # px of a program for one size
# What a program may call beside StableHLO's own operations: others run code of the process, some
# of it at an address that the program names.
_ALLOWED_CALLS = frozenset({"shape_assertion", "Sharding"})
_CALL = re.compile(r'custom_call\s*@"?([^\s"(]+)|call_target_name\s*=\s*"([^"]*)"')


def write(
    path: Path, description: Description, arrays: Arrays, size: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Writes the file.

    Args:
      size: (height, width) px of all images; None for a program of any size, or, for a network
        that has none such, of `default_size`.

    Returns:
      The size of all images; None for any.

    Raises:
      UserError: flatbuffers is not installed.
    """
    if size is None:
        try:
            exported = _export(description, arrays, None)
        # What a network does that cannot be done for a size unknown shows in many ways.
        except (TypeError, ValueError, AttributeError, NotImplementedError):
            size = default_size(description)
    if size is not None:
        exported = _export(description, arrays, size)
    try:
        program = exported.serialize()
    except ImportError as error:
        raise UserError(
            "StableHLO files need flatbuffers: pip install flatbuffers, or csc-jax[export]."
        ) from error
    data = description.config.data
    kind = bands.dtype(data) if bands.keeps_values(data) else "uint8 RGB"
    header = description.as_json() | {
        "program": {
            "weights": WEIGHTS,
            "images": f"(B, H, W, {data.bands}) {kind}",
            "returns": ["(B, H, W) uint8 class ids", "(B, H, W, C) float32 probabilities"],
            "size": None if size is None else list(size),
            "resized_first": list(description.config.data.image_size),
            "platforms": list(PLATFORMS),
        }
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(HEADER, json.dumps(header, indent=1))
        archive.writestr(PROGRAM, bytes(program))
        archive.writestr(WEIGHTS, save(arrays))
    return size


def default_size(description: Description) -> tuple[int, int]:
    """Returns (height, width) px: that of all images, or of a window or training crop."""
    config = description.config
    for field in (config.data.image_size, config.eval.window, config.data.crop_size):
        if any(field):
            height, width = field
            return height, width
    raise AssertionError("data.crop_size has no area")


def _export(
    description: Description, arrays: Arrays, size: tuple[int, int] | None
) -> export.Exported:
    (batch, *sides) = export.symbolic_shape("b, h, w" if size is None else "b")
    data = description.config.data
    shape = (batch, *(sides or size or ()), data.bands)
    weights = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}
    with plain.convolutions():
        return export.export(jax.jit(function(description)), platforms=PLATFORMS)(
            weights, jax.ShapeDtypeStruct(shape, jnp.dtype(bands.dtype(data)))
        )


def read(path: Path) -> tuple[Description, Arrays, export.Exported, tuple[int, int] | None]:
    """Reads what `write` wrote: description, weights, program and the size of its images.

    Raises:
      UserError: it is damaged, was not written by `write`, or its program does what none does.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            header = decode(_member(archive, HEADER, _MOST_HEADER), path)
            program = _member(archive, PROGRAM, _MOST_PROGRAM)
            weights = _member(archive, WEIGHTS, path.stat().st_size)
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, RuntimeError) as error:
        reason = printable_name(f"{type(error).__name__}: {error}")[:120]
        raise UserError(f"{path} is no file of csc-jax export ({reason}).") from error
    description = parse(header, path)
    size = _size(header, path)
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder) / WEIGHTS
        unpacked.write_bytes(weights)
        arrays = read_weights(unpacked)
    try:
        exported = export.deserialize(bytearray(program))
        text = exported.mlir_module()
    except ImportError as error:
        raise UserError(
            f"{path} needs flatbuffers to be read: pip install flatbuffers, or csc-jax[export]."
        ) from error
    except Exception as error:  # of bytes from anywhere, the readers raise nearly anything
        reason = printable_name(f"{type(error).__name__}: {error}")[:120]
        raise UserError(f"{path} holds no program that can be read ({reason}).") from error
    called = {first or second for first, second in _CALL.findall(text)}
    if foreign := sorted(called - _ALLOWED_CALLS):
        raise UserError(
            f"The program in {path} calls {printable_name(foreign[0])[:80]!r}, which is no part of "
            "a network. Do not use this file."
        )
    _check_interface(exported, arrays, description, size, path)
    return description, arrays, exported, size


def predictor(
    description: Description,
    arrays: Mapping[str, Any],
    exported: export.Exported,
    size: tuple[int, int] | None,
) -> Any:
    """Returns images (B, H, W, K) -> (B, H', W', C) float32, as `Model` takes it."""
    config = description.config
    mesh, fill = sharding.make_mesh(1), tuple(config.data.mean)
    window = tuple(config.eval.window) if any(config.eval.window) else config.data.crop_size

    def log_probabilities(variables: Any, images: jax.Array) -> jax.Array:
        # As good as logits, from which they differ by a number for each pixel.
        _, probabilities = exported.call(variables, images)
        return jnp.log(jnp.maximum(probabilities, jnp.finfo(jnp.float32).tiny))

    predict = make_predictor(
        log_probabilities,
        lambda own: own,
        num_classes=len(description.class_names),
        mode=config.eval.mode if size is None else "sliding",
        window=tuple(window) if size is None else size,
        mesh=mesh,
        size_multiple=config.eval.size_multiple,
        fill=fill,
        scales=tuple(config.eval.scales),
        flip=config.eval.flip,
        as_logits=True,
    )
    variables = jax.device_put(dict(arrays), sharding.replicated(mesh))
    if size is None:
        return functools.partial(predict, variables)

    def predict_padded(images: np.ndarray) -> jax.Array:
        # A window is never smaller than the size of the program.
        missing = [max(0, n - have) for n, have in zip(size, images.shape[1:3], strict=True)]
        if any(missing):
            padded = np.empty(
                (
                    len(images),
                    images.shape[1] + missing[0],
                    images.shape[2] + missing[1],
                    images.shape[3],
                ),
                images.dtype,
            )
            padded[:] = np.round(fill) if images.dtype.kind == "u" else fill
            padded[:, : images.shape[1], : images.shape[2]] = images
            images = padded
        return predict(variables, images)

    return predict_padded


def _member(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """Returns a member, which is stored as it is and so no longer than the archive."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > most:
        raise ValueError(f"{name} is compressed, or longer than {most} bytes")
    with archive.open(info) as member:
        content = io.BytesIO(member.read(most + 1)).getvalue()
    if len(content) != info.file_size:
        raise ValueError(f"{name} has another length than it says")
    return content


def _size(header: Mapping[str, Any], path: Path) -> tuple[int, int] | None:
    program = header.get("program")
    size = program.get("size") if isinstance(program, dict) else 0
    if size is None:
        return None
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(isinstance(side, int) and 1 <= side <= _MOST_SIDE for side in size)
    ):
        raise UserError(f"{path} does not say which size of images its program takes.")
    return size[0], size[1]


def _check_interface(
    exported: export.Exported,
    arrays: Arrays,
    description: Description,
    size: tuple[int, int] | None,
    path: Path,
) -> None:
    """Raises UserError where the program takes or returns other arrays than it should."""
    num_classes, data = len(description.class_names), description.config.data
    wanted: Any = jax.tree.structure(((arrays, 0), {}))
    shapes = [array.shape for _, array in sorted(arrays.items())]
    dtypes = {str(aval.dtype) for aval in exported.in_avals[:-1]}
    images = exported.in_avals[-1] if exported.in_avals else None
    fits = (
        wanted == exported.in_tree
        and [aval.shape for aval in exported.in_avals[:-1]] == shapes
        and dtypes <= {"float32"}
        and images is not None
        and images.dtype == bands.dtype(data)
        and images.ndim == 4
        and images.shape[3] == data.bands
        and (size is None or tuple(images.shape[1:3]) == size)
        and len(exported.out_avals) == 2
        and exported.out_avals[1].dtype == np.float32
        and exported.out_avals[1].shape[1:] == (*images.shape[1:3], num_classes)
    )
    if not fits:
        raise UserError(f"The program in {path} does not fit the weights and classes beside it.")
