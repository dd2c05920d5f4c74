"""Runs that are killed, stopped, started twice or changed: nothing is lost, nothing is repeated."""

import itertools
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config
from toy_network import toy_harness

from csc_jax import __version__, data, losses
from csc_jax import config as config_lib
from csc_jax.config import checks as config_checks
from csc_jax.errors import Diverged, Interrupted, UserError
from csc_jax.reporting import writers
from csc_jax.training.checkpoint import Checkpointer
from csc_jax.training.experiment import build
from csc_jax.training.interrupt import StopRequest
from csc_jax.training.lock import lock
from csc_jax.training.loop import train

TORTURE = Path(__file__).parents[1] / "scripts" / "torture.py"


@pytest.mark.slow
def test_a_run_killed_three_times_ends_as_if_left_alone(tmp_path):
    command = [sys.executable, str(TORTURE), "--kills=3", f"--workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills; everything is the same to the bit" in done.stdout
    # The comparison itself can fail: a lost and a changed record are told apart from none.
    compare = runpy.run_path(str(TORTURE))["compare"]
    path = writers.metrics_path(tmp_path / "killed")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0].replace('"step": 4', '"step": 3'), *lines[2:]]) + "\n")
    assert len(compare(tmp_path / "alone", tmp_path / "killed")) >= 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def supervised(folder: Path, **overrides: object):
    options = {"train__steps": 4, "train__eval_every": 4, "checkpoint__every": 2} | overrides
    return tiny_config(folder, method__name="supervised", **options)


@pytest.fixture(scope="module")
def whole(folder):
    config = supervised(folder)
    return config, folder / "whole", train(config, folder / "whole")


def records(workdir):
    timing = "train/images_per_second"
    return [{k: v for k, v in r.items() if k != timing} for r in writers.read_metrics(workdir)]


@pytest.mark.parametrize(
    ("at", "in_evaluation"),
    [(3, False), (4, False), (4, True)],
    ids=["between evaluations", "before an evaluation", "in an evaluation"],
)
def test_sigterm_ends_in_a_checkpoint_and_the_run_continues(
    whole, folder, monkeypatch, at, in_evaluation
):
    config, reference, scores = whole
    workdir = folder / f"stopped{at}{in_evaluation}"
    name = "interrupt_evaluation" if in_evaluation else "reached"
    call = getattr(StopRequest, name)

    steps = itertools.count()  # the first question comes before the first step

    def call_after_signal(self):
        if in_evaluation or next(steps) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(StopRequest, name, call_after_signal)
    with pytest.raises(Interrupted, match=f"SIGTERM after step {at} of 4"):
        train(config, workdir)
    assert signal.getsignal(signal.SIGTERM) == before
    with Checkpointer(workdir, read_only=True) as checkpointer:
        assert checkpointer.latest_step() == at
    monkeypatch.undo()
    again = train(config, workdir)
    np.testing.assert_array_equal(again.confusion, scores.confusion)
    assert records(workdir) == records(reference)
    with Checkpointer(workdir, read_only=True) as checkpointer:
        assert checkpointer.latest_step("best") == 4  # its score came after the restart


def test_a_second_signal_is_not_caught():
    with StopRequest() as stop:
        assert not stop.reached()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reached()
        assert stop.name == "SIGINT"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_no_handler_outside_the_main_thread():
    result = []

    def body():
        with StopRequest() as stop:
            result.append(stop.reached())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert result == [False]


def test_a_work_directory_belongs_to_one_run(tmp_path):
    with lock(tmp_path):
        with (
            pytest.raises(UserError, match=rf"in use by process {os.getpid()} on "),
            lock(tmp_path),
        ):
            pass
        # Not signed yet by whoever took it.
        (tmp_path / "run.lock").write_text("")
        with pytest.raises(UserError, match="in use by another process"), lock(tmp_path):
            pass
    with lock(tmp_path):  # and is free again
        pass


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    (tmp_path / "run.lock").write_text(json.dumps({"host": "elsewhere", "process": 1}))
    with lock(tmp_path):
        held = json.loads((tmp_path / "run.lock").read_text())
    assert held["process"] == os.getpid()


def test_a_lock_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.lock cannot be written"), lock(tmp_path / "file"):
        pass


def test_a_changed_config_is_told_apart_by_what_it_alters(whole, caplog):
    config, workdir, _ = whole
    config = config.copy_and_resolve_references()
    config.optimizer.momentum, config.loss.aux_weight = 0.5, 0.1
    with pytest.raises(
        UserError,
        match=r"another config: loss.aux_weight: 0.0 before, 0.1 now; optimizer.momentum: 0.9 "
        r"before, 0.5 now",
    ):
        train(config, workdir)
    stored = config_lib.to_plain(config_lib.resolve(whole[0], steps_per_epoch=4))
    config = config_lib.resolve(whole[0], steps_per_epoch=4)
    config.train.steps, config.train.log_every, config.data.threads = 5, 7, 3
    assert config_checks.check_resumed(stored, config, __version__) == [
        "data.threads: 0 before, 3 now",
        "train.log_every: 1 before, 7 now",
        "train.steps: 4 before, 5 now",
    ]
    fewer = {"seed": 0}  # before there were other fields
    assert config_checks.check_resumed(fewer, config_lib.default_config(), __version__) == []


@pytest.mark.parametrize("damage", ["truncated", "deleted"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(whole, folder, damage, caplog):
    config, reference, scores = whole
    workdir = folder / damage
    shutil.copytree(reference, workdir)
    newest = workdir / "checkpoints" / "4"
    for path in (newest / "state").rglob("*"):
        if path.is_file() and damage == "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif path.is_file():
            path.unlink()
    with caplog.at_level("WARNING", logger="csc_jax"):
        again = train(config, workdir)
    assert "The checkpoint of step 4 cannot be read" in caplog.text
    np.testing.assert_array_equal(again.confusion, scores.confusion)
    assert records(workdir) == records(reference)
    assert len(list((workdir / "damaged_checkpoints").iterdir())) == 1


def poisoned(labels_limit):
    """Cross entropy that is NaN on batches whose first label says so."""
    clean = losses.cross_entropy

    def cross_entropy(scores, labels, **options):
        return clean(scores, labels, **options) * jnp.where(
            labels[0, 0, 0] >= labels_limit, jnp.nan, 1.0
        )

    return cross_entropy


def test_a_step_that_is_not_finite_leaves_the_state_alone(monkeypatch):
    monkeypatch.setattr(losses, "cross_entropy", poisoned(250))
    harness = toy_harness(tiny_config())
    state = harness.init()
    for i in range(2):
        state, _ = harness.step(state, harness.batch(i))
    before = jax.tree.map(np.array, jax.device_get(state))
    bad = harness.batch(3)
    bad["labeled"]["label"] = jnp.full_like(bad["labeled"]["label"], 255)
    for i in (1, 2):
        state, metrics = harness.step(state, bad)
        assert metrics["rejected"] == i
        assert np.isnan(metrics["loss"])
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(state), strict=True
    ):
        name = jax.tree_util.keystr(path)
        if name not in (".step", ".rejected"):
            np.testing.assert_array_equal(a, b, err_msg=name)
    assert state.step == before.step + 2
    state, metrics = harness.step(state, harness.batch(4))
    assert metrics["rejected"] == 0
    assert np.isfinite(metrics["loss"])
    assert not np.array_equal(jax.tree.leaves(state.student)[0], jax.tree.leaves(before.student)[0])


def images_of_steps(config, steps):
    """Returns the images of each step, as messages name them."""
    dataset = data.load(config.data)
    partition = data.partition(config.data, dataset, config.seed)
    iterator, images = data.train_iterator(config, dataset, partition), []
    for _ in range(steps):
        next(iterator)
        names = ((half, ", ".join(ids)) for half, ids in iterator.images.items())
        images.append("; ".join(f"{half} images: {ids}" for half, ids in names))
    return images


def test_a_longer_run_continues_and_stops_where_it_diverges(whole, folder, monkeypatch, caplog):
    config, reference, _ = whole
    workdir = folder / "diverged"
    shutil.copytree(reference, workdir)
    config = config.copy_and_resolve_references()
    config.train.steps, config.train.max_rejected = 9, 2
    images = images_of_steps(config, 6)
    monkeypatch.setattr(losses, "cross_entropy", poisoned(0))
    with (
        caplog.at_level("INFO", logger="csc_jax"),
        pytest.raises(
            Diverged, match=r"Step 6: loss, loss_s is not finite, as in the 2 steps"
        ) as stopped,
    ):
        train(config, workdir)
    assert images[-1] in str(stopped.value)
    assert "norm of the gradient nan; learning rate 0.00" in str(stopped.value)
    assert "changed since the checkpoint: train.steps: 4 before, 9 now" in caplog.text
    assert f"step 5 is not finite and was left out ({images[-2]})" in caplog.text
    with Checkpointer(workdir, read_only=True) as checkpointer:
        assert checkpointer.latest_step() == 4
    assert Diverged.exit_status == 3


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "adamw"},
        {"name": "sgd"},
        {"name": "sgd", "head_multiplier": 10.0, "clip_norm": 1.0, "warmup": 2},
    ],
    ids=str,
)
def test_the_state_of_every_optimizer_comes_back(optimizer, folder, tmp_path):
    fields = {f"optimizer__{name}": value for name, value in optimizer.items()}
    config = config_lib.resolve(supervised(folder, **fields), steps_per_epoch=4)
    experiment = build(config, ("a", "b", "c"), np.zeros((3, 3), np.uint8))
    state = experiment.compile_init()()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {"iterator": 7}, {"config": {}}, None)
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(experiment.abstract_state())
    assert restored.loop == {"iterator": 7}
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(state) == jax.tree.structure(restored.state)
