"""Whole runs: training, checkpoints, resuming, evaluation, prediction, on drawn scenes."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from tiny import tiny_config

from csc_jax import config as config_lib
from csc_jax import data
from csc_jax.errors import UserError
from csc_jax.evaluation.score import load, score
from csc_jax.reporting import writers
from csc_jax.training.checkpoint import Checkpointer
from csc_jax.training.experiment import build
from csc_jax.training.loop import train

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(folder):
    """An uninterrupted run: its config, work directory and last scores."""
    config = tiny_config(folder, train__steps=6, checkpoint__every=3, checkpoint__keep=3)
    return config, folder / "whole", train(config, folder / "whole")


def final_state(config, workdir):
    run = Checkpointer(workdir, read_only=True).describe()
    resolved = config_lib.from_plain(run["config"])
    experiment = build(resolved, tuple(run["class_names"]), np.asarray(run["palette"], np.uint8))
    return Checkpointer(workdir, read_only=True).restore(experiment.abstract_state())


def records(workdir):
    timing = "train/images_per_second"
    return [{k: v for k, v in r.items() if k != timing} for r in writers.read_metrics(workdir)]


def test_a_run_leaves_what_the_readme_promises(whole):
    _, workdir, _ = whole
    names = {path.relative_to(workdir).as_posix() for path in workdir.rglob("*")}
    expected = {"config.json", "metrics.jsonl", "splits/labeled.txt", "splits/unlabeled.txt"}
    expected |= {"plots/curves.png", "plots/panel_000003.png", "plots/panel_000006.png"}
    expected |= {"checkpoints/3", "checkpoints/6"}
    assert expected <= names
    assert any(name.startswith("tensorboard/events") for name in names)
    assert cv2.imread(str(workdir / "plots" / "panel_000006.png")) is not None
    keys = {key for record in records(workdir) for key in record}
    for name in ("loss", "loss_s", "loss_u", "loss_c", "learning_rate", "kept_fraction"):
        assert f"train/{name}" in keys
    for name in ("pseudo_label_accuracy", "bank_fill", "separation", "consistency"):
        assert f"train/{name}" in keys
    assert {"train/consistency_accepted", "train/enqueue_accepted", "val/teacher_miou"} <= keys


def test_evaluate_reproduces_the_miou_of_training(whole):
    config, workdir, scores = whole
    again = score(config, workdir, "latest")
    np.testing.assert_array_equal(again.confusion, scores.confusion)
    recorded = [r["val/teacher_miou"] for r in records(workdir) if "val/teacher_miou" in r]
    assert again.miou == recorded[-1]
    earlier = score(config, workdir, "3")
    assert earlier.miou == recorded[0]
    written = json.loads((workdir / "evaluation" / "val_teacher_6_whole.json").read_text())
    assert written["miou"] == again.miou


def test_evaluate_scores_the_student_too(whole):
    config, workdir, _ = whole
    config = config.copy_and_resolve_references()
    config.eval.network = "student"
    _, student, step = load(config, workdir, "latest")
    state = final_state(config, workdir).state
    assert step == 6
    np.testing.assert_array_equal(
        jax.tree.leaves(student.params)[0], jax.tree.leaves(state.student.params)[0]
    )


@pytest.mark.slow
def test_a_run_cut_off_continues_with_the_very_next_batch(whole, folder, monkeypatch):
    config, reference, _ = whole
    workdir = folder / "cut"
    make_iterator = data.train_iterator

    class Cut:
        """Fails in the fifth batch, after the checkpoint at step 3 and a record of step 4."""

        def __init__(self, *arguments):
            self._iterator, self._left = make_iterator(*arguments), 4

        def __next__(self):
            self._left -= 1
            if self._left < 0:
                raise RuntimeError("cut off")
            return next(self._iterator)

        def __getattr__(self, name):
            return getattr(self._iterator, name)

    monkeypatch.setattr(data, "train_iterator", Cut)
    with pytest.raises(RuntimeError, match="cut off"):
        train(config, workdir)
    monkeypatch.undo()
    # What a crash in the middle of a save leaves must not be taken for a checkpoint.
    torn = workdir / "checkpoints" / "5.orbax-checkpoint-tmp-1"
    shutil.copytree(workdir / "checkpoints" / "3", torn)
    train(config, workdir)

    expected, found = final_state(config, reference), final_state(config, workdir)
    for a, b in zip(jax.tree.leaves(expected.state), jax.tree.leaves(found.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert expected.loop == found.loop
    assert records(workdir) == records(reference)


def test_a_finished_run_is_only_scored_again(whole):
    config, workdir, scores = whole
    before = records(workdir)
    again = train(config, workdir)
    np.testing.assert_array_equal(again.confusion, scores.confusion)
    assert records(workdir) == before


def test_a_checkpoint_of_another_model_is_refused(whole):
    config, workdir, _ = whole
    other = config.copy_and_resolve_references()
    other.model.decoder_width = 12
    with pytest.raises(UserError, match=r"another config: model.decoder_width: 8 before, 12 now"):
        train(other, workdir)
    with pytest.raises(UserError, match=r"does not fit this config.*in the checkpoint"):
        score(other, workdir, "latest")


def test_a_checkpoint_of_another_class_count_is_refused(whole, tmp_path):
    config, workdir, _ = whole
    other = config.copy_and_resolve_references()
    other.data.name, other.data.root = "camvid", str(tmp_path)
    for split in ("train", "val"):
        for kind, pixels in (("images", (8, 8, 3)), ("labels", (8, 8))):
            path = tmp_path / kind / split
            path.mkdir(parents=True)
            suffix = "jpg" if kind == "images" else "png"
            cv2.imwrite(str(path / f"a.{suffix}"), np.zeros(pixels, np.uint8))
    with pytest.raises(UserError, match=r"knows 7 classes .* has 11"):
        score(other, workdir, "latest")


def test_missing_checkpoints_are_named(whole, tmp_path):
    config, workdir, _ = whole
    with pytest.raises(UserError, match="holds no checkpoint"):
        score(config, tmp_path, "latest")
    with pytest.raises(UserError, match="one of the steps 3, 6"):
        score(config, workdir, "4")


@pytest.mark.parametrize("method", ["supervised", "cutmix_mean_teacher"])
def test_the_other_methods_run_too(method, folder):
    config = tiny_config(folder, method__name=method, train__steps=2, train__eval_every=0)
    scores = train(config, folder / method)
    assert 0 <= scores.miou <= 1


def test_bad_settings_fail_before_anything_compiles(folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("compiled")

    monkeypatch.setattr(jax, "jit", fail)
    for overrides, message in (
        ({"batch__labeled": 3, "parallel__devices": 4}, r"batch.labeled is 3, .*4 devices"),
        ({"parallel__devices": 9}, r"parallel.devices is 9"),
        ({"data__crop_size": (64, 64)}, r"data.crop_size is 64x64"),
        ({"method__name": "cscc"}, r"Did you mean 'csc'"),
        ({"contrast__absent_classes": (7,)}, r"contrast.absent_classes names the class 7"),
    ):
        with pytest.raises(UserError, match=message):
            train(tiny_config(folder, **overrides), tmp_path / "never")


def test_figures_of_several_runs(whole, folder):
    _, workdir, _ = whole
    draw = runpy.run_path(str(SCRIPTS / "plot_figures.py"))["draw"]
    out = folder / "figures"
    draw({"ours": workdir, "again": workdir}, "latest", 2, out)
    names = {"fig1_separ", "fig2_cons", "fig4_class_separation", "fig5_examples"}
    assert {path.stem for path in out.glob("*.png")} == names
    for path in out.glob("*.png"):
        assert len(np.unique(cv2.imread(str(path)))) > 10  # something is drawn
    with pytest.raises(UserError, match="nowhere"):
        draw({"ours": workdir, "none": folder / "nowhere"}, "latest", 2, out)


def test_benchmark_of_the_module_prints_its_tables():
    sizes = {"classes": 3, "bank_size": 8, "dim": 4, "images": 2, "side": 8, "views": 2}
    arguments = [f"--{name}={value}" for name, value in sizes.items()]
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), "contrast", "--repeats=1"]
    done = subprocess.run(command + arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("  ")[0] for line in done.stdout.splitlines() if " ms " in line]
    assert rows[:2] == ["streamed (csc_jax.contrast)", "dense, JAX"]
    assert rows[-2:] == ["sampling", "bank update, both gates"]


@pytest.mark.slow
def test_benchmark_of_the_checks_and_checkpoints_prints_its_table():
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), "health", "--repeats=1", "--saves=1"]
    command.append("--method=supervised")
    one_device = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command, env=one_device, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Of the time of a step: checks" in done.stdout


def test_the_projection_head_costs_nothing_at_inference(folder):
    def cost(method):
        config = config_lib.resolve(tiny_config(folder, method__name=method), steps_per_epoch=4)
        experiment = build(config, ("a", "b"), np.zeros((2, 3), np.uint8))
        network = experiment.abstract_state().teacher
        images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)
        forward = jax.jit(lambda network, x: experiment.method.task.eval_forward(network, x).logits)
        lowered = forward.lower(network, images)
        return lowered.cost_analysis(), len(jax.tree.leaves(network.params))

    (with_head, more_leaves), (without, fewer_leaves) = cost("csc"), cost("supervised")
    assert more_leaves > fewer_leaves  # the head is in the checkpoint…
    assert with_head["flops"] == without["flops"]  # …and not in the program
    assert with_head["bytes accessed"] == without["bytes accessed"]
