"""Each data set from the files a user downloads to submission files, with its own config file."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import trees
from ml_collections import ConfigDict
from PIL import Image
from tiny import BACKBONE

from csc_jax import data
from csc_jax.evaluation.score import score
from csc_jax.evaluation.submission import CITYSCAPES_LABEL_IDS, voc_palette
from csc_jax.training.loop import train

CONFIGS = Path(__file__).parents[1] / "configs"
TREES = {
    "cityscapes": trees.cityscapes_tree,
    "pascal_voc": trees.voc_tree,
    "camvid": trees.camvid_tree,
    "folder": trees.folder_tree,
}


def shrunk(name: str, folder: Path) -> ConfigDict:
    """The config file as it is, but for what decides about its cost."""
    c = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    c.data.root, c.data.cache_dir = str(folder / "root"), str(folder / "cache")
    c.data.labeled_fraction = "1/2"
    c.data.image_size = (0, 0)
    if name != "folder":  # which chooses both
        c.data.crop_size = (24, 32)
        c.batch.labeled = c.batch.unlabeled = 2
    c.model.backbone, c.model.stem = BACKBONE, "7x7"
    c.model.width, c.model.decoder_width = 4, 8
    c.model.output_stride, c.model.projection_dim = 16, 8
    c.method.name = "supervised"
    c.train.epochs, c.train.steps, c.train.eval_every, c.train.panels = 0.0, 2, 2, 0
    c.eval.panels = 0
    c.parallel.devices = 1
    return c


@pytest.mark.slow
@pytest.mark.parametrize("name", TREES)
def test_from_downloaded_files_to_submission_files(name, tmp_path, capsys):
    TREES[name](tmp_path / "root")
    config = shrunk(name, tmp_path)
    dataset = data.load(config.data)  # what prepare_data.py does
    trained = train(config, tmp_path / "run")
    scores = score(config, tmp_path / "run", "latest", tmp_path / "out")
    np.testing.assert_array_equal(scores.confusion, trained.confusion)
    assert scores.confusion.sum() > 0

    val = dataset.source("val")
    written = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert len(written) == len(val)
    confusion = np.zeros_like(scores.confusion)
    for path in written:
        stem = path.relative_to(tmp_path / "out").with_suffix("").as_posix()
        if name == "cityscapes":
            assert stem.endswith("_gtFine_labelIds")
            stem = stem.removesuffix("_gtFine_labelIds") + "_leftImg8bit"
        element = next(
            val[i] for i, key in enumerate(val.ids) if stem in (key, Path(key).stem, key[:-4])
        )
        with Image.open(path) as image:
            stored = np.array(image)
            if name == "pascal_voc":
                assert image.mode == "P"
                assert image.getpalette() == voc_palette().reshape(-1).tolist()
        if name == "cityscapes":
            stored = np.searchsorted(CITYSCAPES_LABEL_IDS, stored)
        assert stored.shape == element["label"].shape
        known = element["label"] != 255
        np.add.at(confusion, (element["label"][known], stored[known]), 1)
    # The files hold what was scored.
    np.testing.assert_array_equal(confusion, scores.confusion)
