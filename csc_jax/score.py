"""`--mode=evaluate`: scores a checkpoint on a split."""

import json
import logging
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from csc_jax import config as config_lib
from csc_jax import data
from csc_jax.checkpoint import Checkpointer
from csc_jax.errors import UserError
from csc_jax.evaluation import Scores
from csc_jax.experiment import Experiment, build
from csc_jax.state import Network, TrainState

log = logging.getLogger("csc_jax")


def score(config: ConfigDict, workdir: Path, checkpoint: str) -> Scores:
    """Scores `config.eval.network` on `config.eval.split`, prints the table and writes it as JSON.

    Args:
      config: of the run; `config.eval` says what is scored, and how.
      workdir: of the run.
      checkpoint: latest | best | a step.

    Raises:
      UserError: no such checkpoint, or one of another class count, model or method.
    """
    experiment, network, step = load(config, workdir, checkpoint)
    config = experiment.config
    dataset = data.load(config.data)
    if dataset.class_names != experiment.class_names:
        raise UserError(
            f"The checkpoint in {workdir} knows {len(experiment.class_names)} classes "
            f"({_some(experiment.class_names)}), the data set {dataset.name} has "
            f"{len(dataset.class_names)} ({_some(dataset.class_names)}). Evaluate it on the data "
            "it was trained for (--config.data.name, --config.data.root)."
        )
    scores = experiment.evaluate(network, dataset.source(config.eval.split))
    title = f"{config.eval.network} at step {step} on {config.eval.split} of {dataset.name}"
    log.info("%s (%s):\n%s", title, config.eval.mode, scores.table(dataset.class_names))
    out = workdir / f"scores_{config.eval.network}_{config.eval.split}_{step}.json"
    out.write_text(json.dumps(scores.as_dict(dataset.class_names), indent=1) + "\n")
    log.info("written to %s", out)
    return scores


def load(config: ConfigDict, workdir: Path, checkpoint: str) -> tuple[Experiment, Network, int]:
    """Restores the network that `config.eval.network` names, with its experiment and its step."""
    experiment, state = restore(config, workdir, checkpoint)
    return experiment, getattr(state, config.eval.network), int(state.step)


def restore(config: ConfigDict, workdir: Path, checkpoint: str) -> tuple[Experiment, TrainState]:
    """Restores a whole state, with its experiment."""
    config_lib.validate(config)
    config = config_lib.resolve(config, steps_per_epoch=1)  # lengths do not matter here
    with Checkpointer(workdir, read_only=True) as checkpointer:
        run = checkpointer.describe(checkpoint)
        palette = np.asarray(run["palette"], np.uint8)
        experiment = build(config, tuple(run["class_names"]), palette)
        restored = checkpointer.restore(experiment.abstract_state(), checkpoint)
    assert restored is not None  # `describe` has found it
    return experiment, restored.state


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
