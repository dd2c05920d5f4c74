"""What a config leaves open is chosen from the data once, and stays what it is."""

import json
import shutil
import sys

import numpy as np
import pytest
from absl.testing import flagsaver
from tiny import tiny_config

from csc_jax import config as config_lib
from csc_jax import data, main
from csc_jax.config import choose
from csc_jax.config.choose import Facts
from csc_jax.errors import UserError
from csc_jax.planning import plan
from csc_jax.training import choice
from csc_jax.training.checkpoint import Checkpointer

OPEN = {
    "data__crop_size": (0, 0),
    "batch__labeled": 0,
    "batch__unlabeled": 0,
    "train__steps": 0,
}
FACTS = Facts(size=(360, 480), labeled=46, unlabeled=321, multiple=16)


def values(config, facts):
    return {name: value for name, (value, _) in choose.choose(config, facts).items()}


@pytest.mark.parametrize(
    ("size", "multiple", "crop"),
    [
        ((360, 480), 16, (352, 480)),
        ((3000, 4000), 16, (512, 512)),
        ((3000, 4000), 14, (504, 504)),
        ((144, 192), 16, (144, 192)),
        ((100, 2000), 16, (96, 512)),
        ((10, 40), 16, (16, 32)),  # which `check_crop` then refuses by name
    ],
)
def test_a_crop_is_as_large_as_the_images_and_512_px_allow(size, multiple, crop):
    facts = FACTS._replace(size=size, multiple=multiple)
    assert values(tiny_config(**OPEN), facts)["data.crop_size"] == crop


@pytest.mark.parametrize(
    ("crop", "labeled", "batch"),
    [
        ((512, 512), 100, 4),
        ((320, 320), 100, 8),
        ((64, 64), 100, 8),
        ((640, 640), 100, 2),
        ((2048, 2048), 100, 2),
        ((64, 64), 7, 4),
        ((64, 64), 1, 2),
    ],
)
def test_a_batch_is_what_the_labelled_images_and_the_pixels_of_a_step_allow(crop, labeled, batch):
    config = tiny_config(**OPEN | {"data__crop_size": crop})
    found = values(config, FACTS._replace(labeled=labeled))
    assert (found["batch.labeled"], found["batch.unlabeled"]) == (batch, batch)


@pytest.mark.parametrize(
    ("unlabeled", "steps"),
    [(68, 2000), (400, 4000), (9260, 40_000)],  # 80 passes in batches of 8
)
def test_a_run_has_80_passes_within_bounds(unlabeled, steps):
    config = tiny_config(**OPEN | {"batch__unlabeled": 8})
    assert values(config, FACTS._replace(unlabeled=unlabeled))["train.steps"] == steps


def test_a_field_that_is_set_stays():
    assert values(tiny_config(), FACTS) == {}
    config = tiny_config(**OPEN | {"train__epochs": 3.0, "batch__labeled": 16})
    assert values(config, FACTS) == {"data.crop_size": (352, 480), "batch.unlabeled": 16}


def test_a_small_part_of_a_large_image_is_pointed_out():
    facts = FACTS._replace(size=(3000, 4000))
    reason = choose.choose(tiny_config(**OPEN), facts)["data.crop_size"].reason
    assert "That is 2% of an image: data.image_size=H,W" in reason


@pytest.fixture
def drawn(tmp_path):
    """A config that leaves all open, its data set and its images."""
    config = tiny_config(tmp_path, data__synthetic__size=(40, 56), **OPEN)
    dataset = data.load(config.data)
    return config, dataset, data.partition(config.data, dataset, config.seed)


def test_the_data_decide_and_the_log_says_why(drawn, caplog):
    with caplog.at_level("INFO", "csc_jax"):
        filled = choice.fill_open(*drawn, before=None)
    assert tuple(filled.data.crop_size) == (32, 48)
    assert (filled.batch.labeled, filled.batch.unlabeled, filled.train.steps) == (4, 4, 2000)
    for line in (
        "data.crop_size = 32,48, chosen: the median train image is 40x56 px",
        "batch.labeled = 4, chosen: 4 labelled images",
        "batch.unlabeled = 4, chosen: as many",
        "train.steps = 2000, chosen: 80 passes over 12 images are 240 steps of 4; at least 2,000",
    ):
        assert line in caplog.text
    assert tuple(drawn[0].data.crop_size) == (0, 0)
    # The crop of a transformer fits its patches.
    drawn[0].model.backbone = "dinov2_small"
    assert tuple(choice.fill_open(*drawn, before=None).data.crop_size) == (28, 56)


def test_images_smaller_than_any_crop_are_named_at_once(tmp_path):
    small = {"data__synthetic__size": (40, 20), "model__output_stride": 32}
    config = tiny_config(tmp_path, **OPEN | small)
    dataset = data.load(config.data)
    partition = data.partition(config.data, dataset, config.seed)
    with pytest.raises(UserError, match=r"crop_size is 32x32 but the largest train image .* 40x20"):
        choice.fill_open(config, dataset, partition, before=None)


def test_a_run_that_has_begun_keeps_what_it_began_with(drawn, caplog):
    before = config_lib.to_plain(tiny_config(data__crop_size=(16, 24), batch__labeled=2))
    with caplog.at_level("INFO", "csc_jax"):
        filled = choice.fill_open(*drawn, before=before)
    assert tuple(filled.data.crop_size) == (16, 24)
    assert (filled.batch.labeled, filled.batch.unlabeled, filled.train.steps) == (2, 4, 6)
    assert "data.crop_size = 16,24, as the run began with" in caplog.text


def test_a_damaged_checkpoint_does_not_hide_the_run(tmp_path):
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        assert checkpointer.describe_newest() is None
        for step in (1, 2):
            checkpointer.save(step, {"a": np.zeros(2)}, {}, {"config": {"step": step}}, None)
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert checkpointer.describe_newest() == {"config": {"step": 2}}
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "run")
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert checkpointer.describe_newest() == {"config": {"step": 1}}


def test_evaluation_takes_the_values_of_the_run(tmp_path, monkeypatch):
    stored = tiny_config(data__crop_size=(16, 24), train__steps=50)
    (tmp_path / "config.json").write_text(json.dumps(config_lib.to_plain(stored)))
    seen = []
    monkeypatch.setattr("csc_jax.evaluation.score.score", lambda config, *_: seen.append(config))
    argv = ["csc-jax", "--mode=evaluate", "--config=folder", f"--workdir={tmp_path}"]
    argv += ["--config.batch.labeled=2", "--config.debug.compilation_cache=False"]
    monkeypatch.setattr(sys, "argv", argv)  # from which ml-collections takes the fields
    with flagsaver.flagsaver():
        assert main.main(argv) == 0
    (config,) = seen
    assert tuple(config.data.crop_size) == (16, 24)
    assert (config.batch.labeled, config.batch.unlabeled, config.train.steps) == (2, 4, 50)


def test_a_plan_asks_for_what_it_cannot_choose():
    with pytest.raises(UserError, match=r"leaves data\.crop_size, .*train\.steps to be chosen"):
        plan.plan(tiny_config(**OPEN), "v5e:1x1")


def test_the_median_is_of_the_images_as_they_are_stored(tmp_path):
    config = tiny_config(tmp_path, data__image_size=(20, 28))
    dataset = data.load(config.data)
    lists = data.partition(config.data, dataset, 0)
    found = choice.facts(config, dataset, lists)
    assert found == Facts((20, 28), len(lists.labeled), len(lists.unlabeled), 16)
    assert np.shape(dataset.sources["train"].label(0)) == (20, 28)
