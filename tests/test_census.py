"""The census of the labels: what is counted, kept, said and refused."""

import json
import zlib

import numpy as np
import pytest
import trees
from data_cases import data_config
from tiny import tiny_config
from trees import SIZE, folder_tree, picture, write_png

from csc_jax import data
from csc_jax.data import census
from csc_jax.data.source import Dataset
from csc_jax.errors import UserError
from csc_jax.training.experiment import build
from csc_jax.training.loop import _look_at_labels


def folder_config(tmp_path, **fields):
    return data_config(tmp_path, name="folder", **fields)


def relabel(root, change):
    """Writes each label anew, as `change` makes it of its path and values."""
    for path in sorted((root / "labels").rglob("*.png")):
        write_png(path, change(path, trees.blocks(zlib.crc32(path.name.encode()), (0, 1, 2, 255))))


def counted(labels):
    values, counts = np.unique(np.stack(labels), return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def test_pixels_images_and_values_are_those_of_the_files(tmp_path):
    folder_tree(tmp_path / "root", labeled=70)  # more than are prepared at a time
    config = folder_config(tmp_path)
    dataset = data.load(config.data)
    labels = [trees.blocks(seed, (0, 1, 2, 255)) for seed in range(75)]
    by_split = {"train": labels[:70], "val": labels[73:]}
    for split, expected in by_split.items():
        counts, pixels = dataset.census[split], counted(expected)
        assert counts.labeled == len(expected)
        assert counts.values == pixels
        assert counts.pixels == tuple(pixels[i] for i in range(3))
        assert counts.ignored == pixels[255]
        assert counts.images == tuple(
            sum(bool((label == i).any()) for label in expected) for i in range(3)
        )
    train = dataset.sources["train"]
    for name, bits in zip(train.ids, train.classes, strict=True):
        seed = int(name[-2:])
        expected = set(labels[seed].ravel().tolist()) - {255} if seed < 70 else set()
        assert {i for i in range(8) if bits >> i & 1} == expected
    again = data.load(config.data)  # from the cache
    assert again.census == dataset.census
    assert again.sources["train"].digests == dataset.sources["train"].digests


def test_values_are_as_stored_and_classes_as_trained_on(tmp_path):
    trees.camvid_tree(tmp_path / "root")  # 11 is void there
    counts = data.load(data_config(tmp_path).data).census["val"]
    labels = [np.random.default_rng(i).integers(0, 12, SIZE, np.uint8) for i in range(3)]
    expected = counted(labels)
    assert counts.values == expected
    assert counts.ignored == expected[11]
    small = data.load(data_config(tmp_path, image_size=(6, 8)).data).census["val"]
    assert small.values == expected
    assert sum(small.pixels) + small.ignored == 3 * 6 * 8


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_values_of_any_type_and_size_are_counted(dtype):
    rng = np.random.default_rng(0)
    values = rng.choice(np.array([0, 7, 200, 255 if dtype is np.uint8 else 40_000]), (50, 70))
    facts = census.facts("", np.zeros((50, 70), np.uint8), values.astype(dtype))
    assert dict(facts.values) == counted([values])


def test_more_pixels_than_a_float_counts_are_exact(monkeypatch):
    """OpenCV's histogram is of float32: above 2^24 px of one value it is no longer exact."""
    label = np.zeros((4100, 4100), np.uint8)
    label[0, 0] = 1
    facts = census.facts("", label, None)
    assert facts.ids[:2] == (4100 * 4100 - 1, 1)


def test_a_digest_changes_with_the_image_and_with_the_label():
    label = np.zeros(SIZE, np.uint8)
    first = census.digest(b"image", label)
    other_label = label.copy()
    other_label[3, 3] = 1
    assert len(first) == 24
    assert census.digest(b"image", label.copy()) == first
    for other_image in (b"imagf", b"jmage", b"image "):
        changed_image = census.digest(other_image, label)
        assert changed_image[:16] != first[:16]
        assert changed_image[16:] == first[16:]
    changed_label = census.digest(b"image", other_label)
    assert changed_label[:16] == first[:16]
    assert changed_label[16:] != first[16:]


def test_digests_are_those_of_the_files_whatever_becomes_of_them(tmp_path):
    """Resizing, which may differ by a rounding from machine to machine, does not change them."""
    root = trees.camvid_tree(tmp_path / "root")
    whole = data.load(data_config(tmp_path).data).sources["val"]
    small = data.load(data_config(tmp_path, image_size=(6, 8)).data).sources["val"]
    assert whole.digests == small.digests
    files = [root / f"images/val/val é{i}.jpg" for i in range(3)]
    ids = [np.random.default_rng(i).integers(0, 12, SIZE, np.uint8) for i in range(3)]
    assert list(whole.digests) == [
        census.digest(file.read_bytes(), np.where(label == 11, 255, label).astype(np.uint8))
        for file, label in zip(files, ids, strict=True)
    ]
    drawn = data_config(tmp_path, name="synthetic", synthetic__train=3, synthetic__val=2)
    sources = data.load(drawn.data).sources
    assert len({*sources["train"].digests, *sources["val"].digests}) == 5


def test_the_table_has_a_line_a_class(tmp_path, caplog):
    folder_tree(tmp_path / "root")
    caplog.set_level("INFO", "csc_jax")
    dataset = data.load(folder_config(tmp_path).data)
    lines = census.table(dataset.census, ("ground", "a\x1b[31m\nb", "sky")).splitlines()
    assert lines[0] == "Labels: 8 train, 2 val"
    assert lines[1].split() == ["class", "train", "px", "%", "images", "val", "px", "%", "images"]
    shares = [float(line.split()[-4]) for line in lines[2:5]] + [float(lines[5].split()[-2])]
    assert sum(shares) == pytest.approx(100, abs=0.02)
    assert lines[3].startswith(r"a\x1b[31m\nb ")
    assert len({len(line) for line in lines[1:5]}) == 1
    assert "Labels: 8 train, 2 val" in caplog.text
    many = tuple(f"class {i}" for i in range(200))
    counts = census.Counts(1, (1,) * 200, (1,) * 200, 0, {})
    assert "and 160 more classes" in census.table({"train": counts}, many)


def test_masks_of_0_and_255_are_told_with_the_way_out(tmp_path, caplog):
    root = folder_tree(tmp_path / "root")
    relabel(root, lambda path, label: np.where(label == 2, 255, 0).astype(np.uint8))
    data.load(folder_config(tmp_path).data)
    for split in ("train", "val"):
        assert f"The {split} labels hold the values 0 and 255 alone" in caplog.text
    assert "--config.data.folder.label_values=0:0,255:1" in caplog.text
    caplog.clear()
    config = folder_config(tmp_path, folder__label_values="0:0,255:1")
    dataset = data.load(config.data)  # which says that 255 is a class
    assert "0 and 255" not in caplog.text
    assert "No train label holds sky; 2 of 3 classes occur" in caplog.text
    assert dataset.census["train"].ignored == 0


def test_classes_that_no_label_holds_are_named(tmp_path, caplog):
    root = folder_tree(tmp_path / "root")
    relabel(root, lambda path, label: np.where(label == 2, 1, label).astype(np.uint8))
    data.load(folder_config(tmp_path).data)
    for split in ("train", "val"):
        assert f"No {split} label holds sky; 2 of 3 classes occur" in caplog.text


@pytest.mark.parametrize("split", ["train", "val"])
def test_labels_without_any_class_are_refused(tmp_path, split):
    root = folder_tree(tmp_path / "root")

    def empty(path, label):
        return np.full_like(label, 255) if split in path.parts else label

    relabel(root, empty)
    for _ in range(2):  # prepared, and from the cache
        with pytest.raises(
            UserError, match=rf"All \d {split} labels .*values in the files: 255.*0:0,255:1"
        ):
            data.load(folder_config(tmp_path).data)


# What the labelled images of a run mean for its method


def experiment_of(tmp_path, dataset, **overrides):
    config = tiny_config(tmp_path, **overrides)
    return build(config, dataset.class_names, dataset.palette)


@pytest.fixture
def without_sky(tmp_path) -> Dataset:
    root = folder_tree(tmp_path / "root")
    kept = "ä00.png"

    def change(path, label):
        return label if path.name == kept else np.where(label == 2, 1, label).astype(np.uint8)

    relabel(root, change)
    write_png(root / "labels/train/site 0" / kept, np.full(SIZE, 2, np.uint8))
    return data.load(folder_config(tmp_path).data)


def test_csc_is_told_which_class_will_never_fill_its_bank(tmp_path, without_sky, caplog):
    ids = without_sky.sources["train"].ids
    caplog.clear()

    def look(labeled, **overrides):
        caplog.clear()
        lists = data.Partition(tuple(labeled), ids)
        _look_at_labels(experiment_of(tmp_path, without_sky, **overrides), without_sky, lists)
        return caplog.text

    some = [name for name in ids if name.endswith(("ä02", "ä04"))]
    said = look(some)
    assert "No labelled image of this run holds sky" in said
    assert "L_c will never start" in said
    assert "--config.contrast.absent_classes=2," in said
    assert look(ids) == ""  # one of them has it
    assert look(some, contrast__absent_classes=(2,)) == ""
    assert look(some, method__name="supervised") == ""
    assert "L_c" in look(some, method__name="supervised", method__contrast="csc")


def test_labelled_images_of_nothing_but_ignored_pixels_are_refused(tmp_path):
    root = folder_tree(tmp_path / "root")
    write_png(root / "labels/train/site 0/ä00.png", np.full(SIZE, 255, np.uint8))
    dataset = data.load(folder_config(tmp_path).data)
    lists = data.Partition(("train/site 0/ä00",), dataset.sources["train"].ids)
    with pytest.raises(UserError, match="None of the 1 labelled images has a pixel of any class"):
        _look_at_labels(experiment_of(tmp_path, dataset), dataset, lists)


def test_data_json_holds_the_census(tmp_path):
    folder_tree(tmp_path / "root")
    dataset = data.load(folder_config(tmp_path).data)
    sizes = {split: source.max_size for split, source in dataset.sources.items()}
    kept = json.loads(json.dumps(census.as_json(dataset.census, dataset.class_names, sizes)))
    assert kept["train"]["labeled_images"] == 8
    assert list(kept["val"]["pixels"]) == ["ground", "wide road", "sky"]
    total = sum(kept["val"]["pixels"].values()) + kept["val"]["ignored_pixels"]
    assert total == 2 * SIZE[0] * SIZE[1]
    assert sum(kept["val"]["values"].values()) == total


def test_a_cache_with_characters_of_a_pattern_is_read(tmp_path):
    folder_tree(tmp_path / "root")
    config = folder_config(tmp_path, cache_dir=str(tmp_path / r"c[0:2]*?\x"))
    for _ in range(2):
        dataset = data.load(config.data)
        assert len(dataset.sources["train"]) == 11
        assert dataset.sources["train"][10]["image"].shape == (*SIZE, 3)


def test_labels_are_read_once(tmp_path, monkeypatch):
    """The census rides on the decoding that is done anyway."""
    from csc_jax.data import codec

    folder_tree(tmp_path / "root")
    reads = []
    decode = codec.decode_mask
    monkeypatch.setattr(codec, "decode_mask", lambda *a: reads.append(1) or decode(*a))
    data.load(folder_config(tmp_path).data)
    assert len(reads) == 10


def test_no_folder_is_left_in_the_systems_own(tmp_path, monkeypatch):
    """TFDS makes one for each builder, for what it might fetch about the data set."""
    import tempfile

    folder_tree(tmp_path / "root")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    data.load(folder_config(tmp_path).data)
    assert not list((tmp_path / "tmp").iterdir())


def test_a_link_to_itself_is_one_of_the_bad_files(tmp_path):
    root = folder_tree(tmp_path / "root")
    loop = root / "images/train/site 0/ä00.png"
    loop.unlink()
    loop.symlink_to(loop.name)
    write_png(root / "images/val/1.png", picture(0, (9, 9)))
    with pytest.raises(UserError, match=r"2 images that cannot be used.*ä00\.png"):
        data.load(folder_config(tmp_path).data)
