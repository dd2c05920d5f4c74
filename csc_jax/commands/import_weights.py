"""Turns PyTorch weights into a work directory, for evaluate and predict.

Command:    csc-jax import-weights --config=cityscapes --config.data.root=DIR
                --weights=FILE --workdir=W [--nostrict]
            csc-jax evaluate --workdir=W
The config describes the network and the data set, as for training: a
checkpoint with an auxiliary head needs --config.loss.aux_weight=0.4, one
without a projection head a method without it. docs/weights.md lists what
--weights takes.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from csc_jax import command_line, data
from csc_jax import config as config_lib
from csc_jax.config import bands
from csc_jax.errors import UserError
from csc_jax.models.weight_files import locate, read_weights
from csc_jax.models.weights import (
    STUDENT,
    TEACHER,
    convert_torch_state_dict,
    drop_absent_heads,
)
from csc_jax.state import Network
from csc_jax.training.checkpoint import Checkpointer
from csc_jax.training.choice import fill_open
from csc_jax.training.experiment import build, load_data
from csc_jax.training.loop import describe

log = logging.getLogger("csc_jax")


def main(arguments: Sequence[str]) -> int:
    """Imports; returns 0."""
    parser = argparse.ArgumentParser(
        prog="csc-jax import-weights",
        usage="%(prog)s --config=C --weights=FILE --workdir=W [--nostrict]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--weights", required=True, help="FILE, hf:OWNER/REPO/FILE or pip:NAME")
    parser.add_argument("--workdir", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--nostrict", action="store_true", help="take weights that do not fit the network"
    )
    options, of_config = parser.parse_known_args(arguments)
    config = command_line.parse(["csc-jax", *of_config])
    import_weights(config, options.weights, options.workdir, strict=not options.nostrict)
    return 0


def import_weights(config: ConfigDict, source: str, workdir: Path, *, strict: bool = True) -> None:
    """Writes a checkpoint of step 0 that holds the weights, and its config.

    Student and teacher get those under their own names in the file, or both the same.

    Args:
      config: a valid config.
      source: what `model.pretrained` takes, other than "none".
      workdir: a folder without checkpoints.
      strict: see `convert_torch_state_dict`.

    Raises:
      UserError: a file, a config or a folder that cannot be used.
    """
    path = locate(source)
    if (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} already holds checkpoints; give --workdir a new folder.")
    dataset = load_data(config)
    partition = data.partition(config.data, dataset, config.seed)
    config = fill_open(config, dataset, partition, before=None)
    config = config_lib.resolve(config, steps_per_epoch=1)  # lengths do not matter here
    config = bands.with_measured(config, dataset.pixels)
    experiment = build(config, dataset.class_names, dataset.palette)
    state = experiment.compile_init()()

    def load(network: Network, keys: tuple[str, ...]) -> Network:
        weights = drop_absent_heads(read_weights(path, keys), network.variables)
        variables = convert_torch_state_dict(weights, network.variables, strict)
        return Network(variables["params"], variables.get("batch_stats", {}))

    state = state.replace(
        student=load(state.student, STUDENT), teacher=load(state.teacher, TEACHER)
    )
    about = describe(experiment)
    with Checkpointer(workdir) as checkpointer:
        checkpointer.save(0, state, loop={}, run=about, miou=None)
    (workdir / "config.json").write_text(json.dumps(about["config"], indent=1) + "\n")
    log.info("%s is in %s; score it with csc-jax evaluate --workdir=%s", path, workdir, workdir)
