"""ADE20K in both codings of its annotations, and COCO's semantic masks."""

from pathlib import Path

import numpy as np
import pytest
from data_cases import changed, data_config
from PIL import Image
from trees import SIZE, blocks, picture, write_jpeg, write_png

from csc_jax import data, evaluation
from csc_jax.data import ade20k, coco
from csc_jax.errors import UserError

SPLITS = {"training": "train", "validation": "val"}


def ade20k_tree(root: Path, values: tuple[int, ...], per_split: int = 4) -> Path:
    for folder, name in SPLITS.items():
        for i in range(per_split):
            stem = f"ADE_{name}_{i + 1:08d}"
            write_jpeg(root / "images" / folder / f"{stem}.jpg", picture(i))
            write_png(root / "annotations" / folder / f"{stem}.png", blocks(i, values))
    return root


def coco_tree(root: Path) -> Path:
    for split in ("train2017", "val2017"):
        for i in range(4):
            number = 10 * i + len(split)
            write_jpeg(root / split / f"{number:012d}.jpg", picture(i))
            write_png(root / "masks" / f"{number:012d}.png", blocks(i, (0, 1, 80, 255)))
    return root


def ade20k_config(tmp_path: Path, **fields: object):
    return data_config(tmp_path, name="ade20k", **fields).data


@pytest.mark.parametrize(
    ("values", "void", "shift"),
    [((0, 1, 77, 150), 0, 1), ((0, 1, 77, 149, 255), 255, 0)],
    ids=["official", "shifted"],
)
def test_ade20k_ids_begin_at_0_whichever_coding_is_there(tmp_path, values, void, shift):
    root = ade20k_tree(tmp_path / "root", values)
    dataset = data.load(ade20k_config(tmp_path))
    assert len(dataset.class_names) == len(set(dataset.class_names)) == len(dataset.palette) == 150
    assert dataset.class_names[7] == "bed"
    assert dataset.class_names[149] == "flag"
    for folder, split in SPLITS.items():
        source = dataset.sources[split]
        assert source.ids == tuple(f"ADE_{split}_{i + 1:08d}" for i in range(4))
        for k in range(4):
            path = root / "annotations" / folder / f"{source.ids[k]}.png"
            stored = np.asarray(Image.open(path)).astype(int)
            expected = np.where(stored == void, 255, stored - shift)
            np.testing.assert_array_equal(source[k]["label"], expected)


@pytest.mark.parametrize("values", [(0, 1, 77), (0, 150, 255)], ids=["neither", "both"])
def test_ade20k_asks_for_a_coding_that_cannot_be_told(tmp_path, values):
    ade20k_tree(tmp_path / "root", values)
    with pytest.raises(UserError, match=r"ade20k\.labels=official .* or =shifted"):
        data.load(ade20k_config(tmp_path))


@pytest.mark.parametrize(("coding", "first"), [("official", 255), ("shifted", 0)])
def test_ade20k_takes_the_coding_it_is_given(tmp_path, coding, first):
    ade20k_tree(tmp_path / "root", (0, 1, 77))
    label = data.load(ade20k_config(tmp_path, ade20k__labels=coding)).sources["val"][0]["label"]
    assert set(np.unique(label)) == ({255, 0, 76} if coding == "official" else {0, 1, 77})
    stored = blocks(0, (0, 1, 77))
    assert label[stored == 0][0] == first


def test_a_wrong_coding_is_an_error_that_names_the_value(tmp_path):
    ade20k_tree(tmp_path / "root", (0, 1, 150))
    with pytest.raises(UserError, match="label id 150"):
        data.load(ade20k_config(tmp_path, ade20k__labels="shifted"))


def test_ade20k_predictions_are_coded_as_its_server_reads_them(tmp_path):
    writer = evaluation.PredictionWriter("ade20k", ["ADE_val_00000001"], tmp_path, resized=False)
    writer("ADE_val_00000001", np.array([[0, 149]], np.uint8))
    written = np.asarray(Image.open(tmp_path / "ADE_val_00000001.png"))
    np.testing.assert_array_equal(written, [[1, 150]])


def test_coco_masks_are_class_ids(tmp_path):
    root = coco_tree(tmp_path / "root")
    (root / "masks" / f"{9:012d}.png").unlink()  # of a train image
    dataset = data.load(data_config(tmp_path, name="coco").data)
    assert len(dataset.class_names) == len(set(dataset.class_names)) == 81
    assert dataset.class_names[0] == "background"
    assert dataset.class_names[80] == "toothbrush"
    train, val = dataset.sources["train"], dataset.sources["val"]
    assert train.without_label == {f"{9:012d}"}
    assert val.ids == tuple(f"{10 * i + 7:012d}" for i in range(4))
    np.testing.assert_array_equal(val[1]["label"], blocks(1, (0, 1, 80, 255)))
    assert val[1]["image"].shape == (*SIZE, 3)


def test_a_coco_val_image_without_mask_is_named(tmp_path):
    root = coco_tree(tmp_path / "root")
    (root / "masks" / f"{17:012d}.png").unlink()
    with pytest.raises(UserError, match=f"{17:012d}.jpg has no label"):
        data.load(data_config(tmp_path, name="coco").data)


@pytest.mark.parametrize("find", [ade20k.find, coco.find])
def test_a_missing_part_is_named(tmp_path, find):
    (tmp_path / "root").mkdir()
    with pytest.raises(UserError, match="no images for train, val"):
        find(data_config(tmp_path).data)


def test_an_unknown_coding_is_refused_before_anything_is_read(tmp_path):
    from csc_jax.config import checks

    with pytest.raises(UserError, match=r"data\.ade20k\.labels"):
        checks.validate(changed(data_config(tmp_path), ade20k__labels="shift"))


@pytest.mark.parametrize(
    ("name", "line", "tree"),
    [
        (
            "ade20k",
            "images/training/ADE_train_00000002.jpg annotations/training/ADE_train_00000002.png",
            lambda root: ade20k_tree(root, (0, 1, 150)),
        ),
        ("coco", "train2017/000000000019.jpg masks/000000000019.png", coco_tree),
    ],
    ids=["ade20k", "coco"],
)
def test_published_lists_are_taken_as_they_are(tmp_path, name, line, tree):
    tree(tmp_path / "root")
    (tmp_path / "labeled.txt").write_text(f"{line}\n")
    config = data_config(tmp_path, name=name, labeled_list=str(tmp_path / "labeled.txt")).data
    lists = data.partition(config, data.load(config), seed=0)
    assert lists.labeled == (line.split()[0].rsplit("/", 1)[1][:-4],)
    assert len(lists.unlabeled) == 3
