"""From the user's folder to batches: layouts, faults, partitions, transforms, resuming."""

import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import numpy as np
import pytest

from csc_jax import data
from csc_jax.config import default_config
from csc_jax.data import builder, camvid, cityscapes, codec, pascal_voc, transforms
from csc_jax.errors import UserError

SIZE = (24, 32)  # (height, width) px


def write_png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(codec.encode_png(pixels))


def write_jpeg(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".jpg", pixels[..., ::-1])[1].tobytes())


def write_palette_png(path, index, colors):
    """Writes (H, W) indices the way Pascal VOC stores them, as a PNG with a palette."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(index)
    image.putpalette(colors.ravel().tolist())
    assert image.mode == "P"
    image.save(path)


def picture(seed, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def make_camvid(root, train=8, val=3, size=SIZE):
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            label = np.random.default_rng(i).integers(0, 12, size, np.uint8)
            write_jpeg(root / "images" / split / f"{split} é{i}.jpg", picture(i, size))
            write_png(root / "labels" / split / f"{split} é{i}.png", label)
    return root


def make_config(tmp_path, **fields):
    """Returns a whole config on a CamVid tree in tmp_path/root, with fields of `data` changed."""
    c = default_config()
    c.data.name, c.data.root = "camvid", str(tmp_path / "root")
    c.data.cache_dir = str(tmp_path / "cache")
    c.data.crop_size, c.data.labeled_fraction = (16, 16), "1/4"
    c.batch.labeled, c.batch.unlabeled = 2, 3
    c.data.update(fields)
    return c


@pytest.fixture
def camvid_config(tmp_path):
    make_camvid(tmp_path / "root")
    return make_config(tmp_path)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same_batches(first, second):
    for one, other in zip(first, second, strict=True):
        for half in ("labeled", "unlabeled"):
            for key in ("image", "label", "inside"):
                np.testing.assert_array_equal(one[half][key], other[half][key])


# ---- Layouts -------------------------------------------------------------------------------------


def test_camvid_is_read_in_name_order_and_void_is_ignored(camvid_config, tmp_path):
    dataset = data.load(camvid_config.data)
    train = dataset.sources["train"]
    assert dataset.class_names[0] == "sky"
    assert set(dataset.sources) == {"train", "val"}
    assert train.ids == tuple(f"train é{i}" for i in range(8))
    assert train.max_size == SIZE
    for i, element in enumerate(train[k] for k in range(len(train))):
        stored = np.random.default_rng(i).integers(0, 12, SIZE, np.uint8)
        np.testing.assert_array_equal(element["label"], np.where(stored == 11, 255, stored))
        name = f"train é{i}"
        decoded = codec.read_image(tmp_path / "root" / "images" / "train" / f"{name}.jpg")
        np.testing.assert_array_equal(element["image"], decoded)  # bytes kept as they were
        assert element["id"] == name


def test_channels_are_rgb(tmp_path):
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    write_png(tmp_path / "red.png", red)
    np.testing.assert_array_equal(data.read_image(tmp_path / "red.png"), red)


def test_cityscapes_ids_are_paths_and_labels_train_ids(tmp_path):
    for split in ("train", "val"):
        stem = f"{split}/ulm/ulm_000000_000019"
        write_png(tmp_path / "root" / "leftImg8bit" / f"{stem}_leftImg8bit.png", picture(0))
        label = np.full(SIZE, 7, np.uint8)  # road
        label[0, :4] = (0, 33, 26, 255)  # unlabeled, bicycle, car, license plate
        write_png(tmp_path / "root" / "gtFine" / f"{stem}_gtFine_labelIds.png", label)
    dataset = data.load(make_config(tmp_path, name="cityscapes").data)
    assert dataset.sources["train"].ids == (
        "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png",
    )
    label = dataset.sources["val"][0]["label"]
    assert label[0, :5].tolist() == [255, 18, 13, 255, 0]
    assert dataset.class_names[13] == "car"
    assert len(dataset.class_names) == len(dataset.palette) == 19


@pytest.mark.parametrize("augmented", [False, True])
def test_pascal_voc_reads_palettes_and_prefers_the_larger_pool(tmp_path, augmented):
    voc = tmp_path / "root" / "VOCdevkit" / "VOC2012"
    index = np.zeros(SIZE, np.uint8)
    index[0, :3] = (20, 15, 255)
    colors = pascal_voc._COLORMAP
    for name in ("2007_000033", "2008_000008", "2011_003276"):
        write_jpeg(voc / "JPEGImages" / f"{name}.jpg", picture(0))
        write_palette_png(voc / "SegmentationClass" / f"{name}.png", index, colors)
    lists = voc / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2008_000008\n")
    (lists / "val.txt").write_text("2007_000033\n")
    if augmented:  # these labels come as plain grey-scale PNGs
        (lists / "train_aug.txt").write_text("2011_003276\n2008_000008\n")
        for name in ("2008_000008", "2011_003276"):
            write_png(voc / "SegmentationClassAug" / f"{name}.png", index)
    dataset = data.load(make_config(tmp_path, name="pascal_voc").data)
    expected = ("2011_003276", "2008_000008") if augmented else ("2008_000008",)
    assert dataset.sources["train"].ids == expected
    for split in ("train", "val"):
        np.testing.assert_array_equal(dataset.sources[split][0]["label"], index)


def test_pascal_voc_palette_is_the_official_one():
    assert pascal_voc.PALETTE[[0, 1, 15, 20]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [192, 128, 128],
        [0, 64, 128],
    ]
    assert pascal_voc._COLORMAP[255].tolist() == [224, 224, 192]


@pytest.mark.parametrize("module", [camvid, cityscapes, pascal_voc])
def test_colours_are_distinct(module):
    assert len(np.unique(module.PALETTE, axis=0)) == len(module.CLASS_NAMES)


def test_real_camvid(camvid_root, tmp_path):
    splits = camvid.find(str(camvid_root))
    assert {split: len(pairs) for split, pairs in splits.items()} == {
        "train": 367,
        "val": 101,
        "test": 233,
    }
    image, label, _ = splits["val"][0].read()
    assert image.shape == (360, 480, 3)
    assert label.shape == (360, 480)
    assert set(np.unique(label)) <= {*range(11), 255}


# ---- Preparing -----------------------------------------------------------------------------------


def prepared(tmp_path):
    """Returns the folders of the cache that a run would take for whole."""
    return sorted((tmp_path / "cache").glob("*/*/1.0.0"))


def test_second_run_reads_the_cache_and_a_changed_file_prepares_anew(
    camvid_config, tmp_path, caplog
):
    caplog.set_level("INFO", "csc_jax")
    data.load(camvid_config.data)
    assert "Preparing camvid: checking 11 images" in caplog.text
    assert str(prepared(tmp_path)[0].parents[1]) in caplog.text
    caplog.clear()
    data.load(camvid_config.data)
    assert not caplog.records
    write_png(tmp_path / "root/labels/train/train é0.png", np.zeros(SIZE, np.uint8))
    assert (data.load(camvid_config.data).sources["train"][0]["label"] == 0).all()
    assert len(prepared(tmp_path)) == 2


def test_nothing_is_printed(camvid_config, capfd):
    data.load(camvid_config.data)
    assert capfd.readouterr() == ("", "")


def test_image_size_is_what_is_stored(camvid_config):
    camvid_config.data.image_size = (12, 20)
    dataset = data.load(camvid_config.data)
    element = dataset.sources["val"][0]
    assert element["image"].shape == (12, 20, 3)
    stored = np.random.default_rng(0).integers(0, 12, SIZE, np.uint8)
    assert set(np.unique(element["label"])) <= {*stored.ravel().tolist(), 255}
    assert dataset.sources["train"].max_size == (12, 20)


def test_synthetic_fields_are_part_of_the_fingerprint(tmp_path):
    config = make_config(tmp_path, name="synthetic").data
    config.synthetic.update({"train": 4, "val": 2, "size": (16, 16)})
    first = data.load(config)
    config.synthetic.seed = 1
    second = data.load(config)
    assert len(prepared(tmp_path)) == 2
    assert (first.sources["val"][1]["image"] != second.sources["val"][1]["image"]).any()


class Crashing:
    """An example with an accident while it is read."""

    id = "crash"

    def __init__(self, action):
        self.action = action

    def fingerprint(self):
        return "same"

    def read(self):
        self.action()
        return picture(0), np.zeros(SIZE, np.uint8), None


def prepare(cache, action):
    splits = {"train": [Crashing(lambda: None), Crashing(action)], "val": [Crashing(lambda: None)]}
    return builder.prepare("crash", ("a",), np.zeros((1, 3), np.uint8), splits, str(cache), (0, 0))


def test_an_interrupted_preparation_starts_over(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "cache", interrupt)
    assert not prepared(tmp_path)
    assert len(prepare(tmp_path / "cache", lambda: None).sources["train"]) == 2


def test_a_killed_preparation_starts_over(tmp_path):
    script = textwrap.dedent(
        f"""
        import os, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_data
        test_data.prepare({str(tmp_path / "cache")!r}, lambda: os._exit(9))
        """
    )
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == 9
    assert list((tmp_path / "cache").glob("*/*/incomplete*"))  # it had begun
    assert not prepared(tmp_path)
    assert len(prepare(tmp_path / "cache", lambda: None).sources["train"]) == 2


def test_two_runs_that_prepare_at_once_agree(tmp_path):
    other = []

    def meanwhile():
        if not other:
            other.append(None)
            other[0] = prepare(tmp_path / "cache", lambda: None)

    mine = prepare(tmp_path / "cache", meanwhile)
    np.testing.assert_array_equal(
        mine.sources["train"][1]["image"], other[0].sources["train"][1]["image"]
    )
    assert not list((tmp_path / "cache").glob("*/*/incomplete*"))


def test_a_cache_that_cannot_be_written_names_its_field(camvid_config, tmp_path):
    (tmp_path / "file").write_text("")
    camvid_config.data.cache_dir = str(tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        data.load(camvid_config.data)


def test_a_source_can_go_to_another_process(camvid_config):
    source = data.load(camvid_config.data).sources["train"]
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[3]["image"], source[3]["image"])


# ---- Faults in the user's files ------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


FAULTS = {
    "no label": (
        lambda root: (root / "labels/train/train é1.png").unlink(),
        r"train é1\.jpg has no label .*labels/train/train é1\.png",
    ),
    "sizes differ": (
        lambda root: write_png(root / "labels/train/train é1.png", np.zeros((24, 30), np.uint8)),
        r"train é1\.png is 24x30 but its image .*train é1\.jpg is 24x32",
    ),
    "id outside the classes": (
        lambda root: write_png(root / "labels/val/val é1.png", np.full(SIZE, 12, np.uint8)),
        r"val é1\.png holds the label id 12 \(768 px\), outside the classes 0\.\.10",
    ),
    "16 bits": (
        lambda root: (root / "labels/val/val é1.png").write_bytes(
            cv2.imencode(".png", np.full(SIZE, 3000, np.uint16))[1].tobytes()
        ),
        r"val é1\.png holds the label id 3000",
    ),
    "colours for ids": (
        lambda root: write_png(root / "labels/val/val é1.png", picture(0)),
        r"val é1\.png is a colour image",
    ),
    "truncated JPEG": (
        lambda root: truncate(root / "images/train/train é2.jpg"),
        r"train é2\.jpg is corrupt or truncated",
    ),
    "truncated PNG": (
        lambda root: truncate(root / "labels/train/train é2.png"),
        r"train é2\.png is corrupt or truncated",
    ),
    "empty file": (
        lambda root: (root / "images/train/train é2.jpg").write_bytes(b""),
        r"train é2\.jpg is corrupt or truncated",
    ),
    "unreadable": (
        lambda root: make_unreadable(root / "images/train/train é2.jpg"),
        r"train é2\.jpg cannot be read: Is a directory",
    ),
}


def make_unreadable(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_named_and_nothing_is_kept(camvid_config, tmp_path, fault):
    spoil, message = FAULTS[fault]
    spoil(tmp_path / "root")
    for _ in range(2):  # the second run must not find a folder of the first
        with pytest.raises(UserError, match=message) as caught:
            data.load(camvid_config.data)
        assert "data.root holds 1 images" in str(caught.value)
    assert not prepared(tmp_path)


def test_all_bad_files_are_counted_and_ten_are_named(tmp_path):
    make_camvid(tmp_path / "root", train=9, val=4)
    for path in (tmp_path / "root/labels").glob("*/*.png"):
        path.unlink()
    with pytest.raises(UserError, match=r"holds 13 images .* and 3 more") as caught:
        data.load(make_config(tmp_path).data)
    assert str(caught.value).count("has no label") == 10


def test_a_colour_of_no_class_is_named(tmp_path):
    pair = builder.Pair(
        "a", tmp_path / "a.jpg", tmp_path / "a.png", pascal_voc._LABEL_IDS, pascal_voc._COLORMAP
    )
    write_jpeg(pair.image, picture(0))
    write_png(pair.label, np.full((*SIZE, 3), (1, 2, 3), np.uint8))
    with pytest.raises(builder.BadExample, match=r"the colour \(1, 2, 3\)"):
        pair.read()


@pytest.mark.parametrize(
    ("name", "root", "message"),
    [
        ("camvid", "", r"data\.root is not set; pass --config\.data\.root=DIR"),
        ("camvid", "missing", r"data\.root .*missing is not a folder"),
        ("camvid", "empty", r"data\.root .*empty has no images for train, val"),
        ("cityscapes", "empty", r"no images for train, val; expected leftImg8bit"),
        ("pascal_voc", "empty", r"lacks ImageSets/Segmentation/train\.txt"),
        ("camvit", "empty", r"data\.name is 'camvit'.* did you mean camvid\?"),
    ],
)
def test_a_wrong_root_or_name_says_the_way_out(tmp_path, name, root, message):
    (tmp_path / "empty").mkdir()
    config = make_config(tmp_path, name=name, root=str(tmp_path / root) if root else "").data
    with pytest.raises(UserError, match=message):
        data.load(config)


def test_two_images_of_one_name_are_an_error(camvid_config, tmp_path):
    write_png(tmp_path / "root/images/train/train é1.png", picture(0))
    with pytest.raises(UserError, match=r"two images train é1 in train"):
        data.load(camvid_config.data)


def test_half_an_image_size_is_an_error(camvid_config):
    camvid_config.data.image_size = (0, 64)
    with pytest.raises(UserError, match=r"data\.image_size is \(0, 64\)"):
        data.load(camvid_config.data)


def test_an_unknown_split_is_an_error(camvid_config):
    with pytest.raises(UserError, match=r"no split 'tset'; it has train, val"):
        data.load(camvid_config.data).source("tset")


# ---- Partitions ----------------------------------------------------------------------------------


def fake_dataset(ids):
    source = data.Source(ids=tuple(ids), max_size=SIZE, records=())
    return data.Dataset("fake", ("a",), np.zeros((1, 3), np.uint8), {"train": source})


@pytest.mark.parametrize(
    ("images", "fraction", "labeled"),
    [
        (367, "1/2", 184),
        (367, "1/4", 92),
        (367, "1/8", 46),
        (367, "1/16", 23),
        (2975, "1/16", 186),  # published counts from here on
        (2975, "1/8", 372),
        (2975, "1/4", 744),
        (2975, "1/2", 1488),
        (10582, "1/16", 662),
        (10582, "1/8", 1323),
        (10582, "1/4", 2646),
        (10582, "1/2", 5291),
    ],
)
def test_draw_has_the_published_size_and_follows_the_seed(tmp_path, images, fraction, labeled):
    dataset = fake_dataset(f"{i:05d}" for i in range(images))
    config = make_config(tmp_path, labeled_fraction=fraction).data
    drawn = data.partition(config, dataset, seed=0)
    assert len(drawn.labeled) == labeled
    assert sorted(drawn.labeled + drawn.unlabeled) == list(dataset.sources["train"].ids)
    assert data.partition(config, dataset, seed=0) == drawn
    assert data.partition(config, dataset, seed=1) != drawn


def test_everything_labelled_is_also_the_unlabelled_list(tmp_path):
    dataset = fake_dataset("abcd")
    config = make_config(tmp_path, labeled_fraction="1").data
    assert data.partition(config, dataset, 0) == (tuple("abcd"), tuple("abcd"))


def test_nothing_left_unlabelled_is_an_error(tmp_path):
    config = make_config(tmp_path, labeled_fraction="1/2").data
    with pytest.raises(UserError, match=r"data\.labeled_fraction .* of 1 train images"):
        data.partition(config, fake_dataset("a"), 0)


def lists_config(tmp_path, labeled, unlabeled=None):
    (tmp_path / "labeled.txt").write_bytes(labeled)
    config = make_config(tmp_path, labeled_list=str(tmp_path / "labeled.txt")).data
    if unlabeled is not None:
        (tmp_path / "unlabeled.txt").write_bytes(unlabeled)
        config.unlabeled_list = str(tmp_path / "unlabeled.txt")
    return config


def test_lists_may_have_windows_line_ends_and_blank_last_lines(tmp_path):
    dataset = fake_dataset(["c/é 1.png", "c/2.png", "c/3.png", "c/4.png"])
    config = lists_config(tmp_path, "\ufeffc/é 1.png\r\nc/3.png\r\n\r\n".encode(), b"c/4.png\n\n")
    assert data.partition(config, dataset, 0) == (("c/é 1.png", "c/3.png"), ("c/4.png",))
    config.unlabeled_list = ""
    assert data.partition(config, dataset, 0).unlabeled == ("c/2.png", "c/4.png")


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "message"),
    [
        (b"a\nx1\nx2\nx3\nx4\n", None, r"data\.labeled_list .*names x1, x2, x3 and 1 more, not in"),
        (b"a\nb\na\n", None, r"data\.labeled_list .*names a more than once"),
        (b"a\nb\n", b"c\nb\n", r"share b; an image may be in one"),
        (b"a\n", b"c\nz\n", r"data\.unlabeled_list .*names z"),
        (b"\n", None, r"data\.labeled_list .*holds no id"),
        (b"a\nb\nc\n", None, r"leaves none unlabelled.*data\.labeled_fraction"),
        (b"\xff\xfe", None, r"cannot be read as a text file"),
    ],
)
def test_faults_in_lists_are_named(tmp_path, labeled, unlabeled, message):
    with pytest.raises(UserError, match=message):
        data.partition(lists_config(tmp_path, labeled, unlabeled), fake_dataset("abc"), 0)


def test_a_missing_list_or_the_second_list_alone_is_an_error(tmp_path):
    config = make_config(tmp_path, labeled_list="nowhere.txt").data
    with pytest.raises(UserError, match=r"data\.labeled_list nowhere\.txt cannot be read"):
        data.partition(config, fake_dataset("abc"), 0)
    config = make_config(tmp_path, unlabeled_list="some.txt").data
    with pytest.raises(UserError, match=r"data\.labeled_list is empty"):
        data.partition(config, fake_dataset("abc"), 0)


def test_a_written_partition_can_be_read_as_lists(tmp_path):
    dataset = fake_dataset(f"straße {i}" for i in range(10))
    config = make_config(tmp_path, labeled_fraction="1/2").data
    drawn = data.partition(config, dataset, 3)
    data.write_partition(drawn, tmp_path / "run")
    config.labeled_list = str(tmp_path / "run/splits/labeled.txt")
    config.unlabeled_list = str(tmp_path / "run/splits/unlabeled.txt")
    assert data.partition(config, dataset, 4) == drawn


# ---- Transforms ----------------------------------------------------------------------------------


def coordinate_image(height=60, width=80):
    """An image whose colour is its place, (y, x, 0) in steps of 3, and the same place as label."""
    y, x = np.mgrid[:height, :width]
    image = np.stack((3 * y, 3 * x, 0 * x), -1).astype(np.uint8)
    return image, y.astype(np.uint8), x.astype(np.uint8)


# Of (image, label, rng). The sizes of "resize down" divide by odd numbers: halving has no middle
# pixel to copy, so that any choice is half a pixel off.
TRANSFORMS = {
    "resize down": lambda *maps, rng: transforms.resize(*maps, (20, 16)),
    "resize up": lambda *maps, rng: transforms.resize(*maps, (90, 120)),
    "random resize": lambda *maps, rng: transforms.random_resize(*maps, rng, (0.5, 2.0)),
    "crop inside": lambda *maps, rng: transforms.random_crop(*maps, rng, (24, 36), (0, 0, 99)),
    "crop with padding": lambda *maps, rng: transforms.random_crop(
        *maps, rng, (70, 36), (0, 0, 99)
    ),
    "flip": lambda *maps, rng: transforms.random_flip(maps, rng),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_label_moves_with_the_image(name):
    """Two labels hold each pixel's own y and x; after the transform they still say its colour."""
    image, label_y, label_x = coordinate_image()
    for seed in range(8):
        move = TRANSFORMS[name]
        moved, moved_y, *mask = move(image, label_y, rng=np.random.default_rng(seed))
        moved_x = move(image, label_x, rng=np.random.default_rng(seed))[1]
        inside = mask[0] if mask else np.ones(moved_y.shape, bool)
        assert (inside == (moved_y != 255)).all()
        for channel, label in ((0, moved_y), (1, moved_x)):
            gap = moved[..., channel].astype(float) / 3 - label
            # Nearest neighbour is off by up to half a source pixel; a shift would show in the mean.
            assert np.abs(gap[inside]).max() <= 1.0
            assert abs(gap[inside].mean()) < 0.25
        assert set(np.unique(moved_y[inside])) <= set(range(60))


def test_padding_is_the_fill_colour_and_ignored_and_the_image_lies_anywhere():
    image, label = np.zeros((10, 12, 3), np.uint8), np.ones((10, 12), np.uint8)
    corners = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        crop, crop_label, inside = transforms.random_crop(image, label, rng, (14, 12), (9, 8, 7))
        assert inside.sum() == 120
        assert (crop[~inside] == (9, 8, 7)).all()
        assert (crop_label[~inside] == 255).all()
        assert (crop_label[inside] == 1).all()
        corners.add(int(np.argwhere(inside)[0, 0]))
    assert corners == {0, 1, 2, 3, 4}


def test_every_window_of_a_crop_is_possible():
    image, y, _ = coordinate_image(20, 20)
    starts = set()
    for seed in range(200):
        _, label, _ = transforms.random_crop(
            image, y, np.random.default_rng(seed), (17, 20), (0, 0, 0)
        )
        starts.add(int(label[0, 0]))
    assert starts == {0, 1, 2, 3}


def test_scale_is_down_or_up_equally_often():
    image, label = np.zeros((100, 100, 3), np.uint8), np.zeros((100, 100), np.uint8)
    rng = np.random.default_rng(0)
    sides = np.array(
        [transforms.random_resize(image, label, rng, (0.5, 2.0))[1].shape[0] for _ in range(400)]
    )
    assert sides.min() >= 50
    assert sides.max() <= 200
    assert 0.42 < (sides < 100).mean() < 0.58
    assert abs(sides[sides < 100].mean() - 75) < 3
    assert abs(sides[sides > 100].mean() - 150) < 6


def test_flip_is_fair():
    maps = (np.arange(2)[None],)
    rng = np.random.default_rng(0)
    flips = [transforms.random_flip(maps, rng)[0][0, 0] for _ in range(400)]
    assert 0.42 < np.mean(flips) < 0.58


# ---- Batches -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Config, data set and partition (2 labelled, 6 unlabelled) of a CamVid tree."""
    folder = tmp_path_factory.mktemp("data")
    make_camvid(folder / "root")
    config = make_config(folder)
    dataset = data.load(config.data)
    return config, dataset, data.partition(config.data, dataset, 0)


def changed(config, **fields):
    """Returns a copy of a config with fields of `data` changed."""
    copy = config.copy_and_resolve_references()
    copy.data.update(fields)
    return copy


def test_batches_have_fixed_shapes(loaded):
    for batch in take(data.train_iterator(*loaded), 5):
        for half, count in (("labeled", 2), ("unlabeled", 3)):
            image, label, inside = (batch[half][key] for key in ("image", "label", "inside"))
            assert image.shape == (count, 16, 16, 3)
            assert label.shape == inside.shape == (count, 16, 16)
            assert (image.dtype, label.dtype, inside.dtype) == (np.uint8, np.uint8, bool)


def test_padding_is_the_mean_of_the_config(loaded):
    config = changed(loaded[0], crop_size=(24, 32), scale_range=(0.5, 1.0))
    padded = [b["labeled"] for b in take(data.train_iterator(config, *loaded[1:]), 20)]
    outside = np.concatenate([half["image"][~half["inside"]] for half in padded])
    assert len(outside)
    assert (outside == (124, 116, 104)).all()
    assert all((half["label"][~half["inside"]] == 255).all() for half in padded)


def test_batches_follow_the_seed_and_not_the_threads(loaded):
    config, dataset, partition = loaded
    first = take(data.train_iterator(*loaded), 6)
    more_threads = changed(config, threads=4, prefetch=6)
    assert_same_batches(first, take(data.train_iterator(more_threads, dataset, partition), 6))
    config = changed(config)
    config.seed = 1
    other = take(data.train_iterator(config, dataset, partition), 6)
    assert any(
        (a["unlabeled"]["image"] != b["unlabeled"]["image"]).any()
        for a, b in zip(first, other, strict=True)
    )


def test_resuming_continues_with_the_very_next_batch(loaded):
    iterator = data.train_iterator(*loaded)
    take(iterator, 5)
    state = pickle.loads(pickle.dumps(iterator.get_state()))
    expected = take(iterator, 6)  # crosses the end of a pass of both lists
    resumed = data.train_iterator(*loaded)
    resumed.set_state(state)
    assert_same_batches(expected, take(resumed, 6))


def plain_views(config):
    """Switches all augmentation off, so that a crop is its image."""
    return changed(config, crop_size=SIZE, scale_range=(1.0, 1.0), flip=False)


def order_of(config, dataset, partition, half, count):
    """Returns the indices of the images of a stream, in the order they come."""
    source = dataset.sources["train"]
    known = {source[i]["image"].tobytes(): i for i in range(len(source))}
    batches = take(data.train_iterator(plain_views(config), dataset, partition), count)
    return [known[image.tobytes()] for batch in batches for image in batch[half]["image"]]


def test_each_pass_shows_every_image_once_in_a_new_order(loaded):
    config, dataset, partition = loaded
    ids = dataset.sources["train"].ids
    order = order_of(config, dataset, partition, "unlabeled", 8)  # 24 images, 4 passes of 6
    passes = [tuple(order[i : i + 6]) for i in range(0, 24, 6)]
    for one in passes:
        assert sorted(ids[i] for i in one) == sorted(partition.unlabeled)
    assert len(set(passes)) > 1


def test_a_batch_may_be_larger_than_the_list(loaded):
    config = changed(loaded[0])
    config.batch.labeled = 5
    order = order_of(config, *loaded[1:], "labeled", 2)
    counts = np.bincount(order)
    assert sorted(counts[counts > 0]) == [5, 5]  # 2 images, 10 places


def test_an_image_is_augmented_anew_at_every_pass(loaded):
    config = changed(loaded[0], labeled_fraction="1/8")
    one = data.partition(config.data, loaded[1], 0)
    assert len(one.labeled) == 1
    config.batch.labeled = 1
    batches = take(data.train_iterator(config, loaded[1], one), 6)
    assert len({batch["labeled"]["image"].tobytes() for batch in batches}) > 3


def test_the_two_streams_draw_independently(loaded):
    config, dataset, _ = loaded
    same = data.Partition(dataset.sources["train"].ids, dataset.sources["train"].ids)
    config = changed(config)
    config.batch.labeled = config.batch.unlabeled = 8
    (batch,) = take(data.train_iterator(config, dataset, same), 1)
    assert (batch["labeled"]["image"] != batch["unlabeled"]["image"]).any()


def test_an_epoch_is_a_pass_over_the_unlabelled_list(loaded):
    config, _, partition = loaded
    assert data.steps_per_epoch(config, partition) == 2
    config = changed(config)
    config.batch.unlabeled = 50
    assert data.steps_per_epoch(config, partition) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_size": (25, 8)}, r"data\.crop_size is 25x8 .* camvid is 24x32 .*data\.image_size"),
        ({"crop_size": (8, 33)}, r"data\.crop_size is 8x33 "),
        ({"crop_size": (0, 8)}, r"data\.crop_size is \(0, 8\)"),
        ({"scale_range": (1.2, 2.0)}, r"data\.scale_range is \(1\.2, 2\.0\)"),
        ({"scale_range": (0.0, 2.0)}, r"data\.scale_range"),
    ],
)
def test_impossible_crops_and_scales_are_errors(loaded, fields, message):
    with pytest.raises(UserError, match=message):
        data.train_iterator(changed(loaded[0], **fields), *loaded[1:])


def test_evaluation_goes_through_all_images_once_in_order(loaded):
    source = loaded[1].sources["train"]
    batches = list(data.eval_batches(source, 3))
    assert [batch["valid"].tolist() for batch in batches] == [
        [True] * 3,
        [True] * 3,
        [True, True, False],
    ]
    ids = [i for b in batches for i, valid in zip(b["ids"], b["valid"], strict=True) if valid]
    assert tuple(ids) == source.ids
    np.testing.assert_array_equal(batches[1]["image"][2], source[5]["image"])
    np.testing.assert_array_equal(batches[1]["label"][2], source[5]["label"])
    assert batches[2]["image"].shape == (3, *SIZE, 3)
    assert (batches[2]["label"][2] == 255).all()


def test_evaluation_batches_hold_one_size(tmp_path):
    make_camvid(tmp_path / "root", train=4, val=2)
    for name in ("train é1", "train é2"):
        write_jpeg(tmp_path / f"root/images/train/{name}.jpg", picture(0, (10, 40)))
        write_png(tmp_path / f"root/labels/train/{name}.png", np.zeros((10, 40), np.uint8))
    source = data.load(make_config(tmp_path).data).sources["train"]
    assert source.max_size == (24, 40)
    batches = list(data.eval_batches(source, 2))
    assert [(b["image"].shape[1:3], int(b["valid"].sum())) for b in batches] == [
        (SIZE, 1),
        ((10, 40), 2),
        (SIZE, 1),
    ]
