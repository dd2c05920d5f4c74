"""Checkpoints: state, data iterator and resolved config, in one Orbax directory per step.

Orbax writes into a temporary directory and renames it when complete, so a crash leaves nothing that
a restart would take for a checkpoint.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import re
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from csc_jax.errors import UserError
from csc_jax.state import TrainState

log = logging.getLogger("csc_jax")


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint holds."""

    state: TrainState
    loop: dict[str, Any]  # what the host loop needs to go on, as JSON holds it
    probe: np.ndarray | None  # the probe's features, see `save`
    run: dict[str, Any]  # what the run says of itself (`train.describe`)


class Checkpointer:
    """Saves asynchronously; keeps the newest `keep` checkpoints and the best one by mIoU.

    A context manager: leaving it waits for writes under way, also where the run fails.
    """

    def __init__(self, workdir: Path, keep: int = 2, *, read_only: bool = False):
        self._read_only = read_only
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._saving: Future | None = None
        self._checked = read_only  # whether one of this process's checkpoints has been read back
        directory = Path(workdir).absolute() / "checkpoints"
        self.directory = directory
        policy = AnyPreservationPolicy(
            [
                LatestN(keep),
                BestN(
                    get_metric_fn=lambda metrics: metrics["miou"],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        _ignore_abandoned_work()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else policy,
            best_fn=lambda metrics: metrics["miou"],
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        try:
            if read_only and not directory.is_dir():
                raise UserError(
                    f"{directory} does not exist: the work directory holds no checkpoint. Give the "
                    "--workdir of a training run."
                )
            if not read_only:  # or it would show only at the first save
                directory.mkdir(parents=True, exist_ok=True)
                _try_to_write(directory)
            self._manager = ocp.CheckpointManager(
                self._plain_name(directory),
                options=options,
                # Named here so that a new process can read shapes without having saved first.
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "loop": ocp.JsonCheckpointHandler(),
                    "probe": ocp.ArrayCheckpointHandler(),
                    "run": ocp.JsonCheckpointHandler(),
                },
            )
        except OSError as error:
            use = "read from" if read_only else "kept in"
            raise UserError(
                f"Checkpoints cannot be {use} {directory}: {error}. Choose a --workdir that can "
                f"be {'read' if read_only else 'written to'}."
            ) from error

    def _plain_name(self, directory: Path) -> Path:
        """Returns a path for Orbax, which takes the characters of a pattern for a pattern.

        Where the path has such characters it is a link to the directory, for as long as this lives.

        Raises:
          UserError: there is no place for such a link.
        """
        if not _PATTERN.search(str(directory)):
            return directory
        place = Path(tempfile.gettempdir())
        if jax.process_count() > 1 or _PATTERN.search(str(place)):
            raise UserError(
                f"The path of the checkpoints, {directory}, has one of the characters [ ] * ? \\, "
                "which the library that writes them takes for a pattern. Choose another --workdir."
            )
        folder = tempfile.mkdtemp(prefix="csc_jax_", dir=place)
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        link = Path(folder) / "checkpoints"
        link.symlink_to(directory, target_is_directory=True)
        return link

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: TrainState,
        loop: dict[str, Any],
        run: dict[str, Any],
        miou: float | None,
        probe: jax.Array | np.ndarray | None = None,
    ) -> None:
        """Starts writing; returns once the arrays are copied to the host.

        Args:
          step: optimizer steps done.
          state: the state after them.
          loop: of the host loop, as JSON holds it: the data iterator before the next batch is
            drawn, and metrics not yet averaged.
          run: what the run is, as JSON holds it (`train.describe`).
          miou: of this very state, in [0, 1], by which the best one is kept; None where it was
            not evaluated.
          probe: features that the next value of Cons is to be compared with, if there are any that
            a restart could not compute from the state.

        Raises:
          UserError: it cannot be written, or the one before could not.
        """
        if jax.process_count() == 1:
            # A copy, as the next step overwrites the buffers. Orbax makes one itself, but only
            # after ten times as long in Python (`benchmark.py health`), which a thread can take.
            # Several processes wait for each other in there, which threads must not.
            state = jax.tree.map(np.array, jax.device_get(state))
        items = {
            "state": ocp.args.StandardSave(state),
            "loop": ocp.args.JsonSave(copy.deepcopy(loop)),
            "run": ocp.args.JsonSave(run),
        }
        if probe is not None:
            items["probe"] = ocp.args.ArraySave(probe)
        arguments = ocp.args.Composite(**items)
        metrics = None if miou is None else {"miou": miou}
        with self._explained():
            self._join()
            # Orbax would leave threads behind that hold up the end of the process for 5 minutes.
            _try_to_write(self.directory)
            if jax.process_count() == 1:
                self._saving = self._thread.submit(
                    self._manager.save, step, args=arguments, metrics=metrics
                )
            else:
                self._manager.save(step, args=arguments, metrics=metrics)
        if not self._checked:
            self.wait()
            self._read_back(step, state, run)
            self._checked = True

    def _read_back(self, step: int, state: TrainState, run: dict[str, Any]) -> None:
        """Reads what a checkpoint says it holds, as a new process would.

        Raises:
          UserError: it cannot be read, or says something else.
        """
        try:
            with Checkpointer(self.directory.parent, read_only=True) as reader:
                reader._check_shapes(step, state)
                same = reader.describe(str(step)) == json.loads(json.dumps(run))
        except Exception as error:  # whatever a restart would meet
            raise UserError(
                f"The checkpoint {self.directory / str(step)} was written, but cannot be read back "
                f"({_brief(error)}). Choose a --workdir on another disk."
            ) from error
        if not same:
            raise UserError(
                f"The checkpoint {self.directory / str(step)} was written, but holds something "
                "else now. Choose a --workdir on another disk."
            )

    def restore(
        self,
        like: TrainState,
        which: str = "latest",
        check: Callable[[dict[str, Any]], None] = lambda run: None,
    ) -> Restored | None:
        """Returns a checkpoint, or None where there is none yet.

        A damaged checkpoint is put aside, with a warning, for the newest one before it.

        Args:
          like: a state of the shapes, dtypes and shardings to restore to; ShapeDtypeStructs do.
          which: "latest", "best" or the number of a step.
          check: raises UserError for what a checkpoint says of itself, before it is read.

        Raises:
          UserError: no such step, the checkpoint holds arrays of other shapes, or all are damaged.
        """
        step = self._step(which)
        if step is None:
            return None
        candidates = [step]
        if which == "latest":
            candidates = sorted(self._manager.all_steps(), reverse=True)
        for step in candidates:
            try:
                return self._restore(step, like, check)
            except UserError:
                raise
            # Orbax, TensorStore and the JSON reader each have exceptions of their own.
            except Exception as error:
                log.warning("The checkpoint of step %d cannot be read (%s)", step, _brief(error))
                if not self._read_only:
                    self._put_aside(step)
        raise UserError(
            f"No checkpoint in {self.directory} can be read. Restore the folder from a copy, or "
            "choose another --workdir to start anew."
        )

    def _put_aside(self, step: int) -> None:
        damaged = self.directory.parent / "damaged_checkpoints"
        damaged.mkdir(exist_ok=True)
        shutil.move(self.directory / str(step), damaged / f"{step}_{time.time_ns()}")
        self._manager.reload()
        log.warning("It lies in %s now; the run goes on from the one before", damaged)

    def _restore(
        self, step: int, like: TrainState, check: Callable[[dict[str, Any]], None]
    ) -> Restored:
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))
        check(run["run"])
        self._check_shapes(step, like)
        items = {"state": ocp.args.StandardRestore(like), "loop": ocp.args.JsonRestore()}
        if (self.directory / str(step) / "probe").is_dir():
            # On the host: it was written from devices that may not be there any more.
            on_host = ocp.RestoreArgs(restore_type=np.ndarray)
            items["probe"] = ocp.args.ArrayRestore(restore_args=on_host)
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        probe = restored["probe"] if "probe" in items else None
        return Restored(restored["state"], restored["loop"], probe, run["run"])

    def describe(self, which: str = "latest") -> dict[str, Any]:
        """Returns what the run says of itself in a checkpoint (`train.describe`).

        Raises:
          UserError: there is no such checkpoint.
        """
        step = self._step(which)
        if step is None:
            raise UserError(f"{self.directory} holds no complete checkpoint.")
        arguments = ocp.args.Composite(run=ocp.args.JsonRestore())
        return self._manager.restore(step, args=arguments)["run"]

    def describe_newest(self) -> dict[str, Any] | None:
        """Returns what the newest checkpoint that can be read says of itself; None if none can."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            # As in `restore`, which then puts a damaged one aside.
            with contextlib.suppress(Exception):
                return self.describe(str(step))
        return None

    def latest_step(self, which: str = "latest") -> int | None:
        """Returns the step of a checkpoint, `which` as in `restore`; None where there is none."""
        return self._step(which)

    def delete(self, step: int) -> None:
        """Removes a checkpoint, to be saved anew."""
        self._join()
        self._manager.delete(step)

    def wait(self) -> None:
        """Returns when the writes under way are done; UserError where one failed."""
        with self._explained():
            self._join()
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for writes under way; UserError where one failed."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._manager.close()

    def _join(self) -> None:
        """Returns when the thread has given the last checkpoint to Orbax; raises what it raised."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns a failure to write into a UserError that says what is left."""
        try:
            yield
        # TensorStore reports a full disk as ValueError.
        except (OSError, ValueError, RuntimeError) as error:
            self._manager.reload()
            whole = self._manager.all_steps()
            left = f"from step {max(whole)}, the last whole one" if whole else "from the start"
            raise UserError(
                f"A checkpoint in {self.directory} cannot be written: {_brief(error)}. Make "
                "room or grant access there, then give the same command again; it continues "
                f"{left}."
            ) from error

    def _step(self, which: str) -> int | None:
        if which == "latest":
            return self._manager.latest_step()
        if which == "best":
            return self._manager.best_step()
        steps = self._manager.all_steps()
        if not which.isdigit() or int(which) not in steps:
            raise UserError(
                f"--checkpoint={which} is not in {self.directory}. It takes latest, best or one "
                f"of the steps {', '.join(map(str, sorted(steps)))}."
            )
        return int(which)

    def _check_shapes(self, step: int, like: TrainState) -> None:
        """Raises UserError that names the first arrays in which checkpoint and `like` differ."""
        saved = self._manager.item_metadata(step)["state"].tree
        saved_shapes = _shapes(saved)
        wanted_shapes = _shapes(like)
        differences = [
            f"{name}: {saved_shapes.get(name, 'absent')} in the checkpoint, "
            f"{wanted_shapes.get(name, 'absent')} in this config"
            for name in sorted(saved_shapes.keys() | wanted_shapes.keys())
            if saved_shapes.get(name) != wanted_shapes.get(name)
        ]
        if differences:
            more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise UserError(
                f"The checkpoint {self.directory / str(step)} does not fit this config (another "
                f"class count, model, method or bank?): {'; '.join(differences[:3])}{more}. Use "
                "the config of that run or another --workdir."
            )


_PATTERN = re.compile(r"[\[\]*?\\]")


def _try_to_write(directory: Path) -> None:
    with tempfile.TemporaryFile(dir=directory):
        pass


@functools.cache
def _ignore_abandoned_work() -> None:
    """Has Python keep quiet, from now on, about arrays that Orbax no longer waits for.

    It gives up at the first array that cannot be read or written. TensorStore then tells a closed
    event loop about each of the hundreds of others, and each would print a traceback.
    """
    before = sys.unraisablehook

    def report(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            before(unraisable)

    sys.unraisablehook = report


def _brief(error: Exception) -> str:
    """Both ends of the first line: TensorStore has the reason behind long paths.

    What it appends to the reason, such as " [tensorstore_spec='{…}']", is left out.
    """
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    line = re.split(r" \[\w+='", line, maxsplit=1)[0]
    return line if len(line) <= 300 else f"{line[:150]} … {line[-150:]}"


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by path; a state's paths are those of the plain tree that Orbax makes of it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }
