"""Command line: a mode, such as train or evaluate, or one of `commands`.

csc-jax train --config=synthetic --workdir=runs/synthetic
csc-jax evaluate --workdir=runs/synthetic --checkpoint=best
csc-jax evaluate --workdir=runs/synthetic --save_predictions=DIR
csc-jax report --workdir=runs/synthetic --compare=runs/other
csc-jax predict --workdir=runs/synthetic --images=DIR --out=DIR
csc-jax label --workdir=runs/synthetic
csc-jax export --workdir=runs/synthetic --format=bundle --out=DIR
csc-jax plan --topology=v5e:4x4 --config=cityscapes
    --config.batch.labeled=32 --config.batch.unlabeled=32

`csc-jax` is `python -m csc_jax.main`. --mode=NAME is the same as NAME; without, the mode is train.
docs/scaling.md has the commands for several devices, hosts and processes.
"""

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from csc_jax import command_help, command_line, commands, output, stored_config
from csc_jax import config as config_lib
from csc_jax.config import choose
from csc_jax.errors import Diverged, Interrupted, UserError
from csc_jax.text import printable

# What imports JAX, which takes a second, is imported where a run begins: help and errors of the
# command line come at once.


def main(argv: Sequence[str]) -> int:
    """Runs one command and returns its exit status: 0, or that of the error (`errors.py`)."""
    log_to_terminal()
    try:
        if len(argv) < 2:
            print(command_help.screen(), file=sys.stderr)
            return UserError.exit_status
        if argv[1] == "help":  # as of other programs
            argv = [argv[0], *argv[2:], "--help"]
        if argv[1] in commands.NAMES:
            return commands.run(argv[1], argv[2:])
        argv = command_line.with_mode(argv)
        if question := command_help.asked(argv):
            print(command_line.answer(question, argv))
            return 0
        config = command_line.parse(argv)
        command_line.check_required()
    except UserError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return error.exit_status
    from csc_jax.parallel import distributed

    exit_status = 0
    try:
        dispatch(config)
    except UserError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        exit_status = error.exit_status
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        exit_status = stopped.exit_status
    except Exception as error:
        if not distributed.several():
            if not isinstance(error, OSError) or not isinstance(error.filename, str):
                raise
            # A file of the user's that nothing nearer to it has explained.
            print(f"error: {_unusable(error)}", file=sys.stderr)
            return UserError.exit_status
        traceback.print_exc()
        distributed.abandon()
    return distributed.leave(exit_status)


def log_to_terminal() -> None:
    """Prints the package's messages, and only those, on standard output.

    Of several processes the first prints all, the others their warnings.
    """
    output.outlive_readers()
    log = logging.getLogger("csc_jax")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(output.Formatter())
        log.addHandler(handler)
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


def dispatch(config: ConfigDict) -> None:
    """Does what the parsed flags say."""
    import jax

    from csc_jax import compilation_cache
    from csc_jax.evaluation.predict import Extras
    from csc_jax.evaluation.score import score
    from csc_jax.parallel import distributed
    from csc_jax.planning.plan import plan
    from csc_jax.reporting.report import report
    from csc_jax.training.loop import train

    given = flags.FLAGS
    mode = given.mode
    if mode == "plan":
        plan(
            config,
            given.topology,
            classes=given.classes,
            unlabeled=given.unlabeled,
            fit=given.fit,
            out=Path(given.out) if given.out else None,
        )
        return
    workdir = Path(given.workdir)
    if mode != "train" and choose.open_fields(config):  # as the run has them
        stored = stored_config.get_config(str(workdir))
        config = choose.fill(config, config_lib.flatten(stored))
    distributed.join(
        given.coordinator,
        given.num_processes,
        given.process_id,
        initialization_timeout=given.initialization_timeout,
        heartbeat_timeout=given.heartbeat_timeout,
    )
    if not distributed.is_first():
        log = logging.getLogger("csc_jax")
        log.setLevel(logging.WARNING)
        for handler in log.handlers:
            handler.setFormatter(output.Formatter(f"process {jax.process_index()}: %(message)s"))
    if config.debug.compilation_cache:
        compilation_cache.use()
    jax.config.update("jax_debug_nans", config.debug.nans)
    if mode == "train":
        train(config, workdir)
    elif mode == "evaluate":
        predictions = given.save_predictions
        score(
            config,
            workdir,
            given.checkpoint,
            Path(predictions) if predictions else None,
        )
    elif distributed.several():
        raise UserError(
            f"--mode={mode} runs in one process; start it alone, with --num_processes=1."
        )
    elif mode == "report":
        report(
            config,
            workdir,
            given.checkpoint,
            [Path(other) for other in given.compare],
        )
    elif mode == "label":
        from csc_jax.deploy.label import label

        out = Path(given.out) if given.out else None
        label(
            config,
            workdir,
            given.checkpoint,
            out,
            polygons=given.polygons,
        )
    elif mode == "export":
        from csc_jax.deploy.export import export

        export(
            config,
            workdir,
            given.checkpoint,
            file_format=given.format,
            out=Path(given.out),
            size=_size(given.size),
            push=given.push,
        )
    else:
        if config.eval.mode == "center_crop":
            raise UserError(
                "--mode=predict wants whole images, but eval.mode is 'center_crop'. Set "
                "--config.eval.mode=whole or sliding."
            )
        from csc_jax.deploy.predict_files import predict_files

        predict_files(
            config,
            workdir,
            given.checkpoint,
            Path(given.images),
            Path(given.out),
            extras=Extras(given.confidence, given.soft, given.polygons),
            tile=given.tile,
        )


def _unusable(error: OSError) -> str:
    """Returns what is said of a file that cannot be read or written."""
    return printable(
        f"{error.filename}: {error.strerror}. Grant access to it, or make room, then "
        "give the same command again."
    )


def _size(given: str | None) -> tuple[int, int] | None:
    """Returns what --size gives."""
    if given is None:
        return None
    sides = given.split(",")
    if len(sides) != 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise UserError(f"--size is {given!r}; it takes height and width, as in 512,1024.")
    return int(sides[0]), int(sides[1])


if __name__ == "__main__":
    run()
