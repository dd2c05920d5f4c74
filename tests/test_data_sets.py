"""What is found in the user's folder: layouts, archives, pools, class lists, and their faults."""

import json
import re
import shutil
import stat
import zipfile

import numpy as np
import pytest
import trees
from data_cases import changed, data_config
from trees import SIZE, picture, write_jpeg, write_palette_png, write_png, write_sbd_mat

from csc_jax import data
from csc_jax.data import camvid, cityscapes, class_list, codec, pascal_voc
from csc_jax.errors import UserError

# ---- CamVid --------------------------------------------------------------------------------------


def test_camvid_is_read_in_name_order_and_void_is_ignored(tmp_path):
    trees.camvid_tree(tmp_path / "root")
    dataset = data.load(data_config(tmp_path).data)
    train = dataset.sources["train"]
    assert dataset.class_names[0] == "sky"
    assert set(dataset.sources) == {"train", "val"}
    assert train.ids == tuple(f"train é{i}" for i in range(8))
    assert train.max_size == SIZE
    assert not train.without_label
    for i, element in enumerate(train[k] for k in range(len(train))):
        stored = np.random.default_rng(i).integers(0, 12, SIZE, np.uint8)
        np.testing.assert_array_equal(element["label"], np.where(stored == 11, 255, stored))
        name = f"train é{i}"
        decoded = codec.read_image(tmp_path / "root" / "images" / "train" / f"{name}.jpg")
        np.testing.assert_array_equal(element["image"], decoded)  # bytes kept as they were
        assert element["id"] == name


def test_real_camvid(camvid_root, tmp_path):
    splits = camvid.find(data_config(tmp_path, root=str(camvid_root)).data).splits
    assert {split: len(pairs) for split, pairs in splits.items()} == {
        "train": 367,
        "val": 101,
        "test": 233,
    }
    image, label, _ = splits["val"][0].read()
    assert image.shape == (360, 480, 3)
    assert label.shape == (360, 480)
    assert set(np.unique(label)) <= {*range(11), 255}


# ---- Cityscapes ----------------------------------------------------------------------------------


def test_cityscapes_ids_are_paths_and_labels_train_ids(tmp_path):
    for split in ("train", "val"):
        stem = f"{split}/ulm/ulm_000000_000019"
        write_png(tmp_path / "root" / "leftImg8bit" / f"{stem}_leftImg8bit.png", picture(0))
        label = np.full(SIZE, 7, np.uint8)  # road
        label[0, :4] = (0, 33, 26, 255)  # unlabeled, bicycle, car, license plate
        write_png(tmp_path / "root" / "gtFine" / f"{stem}_gtFine_labelIds.png", label)
    dataset = data.load(data_config(tmp_path, name="cityscapes").data)
    assert dataset.sources["train"].ids == (
        "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png",
    )
    label = dataset.sources["val"][0]["label"]
    assert label[0, :5].tolist() == [255, 18, 13, 255, 0]
    assert dataset.class_names[13] == "car"
    assert len(dataset.class_names) == len(dataset.palette) == 19


def same_images(one: data.Source, other: data.Source) -> None:
    assert one.ids == other.ids
    for i in range(len(one)):
        np.testing.assert_array_equal(one[i]["image"], other[i]["image"])
        np.testing.assert_array_equal(one[i]["label"], other[i]["label"])


def test_cityscapes_archives_need_no_unpacking(tmp_path):
    tree = trees.cityscapes_tree(tmp_path / "unpacked", per_city=2, extra=2)
    for split in ("train", "val"):
        trees.zip_tree(tree, tmp_path / f"{split}.zip", (f"leftImg8bit/{split}",))
    root = tmp_path / "root"
    both = ("leftImg8bit/train", "leftImg8bit/val")
    trees.zip_tree(tree, root / "leftImg8bit_trainvaltest.zip", both)
    trees.zip_tree(tree, root / "gtFine_trainvaltest.zip", ("gtFine",))
    trees.zip_tree(tree, root / "leftImg8bit_trainextra.zip", ("leftImg8bit/train_extra",))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    config = data_config(tmp_path, name="cityscapes")
    for extra in (False, True):
        config = changed(config, cityscapes__extra=extra)
        from_zip = data.load(config.data)
        from_folders = data.load(changed(config, root=str(tree)).data)
        for split in ("train", "val"):
            same_images(from_zip.sources[split], from_folders.sources[split])
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_cityscapes_extra_images_are_unlabelled_ones(tmp_path):
    root = trees.cityscapes_tree(tmp_path / "root", per_city=4, extra=3)
    black = root / cityscapes._BLACK  # known to be broken
    write_png(black, np.zeros((*SIZE, 3), np.uint8))
    config = data_config(tmp_path, name="cityscapes")
    without = data.load(config.data).sources["train"]
    assert len(without) == 8
    config = changed(config, cityscapes__extra=True)
    dataset = data.load(config.data)
    source = dataset.sources["train"]
    assert source.ids[:8] == without.ids
    assert source.without_label == frozenset(source.ids[8:])
    assert len(source.without_label) == 3
    assert all("/train_extra/augsburg/" in name for name in source.without_label)
    assert (source[9]["label"] == 255).all()
    drawn = data.partition(config.data, dataset, 0)
    assert len(drawn.labeled) == 2  # a quarter of those that have a label
    assert not source.without_label & set(drawn.labeled)
    assert source.without_label < set(drawn.unlabeled)


def test_cityscapes_extra_images_that_are_not_there_are_an_error(tmp_path):
    trees.cityscapes_tree(tmp_path / "root", per_city=1)
    config = data_config(tmp_path, name="cityscapes", cityscapes__extra=True)
    with pytest.raises(UserError, match=r"data\.cityscapes\.extra is on.*train_extra"):
        data.load(config.data)


@pytest.mark.parametrize("name", ["../gtFine/a.png", "/etc/a.png", "a\\..\\..\\b.png", "C:\\b.png"])
def test_a_member_outside_its_archive_is_refused(tmp_path, name):
    root = trees.cityscapes_tree(tmp_path / "root", per_city=1)
    with zipfile.ZipFile(root / "gtFine_trainvaltest.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"")
    with pytest.raises(UserError, match=r"gtFine_trainvaltest\.zip holds the member .*outside"):
        data.load(data_config(tmp_path, name="cityscapes").data)


def test_a_link_in_an_archive_is_not_followed(tmp_path):
    tree = trees.cityscapes_tree(tmp_path / "unpacked", per_city=1)
    root = tmp_path / "root"
    trees.zip_tree(tree, root / "leftImg8bit_trainvaltest.zip", ("leftImg8bit",))
    secret = write_png(tmp_path / "secret.png", np.full(SIZE, 7, np.uint8))  # a valid label
    labels = trees.zip_tree(tree, tmp_path / "labels.zip", ("gtFine",))
    with (
        zipfile.ZipFile(labels) as old,
        zipfile.ZipFile(root / "gtFine_trainvaltest.zip", "w") as new,
    ):
        *others, last = old.infolist()
        for info in others:
            new.writestr(info, old.read(info))
        last.external_attr = (stat.S_IFLNK | 0o777) << 16
        new.writestr(last, str(secret))
    with pytest.raises(UserError, match=r"holds 1 images .*labelIds\.png is corrupt"):
        data.load(data_config(tmp_path, name="cityscapes").data)


def test_damaged_archives_are_named(tmp_path):
    tree = trees.cityscapes_tree(tmp_path / "unpacked", per_city=2)
    root = tmp_path / "root"
    images = trees.zip_tree(tree, root / "leftImg8bit_trainvaltest.zip", ("leftImg8bit",))
    labels = trees.zip_tree(tree, root / "gtFine_trainvaltest.zip", ("gtFine",))
    config = data_config(tmp_path, name="cityscapes").data
    whole = images.read_bytes()
    images.write_bytes(whole[:-500])
    with pytest.raises(UserError, match=r"leftImg8bit_trainvaltest\.zip cannot be read as a zip"):
        data.load(config)
    damaged = bytearray(whole)
    damaged[len(whole) // 3] ^= 0xFF  # inside the data of one member
    images.write_bytes(damaged)
    with pytest.raises(UserError, match=r"holds 1 images .*trainvaltest\.zip/leftImg8bit/.*cannot"):
        data.load(config)
    images.write_bytes(whole)
    with zipfile.ZipFile(labels) as old, zipfile.ZipFile(tmp_path / "new.zip", "w") as new:
        for info in old.infolist()[:-1]:
            new.writestr(info, old.read(info))
    shutil.move(tmp_path / "new.zip", labels)
    with pytest.raises(UserError, match=r"holds 1 images .*lindau.* has no label .*gtFine/val"):
        data.load(config)


# ---- Pascal VOC ----------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["png", "mat", "both", "folder without list"])
def test_pascal_voc_pool_is_the_same_however_it_is_given(tmp_path, labels):
    root = trees.voc_tree(tmp_path / "root", labels="mat" if labels == "mat" else "png")
    voc = root / "VOCdevkit" / "VOC2012"
    if labels == "both":  # each has what the other lacks
        (voc / "ImageSets/Segmentation/train_aug.txt").unlink()
        (voc / "SegmentationClassAug/2011_000003.png").unlink()
        write_sbd_mat(root / "SBD/cls/2011_000003.mat", trees.blocks(9, range(21), (24, 32)))
    if labels == "folder without list":  # it may hold val too, as the usual one does
        (voc / "ImageSets/Segmentation/train_aug.txt").unlink()
        shutil.copy(voc / "SegmentationClass/2008_000000.png", voc / "SegmentationClassAug")
    dataset = data.load(data_config(tmp_path, name="pascal_voc").data)
    train, val = dataset.sources["train"], dataset.sources["val"]
    own, more = ([f"{year}_{i:06d}" for i in range(4)] for year in (2007, 2011))
    assert train.ids == (*own, *more)
    assert val.ids == ("2008_000000", "2008_000001")
    assert not train.without_label
    for source, index, seed in ((train, 0, 0), (train, 7, 9), (val, 0, 4)):
        stored = source[index]["label"]
        values = trees.blocks(seed, (*range(21), 255), stored.shape)
        from_mat = source is train and index == 7 and labels in ("mat", "both")
        if not (from_mat and labels == "both"):
            np.testing.assert_array_equal(stored, values % 21 if from_mat else values)
        else:
            np.testing.assert_array_equal(stored, trees.blocks(9, range(21), (24, 32)))


def test_pascal_voc_classic_draws_from_its_own_images(tmp_path):
    trees.voc_tree(tmp_path / "root")
    config = data_config(tmp_path, name="pascal_voc", pascal_voc__pool="classic")
    config = changed(config, labeled_fraction="1/2")
    dataset = data.load(config.data)
    assert dataset.sources["train"].without_label == {f"2011_{i:06d}" for i in range(4)}
    drawn = data.partition(config.data, dataset, 0)
    assert len(drawn.labeled) == 2
    assert all(name.startswith("2007") for name in drawn.labeled)
    assert len(drawn.unlabeled) == 6
    config.data.labeled_fraction = "1"
    full = data.partition(config.data, dataset, 0)
    assert (len(full.labeled), len(full.unlabeled)) == (4, 4)


def test_pascal_voc_without_augmented_labels_is_classic_or_an_error(tmp_path):
    trees.voc_tree(tmp_path / "root", labels="none")
    config = data_config(tmp_path, name="pascal_voc")
    with pytest.raises(UserError, match=r"augmented annotations.*pascal_voc\.pool=classic"):
        data.load(config.data)
    config.data.pascal_voc.pool = "classic"
    source = data.load(config.data).sources["train"]
    assert len(source) == 4
    assert not source.without_label


def test_pascal_voc_lists_may_be_those_of_file_pairs(tmp_path):
    root = trees.voc_tree(tmp_path / "root")
    listing = root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train_aug.txt"
    ids = listing.read_text().split()
    trees.write_lines(listing, [f"/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png" for i in ids])
    config = data_config(tmp_path, name="pascal_voc").data
    assert set(data.load(config).sources["train"].ids) == set(ids)


@pytest.mark.parametrize("name", ["train_aug", "trainaug", "train"])
def test_a_val_image_on_the_train_list_of_pascal_voc_is_refused(tmp_path, name):
    root = trees.voc_tree(tmp_path / "root")
    lists = root / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    if name != "train_aug":
        (lists / "train_aug.txt").rename(lists / f"{name if name != 'train' else 'x'}.txt")
    with (lists / f"{name}.txt").open("a") as file:
        file.write("JPEGImages\\2008_000001.jpg SegmentationClass\\2008_000001.png\n")
    config = data_config(tmp_path, name="pascal_voc").data
    with pytest.raises(UserError, match=rf"{name}\.txt names 2008_000001, which .*val\.txt"):
        data.load(config)


@pytest.mark.parametrize(
    "entry", ["../../secret.jpg", "/etc/secret", "/JPEGImages/../../secret.jpg", ".."]
)
def test_pascal_voc_lists_name_no_file_elsewhere(tmp_path, entry):
    root = trees.voc_tree(tmp_path / "root")
    voc = root / "VOCdevkit/VOC2012"
    for folder_ in (root, voc, tmp_path):
        write_jpeg(folder_ / "secret.jpg", picture(0))
    trees.write_lines(voc / "ImageSets/Segmentation/val.txt", [entry])
    config = data_config(tmp_path, name="pascal_voc").data
    (pair,) = pascal_voc.find(config).splits["val"]
    assert pair.image.parent == voc / "JPEGImages"
    assert pair.label.parent == voc / "SegmentationClass"
    with pytest.raises(UserError, match=r"holds 1 images that cannot be used.* has no label"):
        data.load(config)


@pytest.mark.parametrize("entry", [b"\xff", b"a\0b", b"x" * 300, b"\x1b[2J"])
def test_pascal_voc_lists_hold_names(tmp_path, entry):
    root = trees.voc_tree(tmp_path / "root")
    path = root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    path.write_bytes(entry)
    with pytest.raises(UserError, match=r"val\.txt (holds '.*no name|cannot be read as a text)"):
        data.load(data_config(tmp_path, name="pascal_voc").data)


def test_colours_in_a_data_set_without_class_list_name_no_such_list(tmp_path):
    """As some mirrors convert the palettes of Pascal VOC."""
    root = trees.camvid_tree(tmp_path / "root")
    label = min((root / "labels/train").iterdir())
    write_png(label, np.full((24, 32, 3), (128, 0, 64), np.uint8))
    with pytest.raises(UserError, match=r"is a colour image; .* as its authors") as told:
        data.load(data_config(tmp_path).data)
    assert "classes.txt" not in str(told.value)


def test_pascal_voc_palette_is_the_official_one():
    assert pascal_voc.PALETTE[[0, 1, 15, 20]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [192, 128, 128],
        [0, 64, 128],
    ]
    assert pascal_voc.colormap()[255].tolist() == [224, 224, 192]


def test_a_damaged_mat_file_is_named(tmp_path):
    root = trees.voc_tree(tmp_path / "root", labels="mat")
    path = root / "benchmark_RELEASE/dataset/cls/2011_000001.mat"
    whole = path.read_bytes()
    for damaged in (whole[:150], whole[:-3], b"", b"MATLAB 5.0" * 30):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"holds 1 images .*2011_000001\.mat is corrupt"):
            data.load(data_config(tmp_path, name="pascal_voc").data)


@pytest.mark.parametrize("module", [camvid, cityscapes, pascal_voc])
def test_colours_are_distinct(module):
    assert len(np.unique(module.PALETTE, axis=0)) == len(module.CLASS_NAMES)


# ---- The user's own folder -----------------------------------------------------------------------


def test_folder_with_splits(tmp_path):
    trees.folder_tree(tmp_path / "root")
    config = data_config(tmp_path, name="folder", labeled_fraction="1/8")
    dataset = data.load(config.data)
    train, val = dataset.sources["train"], dataset.sources["val"]
    assert dataset.class_names == ("ground", "wide road", "sky")
    assert dataset.palette.tolist() == [[0, 0, 0], [128, 64, 128], [70, 130, 180]]
    assert len(train) == 11
    assert "train/site 1/ä01" in train.ids
    assert train.without_label == {"train/site 0/ä08", "train/site 1/ä09", "train/site 0/ä10"}
    assert val.ids == ("val/0", "val/1")
    for i, name in enumerate(train.ids):
        label = trees.blocks(int(name[-2:]), (0, 1, 2, 255))
        expected = np.full(SIZE, 255) if name in train.without_label else label
        np.testing.assert_array_equal(train[i]["label"], expected)
    drawn = data.partition(config.data, dataset, 0)
    assert len(drawn.labeled) == 1
    assert len(drawn.unlabeled) == 10


def test_folder_without_splits_keeps_every_fifth_labelled_image_for_val(tmp_path):
    trees.folder_tree(tmp_path / "root", labeled=11, unlabeled=2, splits=False, as_json=True)
    dataset = data.load(data_config(tmp_path, name="folder").data)
    train, val = dataset.sources["train"], dataset.sources["val"]
    names = sorted(f"site {i % 2}/ä{i:02d}" for i in range(11))
    assert val.ids == (names[4], names[9])
    assert set(train.ids) == {*names, "site 1/ä11", "site 0/ä12"} - set(val.ids)
    assert len(train.without_label) == 2
    assert dataset.class_names == ("ground", "wide road", "sky")
    assert dataset.palette[1:].tolist() == [[128, 64, 128], [0, 128, 0]]


def test_a_class_list_may_lie_elsewhere_and_fewer_classes_prepare_anew(tmp_path):
    trees.folder_tree(tmp_path / "root")
    (tmp_path / "two.txt").write_text("ground\r\nwide road\r\n\r\n")
    config = data_config(tmp_path, name="folder")
    data.load(config.data)
    config.data.folder.classes = str(tmp_path / "two.txt")
    with pytest.raises(UserError, match=r"label id 2 .* outside the classes 0\.\.1"):
        data.load(config.data)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("classes.txt", "a\nb\na\n", r"classes\.txt holds 'a' twice"),
        (
            "classes.txt",
            "a\n",
            r"holds 1 class, 'a'; it takes 2 to 254 different names, one a line",
        ),
        ("classes.txt", "\n".join(map(str, range(255))), r"holds 255 classes"),
        ("classes.txt", "a\nb 1 2 300", r"cannot be read \(\(1, 2, 300\) is no colour"),
        ("classes.txt", b"\xff\xfe\xff", r"classes\.txt cannot be read"),
        ("classes.txt", "a\n" + "1 " * 100_000 + "b", r"… has 200001 characters"),
        ("classes.json", "[1, 2]", r"classes\.json cannot be read"),
        ("classes.json", '{"a": 1}', r"holds a dict, not a list"),
        ("classes.json", '["a", {"color": [1, 2, 3]}]', r"classes\.json cannot be read \('name'"),
        ("classes.json", '["a", ', r"classes\.json cannot be read"),
    ],
)
def test_faults_of_class_lists_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        class_list.read_classes(path)


@pytest.mark.parametrize(
    "lines",
    [
        ["sky #abc", "road #def"],
        ["sky #804080ff", "road #804081ff"],
        ["sky 0x804080", "road"],
        ["sky 80ff80", "road 8040a0"],
        ["sky 0.5 0.5 0.5", "road"],
        ["sky 0.5", "road 0.7"],
        ["sky -1 0 0", "road 1 2 3"],
        ["sky (0, 0, 0)", "road (1, 2, 3)"],
        ["sky rgb(1,2,3)", "road rgb(4,5,6)"],
        ["sky|0|0|0", "road|1|2|3"],
        ["0 sky 1 2", "1 road 3 4"],
        ["0 0 0 0 sky", "1 1 2 3 road"],
        ["sky # above", "road"],
        ["// classes", "sky", "road"],
        ["id,name,r,g,b", "0,sky,,,", "1,road,1,2,3"],
        ["id,name", "0,", "1,road"],
        ["name,color", "sky,blue", "road,#010203"],
    ],
)
def test_what_is_no_colour_is_no_part_of_a_name(tmp_path, lines):
    (tmp_path / "c.txt").write_text("\n".join(lines))
    shown = next(line for line in lines if "," in line or len(line.split()) > 1 or "|" in line)
    shown = lines[1] if shown.startswith(("id", "name")) else shown
    with pytest.raises(UserError, match=rf"c\.txt cannot be read \(the line '{re.escape(shown)}'"):
        class_list.read_classes(tmp_path / "c.txt")


def test_names_that_end_in_numbers_or_look_alike(tmp_path):
    (tmp_path / "c.txt").write_text("C#\nlane #2\nzone 1 2\nclass 80\nm²/s\n")
    names = class_list.read_classes(tmp_path / "c.txt").names
    assert names == ("C#", "lane #2", "zone 1 2", "class 80", "m²/s")
    (tmp_path / "c.txt").write_text("e\u0301\n\u00e9\n")
    with pytest.raises(UserError, match="twice"):
        class_list.read_classes(tmp_path / "c.txt")
    (tmp_path / "c.txt").write_text("Pixel Value, Class\n1, road\n0, sky\n")  # Roboflow's
    assert class_list.read_classes(tmp_path / "c.txt").names == ("sky", "road")


def test_halves_of_characters_and_bottomless_lists_are_named(tmp_path):
    path = tmp_path / "classes.json"
    for content in ('["a", "\\ud800"]', "[" * 100_000):
        path.write_text(content)
        with pytest.raises(UserError, match=r"classes\.json cannot be read"):
            class_list.read_classes(path)


def test_names_and_colours_of_classes(tmp_path):
    (tmp_path / "c.txt").write_text("Straße 7 1 2 3\ntype 2\nsea, deep #0A0b0C\nsky\t4,5, 6\n")
    names, palette, colors, *_ = class_list.read_classes(tmp_path / "c.txt")
    assert colors == {0: (1, 2, 3), 2: (10, 11, 12), 3: (4, 5, 6)}
    assert names == ("Straße 7", "type 2", "sea, deep", "sky")
    assert palette.tolist() == [[1, 2, 3], [128, 0, 0], [10, 11, 12], [4, 5, 6]]
    (tmp_path / "c.json").write_text(json.dumps(["a", {"name": "b", "color": [9, 9, 9]}]))
    names, palette, *_ = class_list.read_classes(tmp_path / "c.json")
    assert (names, palette[1].tolist()) == (("a", "b"), [9, 9, 9])


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("trainset", "valset"),
        ("train_set", "Val_Set"),
        ("01_training", "02_validation"),
        ("Train data", "test data"),
        ("train1", "val1"),
        ("trainA", "testA"),
        ("train_images", "dev-images"),
    ],
)
def test_folders_that_look_like_splits_are_never_pooled(tmp_path, train, val):
    root = tmp_path / "root"
    trees.folder_tree(root)
    for kind in ("images", "labels"):
        (root / kind / "train").rename(root / kind / train)
        (root / kind / "val").rename(root / kind / val)
    with pytest.raises(UserError, match=rf"Call images/{train} images/train and images/{val} "):
        data.load(data_config(tmp_path, name="folder").data)


@pytest.mark.parametrize("names", [("training camp", "site 2"), ("validity", "contest"), "ab"])
def test_folders_that_are_no_splits_are_one_data_set(tmp_path, names):
    root = tmp_path / "root"
    trees.folder_tree(root)
    for kind in ("images", "labels"):
        for old, new in zip(("train", "val"), names, strict=True):
            (root / kind / old).rename(root / kind / new)
    assert data.load(data_config(tmp_path, name="folder").data).sources.keys() == {"train", "val"}


@pytest.mark.parametrize(
    ("moved", "message"),
    [
        ({"images": "data/images", "labels": "data/labels"}, r"or name .*/root/data as data\.root"),
        (
            {"images": "train/images", "labels": "train/labels"},
            r"move train/images to images/train",
        ),
    ],
)
def test_a_folder_too_deep_is_told_with_the_way_out(tmp_path, moved, message):
    root = tmp_path / "root"
    trees.folder_tree(root)
    (root / "classes.txt").unlink()
    for old, new in moved.items():
        (root / new).parent.mkdir(exist_ok=True)
        (root / old).rename(root / new)
    with pytest.raises(UserError, match=f"has no folder images; .*{message}"):
        data.load(data_config(tmp_path, name="folder").data)


def remove(*paths):
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: remove(root / "classes.txt"), r"no class list, classes\.txt or classes"),
        (lambda root: remove(root / "images"), r"has no folder images"),
        (lambda root: remove(root / "labels"), r"has no folder labels"),
        (lambda root: remove(root / "images/val/0.jpg"), r"1 labels without image, the .*val/0"),
        (
            lambda root: remove(root / "labels/val/1.png"),
            r"no label labels/val/1\.png \(1 of the 2",
        ),
        (lambda root: remove(root / "labels/train"), r"11 of the 11 images of train lack theirs"),
        (lambda root: remove(root / "images/val", root / "labels/val"), r"no images for val"),
        (
            lambda root: write_png(root / "images/extra/a.png", picture(0)),
            r"there is .*extra/a\.png",
        ),
        (lambda root: write_png(root / "images/a.png", picture(0)), r"must be in one of"),
        (
            lambda root: write_png(
                root / "labels/train/site 1/ä01.png", np.full((24, 32), 7, np.uint8)
            ),
            r"the label id 7 \(768 px\), outside .*; data\.folder\.label_values maps other",
        ),
        (
            lambda root: write_png(root / "images/train/site 1/ä01.png", picture(0)),
            r"ä01\.jpg and .*ä01\.png share one label",
        ),
    ],
)
def test_faults_of_a_folder_are_named(tmp_path, spoil, message):
    spoil(trees.folder_tree(tmp_path / "root"))
    with pytest.raises(UserError, match=message):
        data.load(data_config(tmp_path, name="folder").data)


def test_files_that_macos_leaves_are_not_images(tmp_path):
    root = trees.folder_tree(tmp_path / "root")
    (root / "images/train/._a.png").write_bytes(b"\0\5\x16\7")
    assert len(data.load(data_config(tmp_path, name="folder").data).sources["train"]) == 11


# ---- Kinds of files ------------------------------------------------------------------------------


def with_exif_rotation(jpeg: bytes, orientation: int) -> bytes:
    """Adds an EXIF segment whose one tag is the orientation."""
    tiff = (
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0" + bytes([orientation]) + b"\0\0\0\0\0\0"
    )
    body = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + jpeg[2:]


def test_images_of_all_kinds_come_as_rgb(tmp_path):
    root = trees.folder_tree(tmp_path / "root", labeled=8, unlabeled=0)
    images = root / "images/train"
    rgb = picture(1)
    alpha = np.random.default_rng(0).integers(0, 256, (*SIZE, 1), np.uint8)
    write_png(images / "site 0/ä00.png", np.concatenate((rgb, alpha), -1))
    write_png(images / "site 0/ä02.png", rgb[..., 0])
    write_png(images / "site 0/ä04.png", rgb[..., 0].astype(np.uint16) * 257)
    write_palette_png(images / "site 0/ä06.png", rgb[..., 0])
    plain = write_jpeg(images / "site 1/ä01.jpg", rgb)
    turned = images / "site 1/ä03.jpg"
    turned.write_bytes(with_exif_rotation(plain.read_bytes(), 6))
    write_png(root / "labels/train/site 1/ä03.png", np.zeros(SIZE[::-1], np.uint8))
    source = data.load(data_config(tmp_path, name="folder").data).sources["train"]
    found = {source.ids[i][-2:]: source[i]["image"] for i in range(len(source))}
    grey = np.repeat(rgb[..., :1], 3, -1)
    np.testing.assert_array_equal(found["00"], rgb)
    np.testing.assert_array_equal(found["02"], grey)
    np.testing.assert_array_equal(found["04"], grey)
    np.testing.assert_array_equal(found["06"], trees.VOC_COLORS[rgb[..., 0]])
    np.testing.assert_array_equal(found["03"], np.rot90(found["01"], -1))  # upright


def test_a_label_drawn_on_the_image_as_stored_is_an_error_that_says_so(tmp_path):
    root = trees.folder_tree(tmp_path / "root")
    image = root / "images/train/site 1/ä01.jpg"
    image.write_bytes(with_exif_rotation(image.read_bytes(), 6))
    with pytest.raises(UserError, match=r"is 24x32 but .* is 32x24 .*EXIF orientation turns it up"):
        data.load(data_config(tmp_path, name="folder").data)


def test_labels_of_all_kinds_come_as_class_ids(tmp_path):
    root = trees.folder_tree(tmp_path / "root", labeled=6, unlabeled=0)
    labels = root / "labels/train"
    ids = trees.blocks(5, (0, 1, 2, 255))
    write_png(labels / "site 0/ä00.png", ids.astype(np.uint16))
    (root / "classes.txt").write_text("ground\nroad\nsky\n")
    # A palette of other colours, of which two are the same.
    write_palette_png(labels / "site 0/ä02.png", ids, np.full((256, 3), 7, np.uint8))
    write_palette_png(labels / "site 1/ä01.png", ids % 3, np.eye(3, dtype=np.uint8))  # 2 bits
    write_png(labels / "site 1/ä03.png", np.full(SIZE, 255, np.uint8))
    source = data.load(data_config(tmp_path, name="folder").data).sources["train"]
    found = {source.ids[i][-2:]: source[i]["label"] for i in range(len(source))}
    np.testing.assert_array_equal(found["00"], ids)
    np.testing.assert_array_equal(found["02"], ids)
    np.testing.assert_array_equal(found["01"], ids % 3)
    assert (found["03"] == 255).all()
    assert not source.without_label  # "all ignored" is a label


# ---- The first look ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "root", "message"),
    [
        ("camvid", "", r"data\.root is not set; pass --config\.data\.root=DIR"),
        ("camvid", "missing", r"data\.root .*missing is not a folder"),
        ("camvid", "empty", r"data\.root .*empty has no images for train, val"),
        ("cityscapes", "empty", r"no images for train, val; expected leftImg8bit"),
        ("pascal_voc", "empty", r"lacks ImageSets/Segmentation/train\.txt"),
        ("folder", "empty", r"no folder images. Images belong in images/"),
        ("camvit", "empty", r"data\.name is 'camvit'.* did you mean camvid\?"),
    ],
)
def test_a_wrong_root_or_name_says_the_way_out(tmp_path, name, root, message):
    (tmp_path / "empty").mkdir()
    config = data_config(tmp_path, name=name, root=str(tmp_path / root) if root else "").data
    with pytest.raises(UserError, match=message):
        data.load(config)


@pytest.mark.parametrize("unlabeled", [0, 3])
def test_one_labelled_image_alone_is_an_error(tmp_path, unlabeled):
    root = tmp_path / "root"
    for i in range(1 + unlabeled):
        write_png(root / f"images/{i}.png", picture(i))
    write_png(root / "labels/0.png", np.zeros(picture(0).shape[:2], np.uint8))
    (root / "classes.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"has a label for one image alone, 0\. Label one more"):
        data.load(data_config(tmp_path, name="folder").data)


def test_two_images_of_one_name_are_an_error(tmp_path):
    root = trees.camvid_tree(tmp_path / "root")
    write_png(root / "images/train/train é1.png", picture(0))
    with pytest.raises(UserError, match=r"two images train é1 in train"):
        data.load(data_config(tmp_path).data)


def test_half_an_image_size_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"data\.image_size is \(0, 64\)"):
        data.load(data_config(tmp_path, image_size=(0, 64)).data)


def test_an_unknown_split_is_an_error(tmp_path):
    trees.camvid_tree(tmp_path / "root")
    with pytest.raises(UserError, match=r"no split 'tset'; it has train, val"):
        data.load(data_config(tmp_path).data).source("tset")
