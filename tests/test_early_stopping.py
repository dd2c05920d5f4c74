"""A run ends where its val mIoU has stopped rising, also where it was stopped before."""

import json

import numpy as np
import pytest
from tiny import tiny_config

import csc_jax
from csc_jax import config as config_lib
from csc_jax.config import checks as config_checks
from csc_jax.errors import Interrupted, UserError
from csc_jax.evaluation import Scores
from csc_jax.reporting import report, writers
from csc_jax.training import early_stopping, loop
from csc_jax.training.checkpoint import Checkpointer
from csc_jax.training.interrupt import StopRequest
from csc_jax.training.loop import train


@pytest.mark.parametrize(
    ("scores", "patience", "ended"),
    [
        ([], 1, False),
        ([0.3], 1, False),
        ([0.3, 0.4], 1, False),
        ([0.3, 0.3], 1, True),  # as high is no gain
        ([0.4, 0.3, 0.35], 2, True),
        ([0.4, 0.3, 0.35], 3, False),
        ([0.4, 0.3, 0.5], 2, False),
        ([0.4, 0.3, 0.35], 0, False),
        ([-1.0, 0.1], 1, False),  # nothing could be scored at first
    ],
)
def test_patience_by_hand(scores, patience, ended):
    history = [(10 * i, score) for i, score in enumerate(scores, 1)]
    assert early_stopping.has_ended(history, patience) is ended


def test_the_best_is_the_first_of_the_highest():
    assert early_stopping.best([(1, 0.2), (2, 0.5), (3, 0.5)]) == (2, 0.5)


def test_without_evaluations_there_is_nothing_to_wait_for():
    with pytest.raises(UserError, match=r"train\.patience is 2, but train\.eval_every is 0"):
        tiny_config(train__patience=2, train__eval_every=0)


@pytest.fixture
def falling(monkeypatch):
    """The network is best at step 2; `train` and all else are what they are."""
    scored = {2: 0.5, 4: 0.4, 6: 0.45, 8: 0.6, 10: 0.7}
    evaluate = loop.evaluate_and_draw

    def scripted(experiment, state, val, step, probe, recorder, workdir, stop):
        evaluate(experiment, state, val, step, probe, recorder, workdir, stop)
        recorder.write(step, {"val/teacher_miou": scored[step]})
        ones = np.ones((experiment.num_classes, experiment.num_classes), np.int64)
        return type("Scripted", (Scores,), {"miou": scored[step]})(ones)

    monkeypatch.setattr(loop, "evaluate_and_draw", scripted)


def config_of(tmp_path, **overrides):
    """Rare classes have their say, too, so that their weights are seen to come again."""
    return tiny_config(
        tmp_path,
        method__name="supervised",
        loss__class_weights="enet",
        loss__dice_weight=0.5,
        train__steps=10,
        train__eval_every=2,
        train__patience=2,
        train__panels=0,
        checkpoint__every=5,
        checkpoint__keep=9,
        **overrides,
    )


@pytest.mark.slow
def test_a_run_ends_early_and_one_that_was_stopped_at_the_same_step(
    tmp_path, falling, monkeypatch, caplog
):
    config, whole, stopped = config_of(tmp_path), tmp_path / "whole", tmp_path / "stopped"
    with caplog.at_level("INFO", "csc_jax"):
        train(config, whole)
    assert "weights of the classes in the supervised loss: " in caplog.text
    line = "step 6: the val mIoU has not risen above the 50.00% of step 2 in 2 evaluations"
    assert line in caplog.text
    assert saved(whole) == (6, 6)  # it is saved where it ends, as at the last step

    monkeypatch.setattr(StopRequest, "reached", stop_at(4))
    with pytest.raises(Interrupted):
        train(config, stopped)
    monkeypatch.setattr(StopRequest, "reached", lambda self: False)
    train(config, stopped)
    assert saved(stopped)[0] == 6
    assert losses_of(stopped) == losses_of(whole)
    assert "Training ended early, at step 6 of 10: in 2 evaluations" in report.page(stopped)

    caplog.clear()
    with caplog.at_level("INFO", "csc_jax"):
        train(config, stopped)  # the same command once more: nothing is left to do
    assert line in caplog.text
    assert saved(stopped)[0] == 6
    stored = json.loads((stopped / "config.json").read_text())
    assert stored["loss.class_weights"] == "enet"
    config.train.patience = 3  # a run may go on with more patience
    (changed,) = config_checks.check_resumed(
        stored, config_lib.resolve(config, 1), csc_jax.__version__
    )
    assert changed == "train.patience: 2 before, 3 now"


def saved(workdir):
    with Checkpointer(workdir, read_only=True) as checkpointer:
        return checkpointer.latest_step(), checkpointer.latest_step("best")


def stop_at(step):
    asked = iter(range(100))  # the first question comes before the first step
    return lambda self: next(asked) == step


def losses_of(workdir):
    records = writers.read_metrics(workdir)
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}
