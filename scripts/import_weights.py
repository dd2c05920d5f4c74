"""Turns PyTorch weights into a work directory, for --mode=evaluate and --mode=predict.

Command:    python scripts/import_weights.py --config=configs/cityscapes.py --config.data.root=DIR
            --weights=FILE --workdir=W [--nostrict]
            python -m csc_jax.main --mode=evaluate --workdir=W
The config describes the network and the data set, as for training: a checkpoint with an auxiliary
head needs --config.loss.aux_weight=0.4, one without a projection head a method without it.
docs/weights.md lists what --weights takes.
"""

import json
import logging
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from csc_jax import command_help, main
from csc_jax import config as config_lib
from csc_jax.errors import UserError
from csc_jax.models.weight_files import locate, read_weights
from csc_jax.models.weights import (
    STUDENT,
    TEACHER,
    convert_torch_state_dict,
    drop_absent_heads,
)
from csc_jax.state import Network
from csc_jax.text import printable
from csc_jax.training.checkpoint import Checkpointer
from csc_jax.training.experiment import build, load_data
from csc_jax.training.loop import describe

log = logging.getLogger("csc_jax")


def run() -> int:
    """Imports; returns the exit status."""
    if command_help.asked(sys.argv):
        print(__doc__)
        return 0
    weights = flags.DEFINE_string(
        "weights", None, "FILE, hf:OWNER/REPO/FILE or pip:NAME.", required=True
    )
    strict = flags.DEFINE_bool("strict", True, "Refuse weights that do not fit the network.")
    flags.mark_flag_as_required("workdir")
    main.log_to_terminal()
    try:
        config = main.parse(sys.argv)
        workdir = Path(flags.FLAGS.workdir)
        import_weights(config, weights.value, workdir, strict=strict.value)
    except UserError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
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
    config = config_lib.resolve(config, steps_per_epoch=1)  # lengths do not matter here
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
    log.info("%s is in %s; score it with --mode=evaluate --workdir=%s", path, workdir, workdir)


if __name__ == "__main__":
    sys.exit(run())
