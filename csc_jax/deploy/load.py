"""Loads a network from a run, an exported file or a bundle, each as a `Model`."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from csc_jax import config as config_lib
from csc_jax import paths, stored_config
from csc_jax.config import checks as config_checks
from csc_jax.deploy import hub, program, weights
from csc_jax.deploy.description import Description
from csc_jax.deploy.model import Model
from csc_jax.errors import UserError
from csc_jax.evaluation import score
from csc_jax.parallel import sharding
from csc_jax.text import name as printable_name
from csc_jax.training.experiment import build


def load(source: str | os.PathLike[str], *, checkpoint: str = "latest", **evaluation: Any) -> Model:
    """Loads a trained network.

    Args:
      source: the work directory of a run; a .safetensors, .stablehlo or bundle that `--mode=export`
        wrote; or hf:OWNER/REPO, a bundle on the Hugging Face Hub.
      checkpoint: of a run: latest, best (by mIoU on the val split) or a step.
      evaluation: fields of `config.eval` that say how images are predicted, by name, in place of
        those of the training: `mode`, `window`, `scales`, `flip`, `size_multiple`, and of a run
        `network`.

    Returns:
      The network on the first device.

    Raises:
      UserError: there is nothing of that kind there, it is damaged, or a field cannot be.
    """
    name = os.fspath(source)
    path = hub.fetch(name) if name.startswith(hub.PREFIX) else paths.given("The model", name)
    try:
        is_run, is_folder, is_file = (path / "checkpoints").is_dir(), path.is_dir(), path.is_file()
    except OSError as error:
        raise UserError(f"The model {path} cannot be reached: {error.strerror}.") from error
    if is_run:
        return from_run(
            _evaluated(stored_config.get_config(str(path)), evaluation), path, checkpoint
        )
    if is_folder or (is_file and path.suffix == ".safetensors"):
        description, arrays = weights.read_bundle(path) if is_folder else weights.read_file(path)
        config = _evaluated(description.config, evaluation)
        return from_weights(dataclasses.replace(description, config=config), arrays, path)
    if is_file and path.suffix == program.SUFFIX:
        return from_program(path, evaluation)
    hint = " Run an .onnx with onnxruntime." if path.suffix == ".onnx" else ""
    raise UserError(
        f"{path} is no model. Give the work directory of a run, or a .safetensors, .stablehlo or "
        f"bundle that csc-jax export wrote.{hint}"
    )


def from_program(path: Path, evaluation: dict[str, Any]) -> Model:
    """Returns the network of a .stablehlo file; `evaluation` as in `load`."""
    description, arrays, exported, size = program.read(path)
    config = _evaluated(description.config, evaluation)
    description = dataclasses.replace(description, config=config)
    on_one_device(config)  # whole images
    predict = program.predictor(description, arrays, exported, size)
    return Model(description, predict, arrays)


def from_run(config: ConfigDict, workdir: Path, checkpoint: str) -> Model:
    """Returns the network that `config.eval.network` names of a checkpoint.

    Raises:
      UserError: no such checkpoint, or a config that does not fit it.
    """
    experiment, network, step = score.load(on_one_device(config), workdir, checkpoint)
    config = config.copy_and_resolve_references()
    config.data = experiment.config.data  # with what the run had measured
    description = Description(experiment.class_names, experiment.palette, config, step)
    arrays = weights.evaluated(network.variables)
    return from_weights(description, arrays, workdir)


def from_weights(description: Description, arrays: weights.Arrays, source: object) -> Model:
    """Returns the network of a description with these weights.

    Raises:
      UserError: they are not this network's; the message names `source`.
    """
    config = on_one_device(description.config)
    config.loss.aux_weight = 0.0  # the auxiliary head is for training alone
    config = config_lib.resolve(config, steps_per_epoch=1)  # lengths do not matter here
    try:
        experiment = build(config, description.class_names, description.palette)
        network = weights.fill(experiment.method.task, arrays, source)
    except UserError:
        raise
    except Exception as error:  # of a config from anywhere, Flax and JAX raise nearly anything
        reason = printable_name(f"{type(error).__name__}: {error}")[:200]
        raise UserError(f"{source} describes a network that cannot be built ({reason}).") from error
    variables = jax.device_put(network.variables, sharding.replicated(experiment.mesh))
    predict = functools.partial(experiment.predict_logits, variables)
    return Model(description, predict, arrays)


def on_one_device(config: ConfigDict) -> ConfigDict:
    """Returns a copy of the config for one device, whatever the training had."""
    config = config.copy_and_resolve_references()
    if config.eval.mode == "center_crop":
        raise UserError(
            "A prediction is one of whole images, but eval.mode is 'center_crop'. Set it to "
            "'whole' or 'sliding'."
        )
    config.parallel.devices = config.parallel.fsdp = 1
    return config


def _evaluated(config: ConfigDict, fields: dict[str, Any]) -> ConfigDict:
    """Returns the config with other fields of `config.eval`, checked."""
    config = config.copy_and_resolve_references()
    for name, value in fields.items():
        if name not in config.eval:
            raise UserError(
                f"{name} is no field of config.eval; there are {', '.join(config.eval)}."
            )
        try:
            config.eval[name] = tuple(value) if isinstance(value, list) else value
        except TypeError as error:
            raise UserError(f"eval.{name} is {value!r}, which has the wrong type.") from error
    config_checks.validate(config)
    return config
