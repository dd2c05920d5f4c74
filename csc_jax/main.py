"""Command line: train, evaluate, predict or plan.

python -m csc_jax.main --config=configs/synthetic.py --workdir=runs/synthetic
python -m csc_jax.main --mode=evaluate --workdir=runs/synthetic --checkpoint=best
python -m csc_jax.main --mode=evaluate --workdir=runs/synthetic --save_predictions=DIR
python -m csc_jax.main --mode=predict --workdir=runs/synthetic --images=DIR --out=DIR
python -m csc_jax.main --mode=plan --topology=v5e:4x4 --config=configs/cityscapes.py
    --config.batch.labeled=32 --config.batch.unlabeled=32

docs/scaling.md has the commands for several devices, hosts and processes.
"""

# ruff: noqa: E402 - the garbage collector is set before the imports that it would slow down.

import gc

# Imports and tracing make millions of objects that stay: looking through them for garbage again and
# again took half a second of the imports and 15% of what followed up to the first step
# (docs/scaling.md). What imports this module is a command as well.
gc.set_threshold(100_000, 50, 100)

import difflib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from csc_jax import config as config_lib
from csc_jax import config_checks, distributed, stored_config
from csc_jax.errors import Diverged, Interrupted, UserError
from csc_jax.plan import plan
from csc_jax.predict import predict_folder
from csc_jax.score import load, score
from csc_jax.train import train

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A file of configs/; any field is overridden by --config.section.field=value. Without it, "
    "evaluate, predict and plan take the config of the run in --workdir.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, plots.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate", "predict", "plan"], "What to do.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "latest", "evaluate, predict: latest, best (by mIoU on the val split) or a step."
)
_SAVE_PREDICTIONS = flags.DEFINE_string(
    "save_predictions",
    None,
    "evaluate: folder for a PNG an image: Cityscapes label ids, Pascal VOC palette, or class ids.",
)
_IMAGES = flags.DEFINE_string("images", None, "predict: an image or a folder of images.")
_OUT = flags.DEFINE_string(
    "out", None, "predict: folder for overlays and index PNGs; plan: JSON file of the plan."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "plan: hardware to compile for, such as v5e:4x4 or h100:8."
)
_CLASSES = flags.DEFINE_integer(
    "classes", None, "plan: how many, where the data set does not say.", lower_bound=1
)
_UNLABELED = flags.DEFINE_integer(
    "unlabeled", None, "plan: images of the unlabelled list, likewise.", lower_bound=1
)
_FIT = flags.DEFINE_bool("fit", False, "plan: look for the largest batch, compiling a few times.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "Several processes started by hand: HOST:PORT of process 0. Slurm, Kubernetes, Open MPI and "
    "TPU pods need none of these three.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", lower_bound=0)
_INITIALIZATION_TIMEOUT = flags.DEFINE_integer(
    "initialization_timeout", 300, "Seconds for all processes to come.", lower_bound=1
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout",
    100,
    "Seconds without a sign of life after which a process counts as dead and the others end.",
    lower_bound=2,
)


def main(argv: Sequence[str]) -> int:
    """Runs one command and returns its exit status: 0, or that of the error (`errors.py`)."""
    log_to_terminal()
    exit_status = 0
    try:
        parse(argv)
        dispatch()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        exit_status = error.exit_status
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        exit_status = stopped.exit_status
    except Exception:
        if not distributed.several():
            raise
        traceback.print_exc()
        distributed.abandon()
    return distributed.leave(exit_status)


def log_to_terminal() -> None:
    """Prints the package's messages, and only those, on standard output.

    Of several processes the first prints all, the others their warnings.
    """
    log = logging.getLogger("csc_jax")
    if not log.handlers:
        log.addHandler(logging.StreamHandler(sys.stdout))
    log.setLevel(logging.INFO)
    log.propagate = False  # absl has put a handler of its own on the root
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax tells of every save


def run() -> None:
    """Entry point of the `csc-jax` command."""
    status = main(sys.argv)
    if status in (UserError.exit_status, Diverged.exit_status):
        # After a checkpoint that could not be written, threads of Orbax wait for ten minutes for
        # word of it, and an orderly exit would wait for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def dispatch() -> None:
    """Does what the parsed flags say."""
    try:
        config = _CONFIG.value
        config_checks.validate(config)
    except OSError as error:  # ml-collections keeps a failure to load until the value is asked for
        raise UserError(f"--config cannot be read. {error}") from error
    if _MODE.value == "plan":
        topology = _required(_TOPOLOGY, "hardware to compile for, such as v5e:4x4 or h100:8")
        plan(
            config,
            topology,
            classes=_CLASSES.value,
            unlabeled=_UNLABELED.value,
            fit=_FIT.value,
            out=Path(_OUT.value) if _OUT.value else None,
        )
        return
    workdir = Path(_required(_WORKDIR, "the folder of the run"))
    distributed.join(
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        initialization_timeout=_INITIALIZATION_TIMEOUT.value,
        heartbeat_timeout=_HEARTBEAT_TIMEOUT.value,
    )
    if not distributed.is_first():
        log = logging.getLogger("csc_jax")
        log.setLevel(logging.WARNING)
        for handler in log.handlers:
            handler.setFormatter(logging.Formatter(f"process {jax.process_index()}: %(message)s"))
    if _SAVE_PREDICTIONS.value and _MODE.value != "evaluate":
        raise UserError(
            f"--save_predictions goes with --mode=evaluate, not with --mode={_MODE.value}."
        )
    if config.debug.compilation_cache:
        use_compilation_cache()
    jax.config.update("jax_debug_nans", config.debug.nans)
    if _MODE.value == "train":
        train(config, workdir)
    elif _MODE.value == "evaluate":
        predictions = _SAVE_PREDICTIONS.value
        score(config, workdir, _CHECKPOINT.value, Path(predictions) if predictions else None)
    else:
        if distributed.several():
            raise UserError(
                "--mode=predict runs in one process; start it alone, with --num_processes=1."
            )
        if config.eval.mode == "center_crop":
            raise UserError(
                "--mode=predict wants whole images, but eval.mode is 'center_crop'. Set "
                "--config.eval.mode=whole or sliding."
            )
        images = Path(_required(_IMAGES, "an image or a folder of images"))
        out = Path(_required(_OUT, "the folder to write to"))
        experiment, network, _ = load(config, workdir, _CHECKPOINT.value)
        predict_folder(
            partial(experiment.predict_image, network),
            images,
            out,
            palette=experiment.palette,
            image_size=tuple(config.data.image_size),
        )


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless the environment names another place.

    JAX has XLA keep there as well, fusion by fusion, which kernels were the fastest on a GPU, so
    that a changed program tries those anew alone that it has changed.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "csc_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))


def _required(flag: flags.FlagHolder, what: str) -> str:
    if not flag.value:
        raise UserError(f"--{flag.name} is missing: give {what}.")
    return flag.value


def parse(argv: Sequence[str]) -> None:
    """Parses flags; raises UserError with near misses for what is unknown or of the wrong type."""
    known = config_lib.flatten(config_lib.default_config())
    for argument in argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
        if not name.startswith("config."):
            continue
        field = name.removeprefix("config.").removeprefix("no")
        if field not in known and name.removeprefix("config.") not in known:
            raise UserError(_unknown_field(name.removeprefix("config."), known))
    arguments = list(argv)
    if not any(a.lstrip("-").partition("=")[0] == "config" for a in argv):
        arguments.insert(1, f"--config={_stored_config(argv)}")
    try:
        rest = flags.FLAGS(arguments)
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"{error}. --help lists the flags.") from error
    except flags.Error as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"--config cannot be read. {error}") from error
    except TypeError as error:
        raise UserError(f"A value on the command line has the wrong type: {error}") from error
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is no flag; fields are set as --config.section.field=value.")


def _stored_config(argv: Sequence[str]) -> str:
    """Returns the config file that stands in for a missing --config."""
    given = dict(a.lstrip("-").partition("=")[::2] for a in argv[1:])
    mode = given.get("mode", "train")
    if mode == "train" or (mode == "plan" and not given.get("workdir")):
        raise UserError(
            "--config is missing: give a file of configs/, such as --config=configs/synthetic.py."
        )
    if not given.get("workdir"):
        raise UserError("--workdir is missing: give the folder of the run, as --workdir=DIR.")
    return f"{Path(stored_config.__file__)}:{given['workdir']}"


def _unknown_field(field: str, known: dict[str, object]) -> str:
    sections = {name.rpartition(".")[0] for name in known}
    if field in sections:
        inside = ", ".join(name for name in known if name.startswith(field + "."))
        return f"--config.{field} is a section, not a field; it holds {inside}."
    # A field is found by its own name even where the section is wrong or missing.
    last = field.rpartition(".")[2]
    near = difflib.get_close_matches(field, known, n=3, cutoff=0.75)
    near += [name for name in known if name.rpartition(".")[2] == last and name not in near]
    hint = f" Did you mean {' or '.join('--config.' + name for name in near[:3])}?" if near else ""
    return f"--config.{field} is not a field of the config.{hint} csc_jax/config.py lists them all."


if __name__ == "__main__":
    run()
