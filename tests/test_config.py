"""The config files and the command line."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image
from tiny import tiny_config

from csc_jax import config as config_lib
from csc_jax import data, main, methods, models
from csc_jax.config import checks as config_checks
from csc_jax.errors import UserError

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))
SYNTHETIC = f"--config={ROOT / 'configs' / 'synthetic.py'}"
PREDICT = ("--mode=predict", "--workdir=x", "--images=x", "--out=x")


def load_config(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.get_config()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_file_builds_its_network_and_state(path):
    module, config = load_config(path)
    config_checks.validate(config)
    config = config_lib.resolve(config, steps_per_epoch=100)
    assert config.train.steps > 0
    known = {"cityscapes": 19, "pascal_voc": 21, "camvid": 11, "synthetic": 7}
    classes = known.get(path.stem.removesuffix("_pretrained"), 5)  # "folder" has any number
    model = models.build(config.model, classes, aux_head=config.loss.aux_weight > 0)
    method = methods.build(methods.Task(config, model, classes, config.train.steps))
    network = jax.eval_shape(
        lambda key: method.task.init_network(key, projection=method.projection), jax.random.key(0)
    )
    assert network.params["classifier"]["out"]["kernel"].shape[-1] == classes
    for word in ("Command:", "Hardware:", "Expected:", f"--config={path.stem} "):
        assert word in module.__doc__


def test_the_papers_values_are_in_the_papers_configs():
    cityscapes = load_config(ROOT / "configs" / "cityscapes.py")[1]
    voc = load_config(ROOT / "configs" / "pascal_voc.py")[1]
    for c, recipe in (
        (cityscapes, (0.00125, 5e-4, (640, 640), 2, 2, 200)),
        (voc, (0.00025, 1e-4, (480, 480), 4, 4, 80)),
    ):
        found = (c.optimizer.learning_rate, c.optimizer.weight_decay, tuple(c.data.crop_size))
        assert (*found, c.batch.labeled, c.batch.unlabeled, c.train.epochs) == recipe
        assert (c.contrast.weight, c.method.lambda_u, c.contrast.top_n) == (1.0, 1.0, 1)
        assert (c.contrast.bank_size, c.contrast.pixels_per_class) == (2000, 10)


def test_configs_survive_json():
    config = tiny_config(contrast__absent_classes=(1, 2))
    again = config_lib.from_plain(json.loads(json.dumps(config_lib.to_plain(config))))
    assert config_lib.flatten(again) == config_lib.flatten(config)
    with pytest.raises(UserError, match=r"'model\.legs'"):
        config_lib.from_plain({"model.legs": 4})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.labeled_fraction", "1/3", r"takes one of '1/2'"),
        ("contrast.temperature", 0.0, r"contrast.temperature is 0\.0"),
        ("contrast.max_keys", -1, r"contrast\.max_keys is -1"),
        ("data.crop_size", (64,), "takes 2 numbers"),
        ("data.crop_size", (0, 64), r"crop_size is \(0, 64\); both sides must be at least 1 px"),
        ("data.crop_size", (-8, 64), "both sides must be at least 1 px, or both 0"),
        ("data.crop_size", (48.5, 64), r"crop_size is \(48\.5, 64\); it takes whole numbers"),
        ("data.crop_size", ("a", "b"), r"crop_size is \('a', 'b'\); it takes numbers"),
        ("data.mean", ("nan", 1, 1), r"data\.mean is \('nan', 1, 1\); it takes numbers"),
        ("contrast.absent_classes", ("bird",), r"absent_classes is \('bird',\); it takes numbers"),
        ("method.unimatch_view.cutmix_area", (0.4, 0.02), "lowest and the highest value"),
        ("method.unimatch_view.cutmix_ratio", (0.0, 1.0), r"within 0\.001 and 1000"),
        ("optimizer.warmup", 10_000, r"optimizer\.warmup is 10000"),
    ],
)
def test_values_out_of_range_are_named(field, value, message):
    config = tiny_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        config_checks.validate(config)


@pytest.mark.parametrize(
    "content",
    ["[]", "null", "{", "\0", '{"data.bands": "x"}', '{"data.bands": 1.5}', "[" * 100_000],
)
def test_a_damaged_stored_config_is_named(content, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    with flagsaver.flagsaver():
        assert main.main(["csc-jax", "label", f"--workdir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/config.json cannot be read (")
    assert "Traceback" not in error


def test_lengths_are_resolved_into_steps():
    config = tiny_config(train__steps=0, train__epochs=2.5, method__supervised_only_epochs=1.0)
    resolved = config_lib.resolve(config, steps_per_epoch=10)
    assert (resolved.train.steps, resolved.method.supervised_only) == (25, 10)
    assert resolved.checkpoint.every == resolved.train.eval_every == 3
    config.train.steps = 7  # on top of a config in epochs
    config_checks.validate(config)
    both = config_lib.resolve(config, steps_per_epoch=10)
    assert (both.train.steps, both.train.epochs, both.method.supervised_only) == (7, 0, 10)
    assert tuple(resolved.eval.window) == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([SYNTHETIC, "--config.train.step=3"], r"Did you mean --config.train.steps"),
        ([SYNTHETIC, "--config.batchsize=3"], r"--config.batchsize is not a field"),
        ([SYNTHETIC, "--config.threshold=0.3"], r"--config.method.pseudo_label.threshold"),
        ([SYNTHETIC, "--config.train=3"], r"is a section, not a field"),
        ([SYNTHETIC, "--wokdir=x"], r"wokdir.*Did you mean --workdir"),
        ([SYNTHETIC, "--mode=test"], r"mode=test.*train\|evaluate\|report\|predict"),
        ([SYNTHETIC], "--workdir is missing"),
        ([SYNTHETIC, "train"], "The command comes first, and once: csc-jax train"),
        (["--workdir=x"], "--config is missing"),
        (["--mode=evaluate", "--workdir=nowhere"], r"nowhere/config.json cannot be read"),
        (
            [SYNTHETIC, "--workdir=x", "--save_predictions=y"],
            "--save_predictions goes with --mode=evaluate, not with --mode=train",
        ),
        (["--mode=plan", SYNTHETIC], "--topology is missing"),
        (["--mode=plan", SYNTHETIC, "--topology=v9:2x2"], "--topology=v9:2x2 is none"),
        (["--mode=plan", "--topology=v5e:2x2"], "--config is missing"),
    ],
)
def test_bad_command_lines_are_explained(arguments, message, capsys):
    with flagsaver.flagsaver():
        assert main.main(["csc_jax", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([SYNTHETIC, "--config.train.steps=many"], r"--config.train.steps=many.*'many'"),
        ([SYNTHETIC, "--config.data.flip=perhaps"], r"--config.data.flip=perhaps"),
        (
            [SYNTHETIC, "--config.eval.mode=center_crop", *PREDICT],
            r"--mode=predict wants whole images",
        ),
        (["--config=configs/missing.py", "--workdir=x"], r"missing\.py"),
    ],
)
def test_bad_values_are_explained(arguments, message):
    """In processes of their own: ml-collections defines the flags of a config once a process."""
    command = [sys.executable, "-m", "csc_jax.main", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_xla_keeps_beside_the_programs_which_kernels_it_found_fastest():
    kept = jax.config.values["jax_persistent_cache_enable_xla_caches"]
    assert "xla_gpu_per_fusion_autotune_cache_dir" in kept


@pytest.mark.slow
def test_the_command_trains_evaluates_and_predicts(tmp_path):
    """The one test of real processes: `python -m csc_jax.main` and the `csc-jax` command.

    They start in another folder, where the config is known by its name.
    """
    _, config = load_config(ROOT / "configs" / "synthetic.py")
    options = {"train__steps": 2, "train__eval_every": 0}
    # The other processes do not know the backbone of the tests.
    tiny = tiny_config(tmp_path, model__backbone="vit_tiny", **options)
    small = config_lib.flatten(tiny)
    full = config_lib.flatten(config)
    overrides = [
        f"--config.{name}={','.join(map(str, v)) if isinstance(v, tuple) else v}"
        for name, v in small.items()
        if v != full[name] and v != ()
    ]
    workdir = f"--workdir={tmp_path / 'run'}"
    command = [sys.executable, "-m", "csc_jax.main", workdir]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    images = tmp_path / "images"
    images.mkdir()

    def call(*arguments: str) -> str:
        done = subprocess.run(
            [*command, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = call("--config=synthetic", *overrides)
    assert "step 2/2  loss" in printed
    mean = next(line for line in printed.splitlines() if line.startswith("mean IoU"))
    assert mean in call("--mode=evaluate", "--config.train.log_every=5")
    picture = data.load(tiny_config(tmp_path).data).sources["val"][0]["image"]
    cv2.imwrite(str(images / "street.png"), cv2.resize(picture, (50, 40))[..., ::-1])
    call("--mode=predict", f"--images={images}", f"--out={tmp_path / 'out'}")
    ids = np.asarray(Image.open(tmp_path / "out" / "street.png"))  # not its palette's colours
    assert ids.shape == (40, 50)
    assert ids.max() < 7
    assert cv2.imread(str(tmp_path / "out" / "street_overlay.png")) is not None
