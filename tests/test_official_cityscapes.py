"""The official Cityscapes evaluator, run on the files we write, gives the mIoU we report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config

from csc_jax import data, evaluation
from csc_jax.data import cityscapes
from csc_jax.evaluation.submission import CITYSCAPES_LABEL_IDS

pytest.importorskip("cityscapesscripts", reason="cityscapesscripts is not installed")
pytestmark = pytest.mark.parity

MODULE = "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling"
# Ids 0 to 33 that are in no score, of which 255 may not be among the files (see labels.py there).
IGNORED = sorted(set(range(34)) - set(CITYSCAPES_LABEL_IDS))
NOWHERE, NOT_IN_LABELS = 16, 14  # train ids: train, truck
SIZES = [(60, 101), (64, 128), (77, 90), (64, 128), (41, 130), (96, 96)]


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def draw(rng, size):
    """Returns label ids, instance ids and an image in which a class is its colour, with errors."""
    height, width = size
    usable = [i for i in range(19) if i not in (NOWHERE, NOT_IN_LABELS)]
    label = np.full(size, CITYSCAPES_LABEL_IDS[rng.choice(usable)], np.uint8)
    shown = np.zeros(size, np.uint8)  # train id that the network will see
    shown[:] = CITYSCAPES_LABEL_IDS.index(label[0, 0])
    instances = label.astype(np.uint16)
    for k in range(30):
        h, w = rng.integers(1, height), rng.integers(1, width // 2)  # a pixel is the smallest
        top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        place = slice(top, top + h), slice(left, left + w)
        train_id = rng.choice(usable)
        value = CITYSCAPES_LABEL_IDS[train_id] if rng.random() < 0.8 else int(rng.choice(IGNORED))
        label[place] = value
        instances[place] = 1000 * value + k if value >= 24 else value
        shown[place] = train_id
    wrong = rng.random(size) < 0.25
    shown[wrong] = rng.choice([*usable, NOT_IN_LABELS], wrong.sum())
    return label, instances, cityscapes.PALETTE[shown]


@pytest.fixture
def root(tmp_path):
    """A made-up data set in the official layout, its images of many sizes."""
    rng = np.random.default_rng(7)
    root = tmp_path / "cityscapes"
    for split, sizes in (("train", [(48, 64)]), ("val", SIZES)):
        for i, size in enumerate(sizes):
            city = ("frankfurt", "lindau", "münster")[i % 3] if split == "val" else "ulm"
            name = f"{city}_{i:06d}_000019"
            label, instances, image = draw(rng, size)
            save(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", image)
            stem = root / "gtFine" / split / city / f"{name}_gtFine"
            save(Path(f"{stem}_labelIds.png"), label)
            save(Path(f"{stem}_instanceIds.png"), instances)
    return root


def nearest_color(variables, images):
    """Logits (B, H, W, 19): how close a pixel is to the colour of each class."""
    colors = jnp.asarray(cityscapes.PALETTE, jnp.float32)[None, None, None]
    return -jnp.abs(images.astype(jnp.float32)[..., None, :] - colors).sum(axis=-1)


def test_the_official_evaluator_gives_our_miou(root, tmp_path, mesh1):
    config = tiny_config(tmp_path, data__name="cityscapes", data__root=str(root))
    source = data.load(config.data).source("val")
    predict = evaluation.make_predictor(
        nearest_color,
        lambda size: size,
        num_classes=19,
        mode="sliding",
        window=(48, 48),
        mesh=mesh1,
        size_multiple=64,
    )
    out = tmp_path / "predictions"
    evaluation.check_folder(out, config.data.root)
    write = evaluation.PredictionWriter("cityscapes", source.ids, out, resized=False)
    batches = data.eval_batches(source, batch_size=2)
    ours = evaluation.evaluate(predict, {}, batches, 19, on_image=[write])

    environment = os.environ | {
        "CITYSCAPES_DATASET": str(root),
        "CITYSCAPES_RESULTS": str(out),
        "CITYSCAPES_EXPORT_DIR": str(tmp_path),
    }
    command = [sys.executable, "-W", "ignore", "-m", MODULE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    official = json.loads((tmp_path / "resultPixelLevelSemanticLabeling.json").read_text())

    print(f"official {official['averageScoreClasses']:.12f}, ours {ours.miou:.12f}")
    assert official["averageScoreClasses"] == pytest.approx(ours.miou, abs=5e-5)  # four digits
    for name, iou in zip(cityscapes.CLASS_NAMES, ours.iou, strict=True):
        assert official["classScores"][name] == pytest.approx(iou, abs=5e-5, nan_ok=True)
    assert ours.absent(cityscapes.CLASS_NAMES) == ["train"]
    assert ours.iou[NOT_IN_LABELS] == 0  # predicted, never true: it counts in both
    assert 0.3 < ours.miou < 0.9
