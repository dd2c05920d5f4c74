"""metrics.jsonl over crash and resume, TensorBoard's faults, the terminal's line and bar."""

import io
import json
import logging
import struct
import sys
import types

import pytest
from tensorboardX import record_writer
from tensorboardX.proto.event_pb2 import Event

from csc_jax.errors import UserError
from csc_jax.reporting.writers import MetricWriter, Progress, read_metrics


def read_events(workdir):
    """Returns all TensorBoard events of a run, file by file."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        stream = io.BytesIO(path.read_bytes())
        while header := stream.read(12):  # length and its checksum
            events.append(Event.FromString(stream.read(struct.unpack("Q", header[:8])[0])))
            stream.read(4)
    return events


def scalars(workdir):
    return [
        (event.step, value.tag, pytest.approx(value.simple_value))
        for event in read_events(workdir)
        for value in event.summary.value
    ]


def test_records_are_lines_of_json_that_survive_a_crash(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, {"train/loss": 0.5, "train/bank_fill": 0.0})
    writer.write(2, {"train/loss": 0.25})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # not closed yet
    assert json.loads(lines[0]) == {"step": 1, "train/loss": 0.5, "train/bank_fill": 0.0}
    assert read_metrics(tmp_path)[1] == {"step": 2, "train/loss": 0.25}
    assert scalars(tmp_path) == [
        (1, "train/loss", 0.5), (1, "train/bank_fill", 0.0), (2, "train/loss", 0.25),
    ]  # fmt: skip
    writer.__exit__()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_null(tmp_path, value):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"train/loss": value, "train/loss_s": 1.0})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=refuse)
    assert record == {"step": 1, "train/loss": None, "train/loss_s": 1.0}
    assert scalars(tmp_path) == [(1, "train/loss_s", 1.0)]


def test_resuming_drops_later_records_and_a_torn_line(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"train/loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "trai')  # killed while writing
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    with MetricWriter(tmp_path, resume_step=3) as writer:
        writer.write(4, {"train/loss": 40.0})
    assert [(r["step"], r["train/loss"]) for r in read_metrics(tmp_path)] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0),
    ]  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]
    purges = [e.step for e in read_events(tmp_path) if e.HasField("session_log")]
    assert purges == [4]  # TensorBoard hides what it has from this step on


def test_a_new_run_drops_what_a_run_without_checkpoint_left(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"train/loss": 1.0})
    with MetricWriter(tmp_path):
        assert read_metrics(tmp_path) == []


def test_a_folder_without_records_has_none(tmp_path):
    assert read_metrics(tmp_path) == []


def test_training_goes_on_without_a_tensorboard_folder(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("in the way")
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 4):
            writer.write(step, {"train/loss": 1.0})
    assert len(read_metrics(tmp_path)) == 3
    assert caplog.text.count("TensorBoard cannot be written") == 1


def test_training_goes_on_when_tensorboard_fails_midway(tmp_path, caplog, monkeypatch):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"train/loss": 1.0})

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(record_writer.RecordWriter, "flush", full)
        for step in range(2, 40):  # more than any queue would hold
            writer.write(step, {"train/loss": 1.0})
    assert len(read_metrics(tmp_path)) == 39
    assert caplog.text.count("No space left on device") == 1


def test_a_work_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written.*--workdir"):
        MetricWriter(tmp_path / "file")


def test_a_full_disk_names_the_file_of_metrics(tmp_path, monkeypatch):
    class Full(io.StringIO):
        name = "metrics.jsonl"

        def flush(self):
            raise OSError(28, "No space left on device")

    def train_one_step():
        with MetricWriter(tmp_path) as writer:
            writer._file.close()
            monkeypatch.setattr(writer, "_file", Full())
            writer.write(1, {"train/loss": 1.0})

    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written.*No space left"):
        train_one_step()


def test_wandb_gets_finite_values_when_asked_for(tmp_path, monkeypatch):
    logged, finished = [], []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: finished.append(True)
    )
    started = {}

    def init(**arguments):
        started.update(arguments)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with MetricWriter(tmp_path, wandb={"seed": 3}) as writer:
        writer.write(1, {"train/loss": 1.0, "train/loss_c": float("nan")})
    assert logged == [(1, {"train/loss": 1.0})]
    assert finished == [True]
    assert started["config"] == {"seed": 3}


def test_a_missing_wandb_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    with pytest.raises(UserError, match="pip install wandb"):
        MetricWriter(tmp_path, wandb={"seed": 3})


VALUES = {
    "train/loss": 1.2344,
    "train/loss_s": 0.8,
    "train/kept_fraction": 0.5,
    "train/images_per_second": 85.31,
}


def test_plain_lines_show_step_losses_miou_speed_and_time_left(capsys, monkeypatch):
    clock = iter([100.0, 150.0, 160.0])  # start, compiled and 10 steps, 10 steps
    monkeypatch.setattr("csc_jax.reporting.writers.time.perf_counter", lambda: next(clock))
    progress = Progress(total=600, start=100)
    progress.update(110, VALUES)
    progress.evaluated(110, 0.432)
    progress.update(120, VALUES)
    progress.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 110/600  loss 1.234  loss_s 0.800  85.3 images/s  ETA 0:40:50",
        "step 110/600  mIoU 43.20%",
        "step 120/600  loss 1.234  loss_s 0.800  mIoU 43.20%  85.3 images/s  ETA 0:08:00",
    ]


def test_a_terminal_gets_a_bar_and_messages_above_it(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    log = logging.getLogger("csc_jax")
    handlers = list(log.handlers)
    progress = Progress(total=600, start=100)
    progress.evaluated(100, 0.432)
    progress.update(120, VALUES)
    assert log.handlers != handlers  # messages are routed past the bar
    progress.close()
    assert log.handlers == handlers
    last = terminal.getvalue().split("\r")[-1]
    assert "120/600" in last
    assert "loss 1.234" in last
    assert "mIoU 43.20%" in last
    assert "85.3 images/s" in last


def test_a_score_says_of_how_many_classes_it_is(capsys):
    progress = Progress(600)
    progress.evaluated(100, 1.0, occurring="1 of 2 classes")
    progress.evaluated(200, float("nan"), "center_crop", "0 of 2 classes")
    assert capsys.readouterr().out.splitlines() == [
        "step 100/600  mIoU 100.00% (1 of 2 classes)",
        "step 200/600  mIoU (center_crop) - (0 of 2 classes)",
    ]


def test_lines_that_are_no_records_are_left_out(tmp_path):
    lines = ["3", '"a"', "[1]", '{"loss": 1}', '{"step": "x"}', '{"step": 1, "a": 2}', "nan", ""]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_metrics(tmp_path) == [{"step": 1, "a": 2}]
