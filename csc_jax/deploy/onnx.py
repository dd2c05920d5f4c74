"""A network as ONNX, for programs without JAX. The converter is jax2onnx."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from csc_jax.config import bands
from csc_jax.deploy.description import Description
from csc_jax.deploy.network import function
from csc_jax.deploy.weights import Arrays
from csc_jax.errors import UserError
from csc_jax.models import plain

SUFFIX = ".onnx"
_KEY = "csc_jax"  # of the file's metadata
# jax2onnx 0.17 asks for Orbax before 0.11.37, but runs with later ones.
_MISSING = (
    "ONNX files need jax2onnx and onnxruntime: pip install 'csc-jax[onnx]', then "
    "pip install --no-deps 'jax2onnx>=0.17,<0.18'."
)


def write(path: Path, description: Description, arrays: Arrays, size: tuple[int, int]) -> None:
    """Writes a file for images (B, height, width, K) of their type, mostly uint8; B is any.

    Its input is `images`; its outputs are `classes`, (B, height, width) uint8, and `probabilities`,
    (B, height, width, C) float32. jax2onnx has no rules for a height and width that are not known.

    Raises:
      UserError: jax2onnx is not installed, or cannot convert this network.
    """
    try:
        import onnx
        from jax2onnx import to_onnx
    except ImportError as error:
        raise UserError(_MISSING) from error
    segment = function(description)
    (batch,) = export.symbolic_shape("B")
    data = description.config.data
    images = jax.ShapeDtypeStruct((batch, *size, data.bands), jnp.dtype(bands.dtype(data)))
    try:
        with plain.convolutions():
            model = to_onnx(
                lambda pixels: segment(arrays, pixels),
                inputs=[images],
                input_names=["images"],
                output_names=["classes", "probabilities"],
            )
    except Exception as error:  # a converter has no exception of its own
        raise UserError(
            f"jax2onnx cannot convert {description.config.model.backbone}: "
            f"{type(error).__name__}: {str(error)[:200]}. Export it as stablehlo."
        ) from error
    onnx.helper.set_model_props(model, {_KEY: json.dumps(description.as_json())})
    try:
        onnx.save(model, path)
    except ValueError as error:  # of protobuf
        raise UserError(f"The network is too large for one ONNX file: {error}") from error


def probabilities(path: Path, images: np.ndarray) -> np.ndarray:
    """Returns what onnxruntime makes of images (B, H, W, K), on a CPU.

    Raises:
      UserError: onnxruntime is not installed, or does not take the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(_MISSING) from error
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return session.run(["probabilities"], {"images": images})[0]
    except Exception as error:  # its exceptions are not public
        raise UserError(f"onnxruntime does not take {path}: {str(error)[:300]}") from error
