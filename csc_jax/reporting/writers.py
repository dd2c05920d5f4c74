"""Where metrics go: `metrics.jsonl`, TensorBoard, optionally Weights & Biases, and the terminal."""

import contextlib
import importlib
import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from csc_jax.errors import UserError

log = logging.getLogger("csc_jax")

_SHOWN = ("loss", "loss_s", "loss_u", "loss_c")  # on the progress line, where they exist


class MetricWriter:
    """Appends records to a run; a context manager.

    One JSON object a line: {"step": …, "train/loss": …}; a value that is not finite is null.
    """

    def __init__(
        self, workdir: Path, resume_step: int = 0, *, wandb: Mapping[str, Any] | None = None
    ):
        """Opens the files of a run, dropping records later than `resume_step`.

        A run that was killed wrote records after its last checkpoint; they will come again.
        `wandb` is the config to log there too, None = do not.

        Raises:
          UserError: the work directory cannot be written, or wandb is asked for but not installed.
        """
        self._wandb = None if wandb is None else _start_wandb(workdir, wandb)
        path = metrics_path(workdir)
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            kept = [record for record in read_metrics(workdir) if record["step"] <= resume_step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
            temporary.replace(path)  # a crash leaves the old file or the new one
            self._file = path.open("a")
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error}. Choose another --workdir."
            ) from error
        self._tensorboard: _TensorBoard | None = None
        try:
            self._tensorboard = _TensorBoard(workdir / "tensorboard", resume_step)
        except OSError as error:
            self._give_up_tensorboard(error)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        # Every record has been flushed; what a full disk refused is refused again here.
        with contextlib.suppress(OSError):
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records values at a step.

        Raises:
          UserError: metrics.jsonl cannot be written, as on a full disk.
        """
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        record = {"step": step} | {name: finite.get(name) for name in values}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()  # what is written survives a crash
        except OSError as error:
            raise UserError(
                f"{self._file.name} cannot be written: {error}. Make room, then give the same "
                "command again; it continues from the last checkpoint."
            ) from error
        if self._wandb:
            self._wandb.log(finite, step=step)
        if self._tensorboard:
            try:
                self._tensorboard.write(step, finite)
            except OSError as error:
                self._give_up_tensorboard(error)

    def _give_up_tensorboard(self, error: OSError) -> None:
        log.warning("TensorBoard cannot be written (%s); training goes on without it", error)
        if self._tensorboard:
            self._tensorboard.close()
        self._tensorboard = None


class _TensorBoard:
    """Scalars in TensorBoard's event file, written in the caller's thread.

    tensorboardX's own SummaryWriter hands them to a thread through a short queue; once a full
    disk has ended that thread, the training loop would wait on the queue for ever.
    """

    def __init__(self, folder: Path, resume_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads in order of names, and the clock may have jumped back.
        earlier = (path.suffix[1:] for path in folder.iterdir())
        now = max([time.time_ns(), *(int(stamp) + 1 for stamp in earlier if stamp.isdigit())])
        self._records = RecordWriter(str(folder / f"events.out.tfevents.{now:020d}"))
        self._write(Event(file_version="brain.Event:2"))
        if resume_step:  # hides what a killed run logged past its last checkpoint
            start = SessionLog(status=SessionLog.START)
            self._write(Event(step=resume_step + 1, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=scalars)))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._records.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()


def metrics_path(workdir: Path) -> Path:
    """Returns the file of a run's records."""
    return workdir / "metrics.jsonl"


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the records of a run in the order written, without lines that a crash tore."""
    path = metrics_path(workdir)
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def bank_was_ready(record: Mapping[str, Any]) -> bool:
    """Whether the memory bank held every class in all steps of a record.

    Before that, Separ and the verdicts of the gates mean nothing. A record that does not say so, as
    those of a method without bank, counts as one that does.
    """
    return bool(record.get("train/ready", 1.0) == 1.0)


class Progress:
    """The terminal's view of a run: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, total: int, start: int = 0):
        """Starts at `start` of `total` steps."""
        self._total, self._start = total, start
        self._since = time.perf_counter()
        self._compiled = False
        self._miou = ""
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)
            self._above_the_bar = contextlib.ExitStack()  # messages, which would break it up
            self._above_the_bar.enter_context(logging_redirect_tqdm([log]))

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the averages up to `step`: keys as `train/loss`, `train/images_per_second`."""
        losses = "  ".join(
            f"{name} {values[f'train/{name}']:.3f}" for name in _SHOWN if f"train/{name}" in values
        )
        rate = f"{values['train/images_per_second']:.1f} images/s"
        text = "  ".join(part for part in (losses, self._miou, rate) if part)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.perf_counter()
        per_step = (now - self._since) / max(step - self._start, 1)
        seconds = round(per_step * (self._total - step))
        eta = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        print(f"step {step}/{self._total}  {text}  ETA {eta}", flush=True)
        if not self._compiled:  # the first steps took the compilation with them; forget their time
            self._start, self._since, self._compiled = step, now, True

    def evaluated(self, step: int, miou: float, note: str = "", occurring: str = "") -> None:
        """Shows a new score, in [0, 1], and keeps it on the line.

        Args:
          step: of the score.
          miou: the score; nan if nothing could be scored.
          note: stands beside its name.
          occurring: stands behind it: "1 of 2 classes" where the mean is over so many.
        """
        score = "-" if math.isnan(miou) else f"{100 * miou:.2f}%"
        after = f" ({occurring})" if occurring else ""
        self._miou = f"mIoU{f' ({note})' if note else ''} {score}{after}"
        if self._bar is None:
            print(f"step {step}/{self._total}  {self._miou}", flush=True)

    def close(self) -> None:
        """Ends the line."""
        if self._bar is not None:
            self._bar.close()
            self._above_the_bar.close()


def _start_wandb(workdir: Path, config: Mapping[str, Any]) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            "wandb is true, but the package wandb is not installed. Run `pip install wandb`, or "
            "leave --config.wandb out."
        ) from error
    return wandb.init(project="csc_jax", name=workdir.name, dir=workdir, config=dict(config))
