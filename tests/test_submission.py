"""Prediction files: official names, ids and palettes; none half written, no label replaced."""

import errno
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics

from csc_jax import evaluation
from csc_jax.data import camvid, cityscapes, pascal_voc
from csc_jax.errors import UserError
from csc_jax.evaluation import submission

FRANKFURT = "leftImg8bit/val/frankfurt/frankfurt_000000_000294_leftImg8bit.png"


def writer(dataset, ids, out, resized=False):
    return evaluation.PredictionWriter(dataset, ids, out, resized=resized)


def random_classes(count, shape=(12, 20), seed=0):
    return np.random.default_rng(seed).integers(0, count, shape).astype(np.uint8)


def written(out):
    return sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())


def test_cityscapes_gets_official_names_and_label_ids(tmp_path):
    classes = random_classes(19)
    writer("cityscapes", [FRANKFURT], tmp_path)(FRANKFURT, classes)
    assert written(tmp_path) == ["frankfurt_000000_000294_gtFine_labelIds.png"]
    with Image.open(tmp_path / "frankfurt_000000_000294_gtFine_labelIds.png") as image:
        assert image.mode == "L"
        stored = np.asarray(image)
    # Read as ground truth, the file says what was predicted.
    np.testing.assert_array_equal(cityscapes._LABEL_IDS.table[stored], classes)
    assert stored[classes == 0][0] == 7  # road
    assert stored[classes == 18][0] == 33  # bicycle


def test_cityscapes_is_enlarged_to_its_own_size_where_the_run_reduced_it(tmp_path):
    classes = random_classes(19, (8, 16))
    writer("cityscapes", [FRANKFURT], tmp_path, resized=True)(FRANKFURT, classes)
    with Image.open(tmp_path / written(tmp_path)[0]) as image:
        stored = cityscapes._LABEL_IDS.table[np.asarray(image)]
    np.testing.assert_array_equal(stored, classes.repeat(128, 0).repeat(128, 1))


def test_pascal_voc_gets_palette_pngs(tmp_path):
    classes = random_classes(21)
    writer("pascal_voc", ["2007_000033"], tmp_path)("2007_000033", classes)
    with Image.open(tmp_path / "2007_000033.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), classes)
        palette = np.array(image.getpalette()).reshape(256, 3)
    # From the table of VOC's development kit.
    official = {0: (0, 0, 0), 1: (128, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    for index, color in {**official, 255: (224, 224, 192)}.items():
        assert tuple(palette[index]) == color
    np.testing.assert_array_equal(palette[:21], pascal_voc.PALETTE)


def test_other_data_sets_get_class_ids_in_the_folders_of_their_ids(tmp_path):
    ids = ["0001TP_008550", "täg 1/frame.01.jpg", "b/c.PNG"]
    write = writer("folder", ids, tmp_path)
    images = {name: random_classes(11, seed=i) for i, name in enumerate(ids)}
    for name, classes in images.items():
        write(name, classes)
    names = ["0001TP_008550.png", "täg 1/frame.01.png", "b/c.png"]
    assert written(tmp_path) == sorted(names)
    for name, classes in zip(names, images.values(), strict=True):
        with Image.open(tmp_path / name) as image:
            np.testing.assert_array_equal(np.asarray(image), classes)


@pytest.mark.parametrize(
    ("dataset", "classes"),
    [("pascal_voc", len(pascal_voc.CLASS_NAMES)), ("camvid", len(camvid.CLASS_NAMES))],
)
def test_files_have_our_miou_by_the_count_of_scikit_learn(tmp_path, mesh1, dataset, classes):
    rng = np.random.default_rng(classes)
    sizes = [(37, 50), (50, 33), (41, 41), (50, 50)] if dataset == "pascal_voc" else [(36, 48)] * 4
    batches, truths = [], {}
    for i, (height, width) in enumerate(sizes):
        # Blocks of random classes, the last of which occurs nowhere; a third of the pixels are
        # predicted wrong and every tenth has no label.
        blocks = rng.integers(0, classes - 1, (-(-height // 9), -(-width // 9)))
        label = blocks.repeat(9, 0).repeat(9, 1)[:height, :width].astype(np.uint8)
        image = np.where(rng.random(label.shape) < 2 / 3, label, rng.integers(0, classes - 1))
        label[rng.random(label.shape) < 0.1] = 255
        truths[f"2007_00000{i}"] = label
        batches.append(
            {
                "image": np.repeat(image[None, :, :, None], 3, axis=3).astype(np.uint8),
                "label": label[None],
                "valid": np.array([True]),
                "ids": [f"2007_00000{i}"],
            }
        )

    def logits(variables, images):  # the class id is the grey level
        return -abs(images[..., :1].astype(np.float32) - np.arange(classes)[None, None, None])

    predict = evaluation.make_predictor(
        logits,
        lambda size: size,
        num_classes=classes,
        mode="whole",
        window=(0, 0),
        mesh=mesh1,
        size_multiple=32,
    )
    write = writer(dataset, list(truths), tmp_path)
    scores = evaluation.evaluate(predict, {}, batches, classes, on_image=[write])

    found = {}
    for name in truths:
        with Image.open(tmp_path / f"{name}.png") as image:
            found[name] = np.asarray(image)
    truth, predicted = (np.concatenate([m[n].ravel() for n in truths]) for m in (truths, found))
    truth, predicted = truth[truth != 255], predicted[truth != 255]
    counts = metrics.confusion_matrix(truth, predicted, labels=range(classes))
    np.testing.assert_array_equal(scores.confusion, counts)
    occurring = range(classes - 1)
    iou = metrics.jaccard_score(truth, predicted, labels=occurring, average=None)
    np.testing.assert_allclose(scores.iou, [*iou, np.nan])
    assert scores.miou == pytest.approx(iou.mean(), abs=1e-12)
    assert 0.3 < scores.miou < 0.9  # neither all right nor all wrong


def test_ids_without_a_file_of_their_own_are_named(tmp_path):
    with pytest.raises(UserError, match=r"The image 2007_000033 has no Cityscapes name"):
        writer("cityscapes", ["2007_000033"], tmp_path)
    with pytest.raises(UserError, match=r"a\.jpg and A\.png of folder would both be written"):
        writer("folder", ["a.jpg", "A.png"], tmp_path)
    for name in ("../a", "/etc/a", ""):
        with pytest.raises(UserError, match="cannot name a file"):
            writer("folder", [name], tmp_path)
    with pytest.raises(UserError, match="no image b among"):
        writer("folder", ["a"], tmp_path)("b", random_classes(2))
    assert written(tmp_path) == []


def test_the_folder_is_made_and_must_be_writable(tmp_path, monkeypatch):
    evaluation.check_folder(tmp_path / "deep" / "out", "")
    assert (tmp_path / "deep" / "out").is_dir()
    assert written(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out cannot be written: Not a directory"):
        evaluation.check_folder(tmp_path / "file" / "out", "")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(submission.tempfile, "TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(UserError, match=r"Read-only file system.*another --save_predictions"):
        evaluation.check_folder(tmp_path / "deep", "")


def test_labels_of_the_data_set_are_never_replaced(tmp_path):
    labels = tmp_path / "VOC2012" / "SegmentationClass"
    labels.mkdir(parents=True)
    for out in (labels, tmp_path / "VOC2012", labels / ".." / "new"):
        with pytest.raises(UserError, match=r"lies in data\.root"):
            evaluation.check_folder(out, str(tmp_path / "VOC2012"))
    evaluation.check_folder(tmp_path / "VOC2012_predicted", str(tmp_path / "VOC2012"))


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    write = writer("camvid", ["a", "b"], tmp_path)
    write("a", random_classes(11))
    whole = Path.write_bytes

    def half(path, content):
        whole(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(UserError, match=r"b\.png cannot be written: No space left on device"):
        write("b", random_classes(11))
    assert written(tmp_path) == ["a.png"]
