"""What the host loop says of each step's metrics."""

import io
import json
import logging
import sys

import jax.numpy as jnp
import pytest

from csc_jax.config import default_config
from csc_jax.errors import Diverged
from csc_jax.reporting.recorder import open_recorder

NAN = float("nan")
IMAGES = {"labelled": ["a"], "unlabelled": ["b"]}
EPOCH = 10  # steps


def config(log_every=4, max_rejected=3):
    config = default_config()
    config.train.log_every, config.train.max_rejected = log_every, max_rejected
    config.train.steps = 600
    return config


def feed(recorder, steps, **metrics):
    """Adds steps with these metrics; a list has one value a step."""
    for i, step in enumerate(steps):
        values = {"loss": 1.0, "gradient_norm": 2.0, "learning_rate": 0.1, "rejected": 0.0}
        values |= {k: v[i] if isinstance(v, list) else v for k, v in metrics.items()}
        recorder.add(step, {k: jnp.float32(v) for k, v in values.items()}, IMAGES)


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("accepted", "warns"), [(0, True), (1, False)])
def test_a_gate_that_accepts_less_than_a_tenth_of_an_epoch_is_reported(
    tmp_path, caplog, accepted, warns
):
    """decisions.md 4."""
    with open_recorder(config(), tmp_path, 0, EPOCH) as recorder:
        feed(
            recorder,
            range(1, EPOCH + 1),
            enqueue_accepted=[1.0] * accepted + [0.0] * (10 - accepted),
        )
        assert "frozen" not in caplog.text  # not before the epoch is over
        recorder.flush()
    assert ("step 10: the enqueue gate accepted 0 of 10 updates" in caplog.text) == warns
    assert ("frozen" in caplog.text) == warns


def test_the_gate_is_judged_anew_in_every_epoch(tmp_path, caplog):
    with open_recorder(config(), tmp_path, 0, EPOCH) as recorder:
        feed(recorder, range(1, 11), enqueue_accepted=1.0)
        feed(recorder, range(11, 21), enqueue_accepted=0.0)
        recorder.flush()
    assert caplog.text.count("frozen") == 1
    assert "step 20: the enqueue gate accepted 0 of 10 updates" in caplog.text


def test_steps_in_which_nothing_was_asked_are_not_counted(tmp_path, caplog):
    """The gate waits until every class is in the bank (decisions.md 11): NaN until then."""
    with open_recorder(config(), tmp_path, 0, EPOCH) as recorder:
        feed(recorder, range(1, 11), enqueue_accepted=NAN)
        feed(recorder, range(11, 21), enqueue_accepted=[NAN] * 9 + [1.0])
        feed(recorder, range(21, 31), enqueue_accepted=[NAN] * 6 + [0.0] * 4)
        recorder.flush()
    assert caplog.text.count("frozen") == 1
    assert "step 30: the enqueue gate accepted 0 of 4 updates" in caplog.text


def test_an_interrupted_epoch_is_judged_as_a_whole(tmp_path, caplog):
    with open_recorder(config(), tmp_path, 0, EPOCH) as recorder:
        feed(recorder, range(1, 6), enqueue_accepted=[1.0, 1.0, 0.0, 0.0, 0.0], ready=0.0)
        recorder.flush()
        kept = json.loads(json.dumps(recorder.state()))  # as a checkpoint holds it
    with open_recorder(config(), tmp_path, 5, EPOCH) as recorder:
        recorder.resume(kept)
        feed(recorder, range(6, 11), enqueue_accepted=0.0, ready=0.0)
        recorder.flush()
    assert "frozen" not in caplog.text


def test_it_is_said_once_when_the_bank_became_ready(tmp_path, caplog):
    """decisions.md 11."""
    caplog.set_level(logging.INFO, "csc_jax")
    with open_recorder(config(), tmp_path, 0, EPOCH) as recorder:
        feed(recorder, range(1, 5), ready=[0.0, 0.0, 1.0, 1.0])
        recorder.flush()
        kept = recorder.state()
    with open_recorder(config(), tmp_path, 4, EPOCH) as recorder:
        recorder.resume(kept)
        feed(recorder, range(5, 7), ready=1.0)
        recorder.flush()
    assert caplog.text.count("every class is in the memory bank") == 1
    assert "step 3: every class is in the memory bank" in caplog.text


def test_records_are_means_over_the_steps_in_which_a_metric_was_defined(tmp_path):
    with open_recorder(config(log_every=4), tmp_path, 0, EPOCH) as recorder:
        feed(
            recorder, range(1, 9), loss=[1, 2, 3, 6, 1, 1, 1, 1], separ=[NAN, 4, NAN, 5] + [NAN] * 4
        )
        assert len(records(tmp_path)) == 1  # of step 8 nothing has been fetched yet
        recorder.flush()
    first, second = records(tmp_path)
    assert (first["step"], first["train/loss"], first["train/separ"]) == (4, 3.0, 4.5)
    assert (second["step"], second["train/loss"], second["train/separ"]) == (8, 1.0, None)


def test_a_window_goes_on_after_a_restart(tmp_path):
    with open_recorder(config(log_every=4), tmp_path, 0, EPOCH) as recorder:
        feed(recorder, [1, 2], loss=[1, 2])
        recorder.flush()
        kept = json.loads(json.dumps(recorder.state()))
    with open_recorder(config(log_every=4), tmp_path, 2, EPOCH) as recorder:
        recorder.resume(kept)
        feed(recorder, [3, 4], loss=[3, 6])
        recorder.flush()
    assert [record["train/loss"] for record in records(tmp_path)] == [3.0]


def test_too_many_rejected_steps_in_a_row_end_the_run(tmp_path, caplog):
    with open_recorder(config(max_rejected=3), tmp_path, 0, EPOCH) as recorder:
        feed(recorder, [1, 2], gradient_norm=[5.0, 4.0])
        feed(recorder, [3, 4, 5], rejected=[1.0, 2.0, 3.0], loss=NAN, gradient_norm=NAN)
        assert "step 4 is not finite and was left out (labelled images: a; " in caplog.text
        with pytest.raises(Diverged) as raised:
            recorder.flush()
    message = str(raised.value)
    assert "Step 5: loss is not finite, as in the 3 steps up to it" in message
    assert "the largest before 5 at step 1" in message
    assert "optimizer.clip_norm" in message


def test_whatever_ends_a_run_the_terminal_is_left_in_order(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    log = logging.getLogger("csc_jax")
    handlers = list(log.handlers)

    def fail():
        with open_recorder(config(), tmp_path, 0, EPOCH) as recorder:
            recorder.write(1, {"train/loss": 1.0})
            assert log.handlers != handlers  # messages are routed past the bar
            raise RuntimeError("as a step may")

    with pytest.raises(RuntimeError, match="as a step may") as raised:
        fail()
    assert log.handlers == handlers
    del raised  # it kept the recorder, so that no garbage collection has closed anything
    assert sys.stderr.getvalue().endswith("\n")
