"""A work directory whose checkpoint holds fresh weights: what a training leaves, in seconds."""

import json
from pathlib import Path

import jax.numpy as jnp
from ml_collections import ConfigDict
from tiny import tiny_config

from csc_jax import config as config_lib
from csc_jax import data
from csc_jax.config import bands
from csc_jax.training.checkpoint import Checkpointer
from csc_jax.training.experiment import build
from csc_jax.training.loop import describe

STEP = 3


def save_run(folder: Path, **overrides: object) -> ConfigDict:
    """Writes config.json and a checkpoint at `STEP` into `folder`; returns the config."""
    config = tiny_config(folder, **overrides)
    dataset = data.load(config.data)
    resolved = config_lib.resolve(config, steps_per_epoch=1)
    resolved = bands.with_measured(resolved, dataset.pixels)
    experiment = build(resolved, dataset.class_names, dataset.palette)
    with Checkpointer(folder) as checkpointer:
        state = experiment.compile_init()().replace(step=jnp.int32(STEP))
        checkpointer.save(STEP, state, {}, describe(experiment), 0.1)
    (folder / "config.json").write_text(json.dumps(config_lib.to_plain(resolved)))
    return config
