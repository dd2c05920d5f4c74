"""`--mode=evaluate`: table, JSON, panels and prediction files of a tiny untrained run."""

import errno
import json
import logging
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config

from csc_jax import config as config_lib
from csc_jax import data
from csc_jax.config import checks as config_checks
from csc_jax.errors import UserError
from csc_jax.evaluation.score import score
from csc_jax.training.checkpoint import Checkpointer
from csc_jax.training.experiment import build
from csc_jax.training.loop import describe

STEP = 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A config and a work directory whose checkpoint holds fresh weights."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(folder, method__name="supervised", eval__network="student")
    dataset = data.load(config.data)
    resolved = config_lib.resolve(config, steps_per_epoch=1)
    experiment = build(resolved, dataset.class_names, dataset.palette)
    with Checkpointer(folder) as checkpointer:
        state = experiment.compile_init()()
        checkpointer.save(STEP, state, {}, describe(experiment), 0.1)
    return config, folder, dataset


def changed(config, **overrides):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({f"eval.{k}": v for k, v in overrides.items()})
    return config


@pytest.fixture(scope="module")
def scored(run, tmp_path_factory):
    config, workdir, _ = run
    out = tmp_path_factory.mktemp("predictions")
    return score(changed(config, panels=2), workdir, "latest", out), workdir / "evaluation", out


def test_the_report_holds_scores_counts_and_how_they_were_made(run, scored):
    _, _, dataset = run
    scores, folder, _ = scored
    report = json.loads((folder / f"val_student_{STEP}_whole.json").read_text())
    source = dataset.source("val")
    assert report["miou"] == scores.miou
    assert report["step"] == STEP
    assert report["images"] == len(source) == 6
    labels = [source[i]["label"] for i in range(6)]
    assert report["pixels"] == sum((label < 7).sum() for label in labels)
    np.testing.assert_array_equal(report["confusion"], scores.confusion)
    assert report["config"]["eval.network"] == "student"
    assert report["config"]["eval.scales"] == [1.0]
    assert list(report["per_image_miou"]) == list(source.ids)
    occurring = {name for name in dataset.class_names if report[f"iou/{name}"] is not None}
    assert occurring | set(report["absent_classes"]) == set(dataset.class_names)


def test_each_prediction_is_written_as_it_was_scored(run, scored):
    _, _, dataset = run
    scores, _, out = scored
    source = dataset.source("val")
    counts = np.zeros((7, 7), np.int64)
    for i, name in enumerate(source.ids):
        example = source[i]
        with Image.open(out / f"{name}.png") as image:
            classes = np.asarray(image)
        np.add.at(counts, (example["label"], classes), 1)
    np.testing.assert_array_equal(counts, scores.confusion)
    assert len(list(out.iterdir())) == 6


def test_panels_show_the_worst_and_the_best_images(run, scored, monkeypatch):
    config, workdir, dataset = run
    scores, folder, _ = scored
    for kind in ("worst", "best"):
        assert cv2.imread(str(folder / f"val_student_{STEP}_whole_{kind}.png")) is not None
    drawn = []

    def spy(path, columns, palette, class_names, title, row_titles, hatched):
        drawn.append((path.stem, columns, row_titles))
        assert hatched == "ignored or correct"
        assert title.endswith(" images of val: supervised on synthetic, seed 0, student at step 0")

    monkeypatch.setattr("csc_jax.reporting.visualize.save_panel", spy)
    score(changed(config, panels=2), workdir, "latest")
    ascending = sorted(scores.per_image, key=lambda name: (scores.per_image[name], name))
    source = dataset.source("val")
    for (stem, columns, titles), names in zip(
        drawn, (ascending[:2], ascending[::-1][:2]), strict=True
    ):
        assert stem.endswith("worst" if names[0] == ascending[0] else "best")
        assert titles == [f"{name}: mIoU {100 * scores.per_image[name]:.1f}%" for name in names]
        truth = [source[source.ids.index(name)]["label"] for name in names]
        np.testing.assert_array_equal(columns["ground truth"], truth)
        found, wrong = np.array(columns["student"]), np.array(columns["wrong, hatched where right"])
        np.testing.assert_array_equal(wrong == 255, found == truth)
        np.testing.assert_array_equal(wrong[wrong != 255], found[wrong != 255])


def test_center_crop_is_labelled_wherever_it_is_printed(run, caplog):
    config, workdir, _ = run
    config = changed(config, mode="center_crop", window=(16, 24), panels=0)
    with caplog.at_level(logging.INFO, "csc_jax"):
        scores = score(config, workdir, "latest")
    assert scores.confusion.sum() == 6 * 16 * 24
    assert "mean IoU (center_crop)" in caplog.text
    assert "student at step 0 on val of synthetic (center_crop)" in caplog.text
    assert (workdir / "evaluation" / f"val_student_{STEP}_center_crop.json").is_file()
    assert not list((workdir / "evaluation").glob("*center_crop*.png"))


def test_flips_have_a_report_of_their_own(run, scored):
    config, workdir, _ = run
    once, folder, _ = scored
    views = score(changed(config, flip=True, panels=0), workdir, "latest")
    assert views.confusion.sum() == once.confusion.sum()
    assert (views.confusion != once.confusion).any()
    assert (folder / f"val_student_{STEP}_whole_tta.json").is_file()


def test_what_cannot_be_done_is_said_before_the_network_is_restored(run, tmp_path, monkeypatch):
    config, workdir, _ = run
    monkeypatch.setattr("csc_jax.evaluation.score.load", lambda *_: pytest.fail("restored"))
    with pytest.raises(UserError, match=r"--save_predictions wants whole images.*center_crop"):
        score(changed(config, mode="center_crop"), workdir, "latest", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out cannot be written"):
        score(config, workdir, "latest", tmp_path / "file" / "out")
    with pytest.raises(UserError, match=r"--checkpoint=3 is not in"):
        score(config, workdir, "3")
    with pytest.raises(UserError, match=r"--workdir=.*nowhere is no folder"):
        score(config, tmp_path / "nowhere", "latest")
    with pytest.raises(UserError, match=r"no split 'test'"):
        score(changed(config, split="test"), workdir, "latest")
    config = config.copy_and_resolve_references()
    config.data.root = str(tmp_path)
    with pytest.raises(UserError, match=r"lies in data\.root"):
        score(config, workdir, "latest", tmp_path / "out")


def test_a_read_only_or_full_work_directory_is_named(run, tmp_path, monkeypatch):
    config, workdir, _ = run

    def refuse(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    config = changed(config, panels=0)
    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(UserError, match=r"evaluation cannot be written: No space left.*--workdir"):
        score(config, workdir, "latest")
    (tmp_path / "evaluation").touch()  # stands in for a folder that cannot be made
    with pytest.raises(UserError, match=r"evaluation cannot be written: File exists"):
        score(config, tmp_path, "latest")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scales": ()}, r"eval\.scales is \(\)"),
        ({"scales": (1.0, 0.0)}, r"eval\.scales is \(1\.0, 0\.0\)"),
        ({"size_multiple": 0}, r"eval\.size_multiple is 0"),
        ({"mode": "middle"}, r"eval\.mode is 'middle'.*center_crop"),
    ],
)
def test_fields_out_of_range_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        config_checks.validate(changed(tiny_config(), **fields))


def test_an_image_without_labels_is_neither_best_nor_worst():
    from csc_jax.evaluation.score import _Extremes

    extremes = _Extremes(2)
    for name, miou in {"a": 0.5, "b": math.nan, "c": 0.1, "d": 0.9, "e": 0.5}.items():
        extremes(name, np.zeros((2, 2), np.uint8), miou)
    assert [name for _, name, _ in extremes.worst] == ["c", "a"]
    assert [name for _, name, _ in extremes.best] == ["d", "a"]


def test_reports_of_other_settings_stay_side_by_side(run):
    """Other windows, flips beside scales, and other sizes of the images."""
    config, workdir, _ = run
    out = workdir / "evaluation"

    def names():
        return {path.name for path in out.glob("*.json")}

    def read(name):
        return json.loads((out / name).read_text())

    score(changed(config, panels=0, flip=True), workdir, "latest")
    score(changed(config, panels=0, flip=True), workdir, "latest")
    before = names()
    assert f"val_student_{STEP}_whole_tta.json" in before
    score(changed(config, panels=0, scales=(1.0, 0.5)), workdir, "latest")
    assert names() - before == {f"val_student_{STEP}_whole_tta_2.json"}
    assert read(f"val_student_{STEP}_whole_tta.json")["config"]["eval.flip"] is True
    assert read(f"val_student_{STEP}_whole_tta_2.json")["config"]["eval.scales"] == [1.0, 0.5]
    resized = changed(config, panels=0)
    resized.data.image_size = (16, 24)
    score(resized, workdir, "latest")
    report = read(f"val_student_{STEP}_whole_16x24.json")
    assert report["config"]["data.image_size"] == [16, 24]
    assert report["pixels"] <= 16 * 24 * report["images"]
