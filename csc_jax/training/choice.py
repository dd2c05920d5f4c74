"""Fills in what a config leaves open (`config/choose.py`), from the data or as the run began."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from csc_jax import data, models
from csc_jax.config import checks as config_checks
from csc_jax.config import choose

log = logging.getLogger("csc_jax")

_SAMPLE = 64  # train images whose sizes are looked at


def fill_open(
    config: ConfigDict,
    dataset: data.Dataset,
    partition: data.Partition,
    before: Mapping[str, Any] | None,
) -> ConfigDict:
    """Returns a config without open fields, and logs a line for each that was open.

    Args:
      config: a valid config.
      dataset: of the run.
      partition: its labelled and unlabelled images.
      before: the config, as `to_plain` gives it, of the run in the work directory, which goes on
        with its own values; None where none has begun.

    Raises:
      UserError: a network that there is not, or what another field says of the chosen values.
    """
    if not (left := choose.open_fields(config)):
        return config
    if before is not None:
        for name in left:
            log.info("%s = %s, as the run began with", name, _shown(before[name]))
        return choose.fill(config, before)
    chosen = choose.choose(config, facts(config, dataset, partition))
    for name, (value, reason) in chosen.items():
        log.info("%s = %s, chosen: %s", name, _shown(value), reason)
    config = choose.fill(config, {name: value for name, (value, _) in chosen.items()})
    config_checks.validate(config)
    data.check_crop(config.data, dataset)
    return config


def facts(config: ConfigDict, dataset: data.Dataset, partition: data.Partition) -> choose.Facts:
    """Returns what the choice depends on."""
    train = dataset.sources["train"]
    sizes = np.array([train.label(index).shape for index in train.spread(_SAMPLE)])
    height, width = np.median(sizes, axis=0).astype(int).tolist()
    aux = config.loss.aux_weight > 0
    patch = models.build(config.model, dataset.num_classes, aux_head=aux).patch
    return choose.Facts(
        size=(height, width),
        labeled=len(partition.labeled),
        unlabeled=len(partition.unlabeled),
        multiple=patch if patch > 1 else config.model.output_stride,
    )


def _shown(value: Any) -> str:
    """Returns a value as the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
