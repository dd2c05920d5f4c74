"""Which train images are labelled: draws by seed, lists in files, and their faults."""

import os
from pathlib import Path

import pytest
from data_cases import counted_dataset, data_config

from csc_jax import data
from csc_jax.errors import UserError


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
    dataset = counted_dataset(f"{i:05d}" for i in range(images))
    config = data_config(tmp_path, labeled_fraction=fraction).data
    drawn = data.partition(config, dataset, seed=0)
    assert len(drawn.labeled) == labeled
    assert sorted(drawn.labeled + drawn.unlabeled) == list(dataset.sources["train"].ids)
    assert data.partition(config, dataset, seed=0) == drawn
    assert data.partition(config, dataset, seed=1) != drawn


def test_everything_labelled_is_also_the_unlabelled_list(tmp_path):
    dataset = counted_dataset("abcd")
    config = data_config(tmp_path, labeled_fraction="1").data
    assert data.partition(config, dataset, 0) == (tuple("abcd"), tuple("abcd"))


def test_nothing_left_unlabelled_is_an_error(tmp_path):
    config = data_config(tmp_path, labeled_fraction="1/2").data
    with pytest.raises(UserError, match=r"data\.labeled_fraction .* of 1 train images"):
        data.partition(config, counted_dataset("a"), 0)


@pytest.mark.parametrize(
    "fraction", ["0", "-1/8", "9/8", "1/0", "an eighth", "", "nan", "1e-999999999"]
)
def test_a_share_that_is_none_is_an_error(tmp_path, fraction):
    config = data_config(tmp_path, labeled_fraction=fraction).data
    with pytest.raises(UserError, match=rf"data\.labeled_fraction is '{fraction}'; .*such as 1/8"):
        data.partition(config, counted_dataset("abcdefgh"), 0)


def test_a_partition_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "splits").write_text("in the way")
    with pytest.raises(UserError, match=r"splits cannot be written: .*--workdir"):
        data.write_partition(data.Partition(("a",), ("b",)), tmp_path)


def lists_config(tmp_path, labeled, unlabeled=None):
    (tmp_path / "labeled.txt").write_bytes(labeled)
    config = data_config(tmp_path, labeled_list=str(tmp_path / "labeled.txt")).data
    if unlabeled is not None:
        (tmp_path / "unlabeled.txt").write_bytes(unlabeled)
        config.unlabeled_list = str(tmp_path / "unlabeled.txt")
    return config


def test_lists_may_have_windows_line_ends_and_blank_last_lines(tmp_path):
    dataset = counted_dataset(["c/é 1.png", "c/2.png", "c/3.png", "c/4.png"])
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
        (b"\xff\xfe\0", None, r"cannot be read as a text file"),
        (b"# the first\n", None, r"data\.labeled_list .*holds no id"),
        (b"a\n\x1b[2Jx\n", None, r"names \\x1b\[2Jx, not in the train split"),
    ],
)
def test_faults_in_lists_are_named(tmp_path, labeled, unlabeled, message):
    with pytest.raises(UserError, match=message):
        data.partition(lists_config(tmp_path, labeled, unlabeled), counted_dataset("abc"), 0)


def test_a_missing_list_or_the_second_list_alone_is_an_error(tmp_path):
    config = data_config(tmp_path, labeled_list="nowhere.txt").data
    with pytest.raises(UserError, match=r"data\.labeled_list nowhere\.txt cannot be read"):
        data.partition(config, counted_dataset("abc"), 0)
    config = data_config(tmp_path, unlabeled_list="some.txt").data
    with pytest.raises(UserError, match=r"data\.labeled_list is empty"):
        data.partition(config, counted_dataset("abc"), 0)


def test_a_written_partition_can_be_read_as_lists(tmp_path):
    dataset = counted_dataset(f"straße {i}" for i in range(10))
    config = data_config(tmp_path, labeled_fraction="1/2").data
    drawn = data.partition(config, dataset, 3)
    data.write_partition(drawn, tmp_path / "run")
    config.labeled_list = str(tmp_path / "run/splits/labeled.txt")
    config.unlabeled_list = str(tmp_path / "run/splits/unlabeled.txt")
    assert data.partition(config, dataset, 4) == drawn


def test_images_without_label_are_never_labelled_ones(tmp_path):
    ids = [f"{i:02d}" for i in range(20)]
    dataset = counted_dataset(ids, without_label=ids[::4])  # 5 of 20
    for fraction, count in (("1/2", 8), ("1/8", 2), ("1", 15)):
        config = data_config(tmp_path, labeled_fraction=fraction).data
        drawn = data.partition(config, dataset, 0)
        assert len(drawn.labeled) == count
        assert not set(drawn.labeled) & set(ids[::4])
        assert sorted(drawn.labeled + drawn.unlabeled) == ids


def test_an_image_without_label_on_the_labelled_list_is_an_error(tmp_path):
    dataset = counted_dataset("abcd", without_label="bd")
    config = lists_config(tmp_path, b"a\nb\n", b"c\nd\n")
    with pytest.raises(UserError, match=r"data\.labeled_list .*names b, which .*no label"):
        data.partition(config, dataset, 0)
    config = lists_config(tmp_path, b"a\n", b"c\nd\n")
    assert data.partition(config, dataset, 0) == (("a",), ("c", "d"))


@pytest.fixture(scope="module")
def published_lists():
    """The folder of published lists, which the project does not ship."""
    beside_checkout = Path(__file__).parents[2] / "shared" / "splits"
    root = Path(os.environ.get("CSC_SPLITS_ROOT", beside_checkout))
    if not root.is_dir():
        pytest.skip(f"no published lists at {root}: set CSC_SPLITS_ROOT to their folder")
    return root


@pytest.mark.parametrize(
    ("folder", "labeled", "unlabeled"),
    [
        ("cityscapes/186", 186, 2789),
        ("cityscapes/372", 372, 2603),
        ("pascal/662", 662, 9920),
        ("pascal/1323", 1323, 9259),
    ],
)
def test_published_lists_are_read_as_they_are(
    tmp_path, published_lists, folder, labeled, unlabeled
):
    lists = {half: published_lists / folder / f"{half}.txt" for half in ("labeled", "unlabeled")}
    ids = sorted(i for path in lists.values() for i in path.read_text().split())
    config = data_config(tmp_path).data
    config.labeled_list, config.unlabeled_list = map(str, lists.values())
    found = data.partition(config, counted_dataset(ids), 0)
    assert (len(found.labeled), len(found.unlabeled)) == (labeled, unlabeled)
    config.unlabeled_list = ""
    assert sorted(data.partition(config, counted_dataset(ids), 0).unlabeled) == sorted(
        found.unlabeled
    )


@pytest.mark.parametrize(
    ("folder", "names", "labeled", "unlabeled"),
    [
        ("unimatch_v2/pascal/92", "pascal/662", 92, 10490),
        ("unimatch_v2/cityscapes/1_16", "cityscapes/186", 186, 2789),
    ],
)
def test_lists_in_two_columns_are_read_as_they_are(
    tmp_path, published_lists, folder, names, labeled, unlabeled
):
    """UniMatch V2 writes image and label; the ids are those of other lists of the same images."""
    parts = [published_lists / names / f"{half}.txt" for half in ("labeled", "unlabeled")]
    dataset = counted_dataset(sorted(i for path in parts for i in path.read_text().split()))
    val = (published_lists / folder.split("/")[0] / folder.split("/")[1] / "val.txt").read_text()
    own = (published_lists / names.split("/")[0] / "val.txt").read_text().split()
    dataset.sources["val"] = counted_dataset(own).sources["train"]
    config = data_config(tmp_path).data
    for half in ("labeled", "unlabeled"):
        config[f"{half}_list"] = str(published_lists / folder / f"{half}.txt")
    found = data.partition(config, dataset, 0)
    assert (len(found.labeled), len(found.unlabeled)) == (labeled, unlabeled)
    assert sorted(found.labeled + found.unlabeled) == list(dataset.sources["train"].ids)
    first = Path(config.labeled_list).read_text().split()[0]
    assert found.labeled[0] in (first, Path(first).stem)
    (tmp_path / "val.txt").write_text(val)
    config.labeled_list = str(tmp_path / "val.txt")
    with pytest.raises(
        UserError, match=r"and \d+ more of the split val, which is never trained on"
    ):
        data.partition(config, dataset, 0)


def test_the_second_column_names_no_other_image(tmp_path):
    dataset = counted_dataset(["a", "b", "c d", "e.png", "e"])
    for line, name in (
        ("images/a.jpg labels/a_mask.png", "a"),
        ("images/a labels/a", "a"),
        ("c d", "c d"),
        ("images/c d\tlabels/c d", "c d"),
        ("e.png.jpg", "e.png"),
        ("e.jpg", "e"),
    ):
        config = lists_config(tmp_path, f"{line}\n".encode())
        assert data.partition(config, dataset, 0).labeled == (name,), line
    for line in ("images/x.jpg labels/b.png", "images/x labels/b", "x,b", "a b", "a.jpg b.png"):
        with pytest.raises(UserError, match="not in the train split"):
            data.partition(lists_config(tmp_path, f"{line}\n".encode()), dataset, 0)


def test_a_name_with_blanks_or_commas_is_one_name(tmp_path):
    """As copies of a photo are called; what stands before the blank may be another image."""
    dataset = counted_dataset(["train/photo", "train/photo (1)", "train/a,b", "train/a"])
    for line, name in (
        ("photo (1)", "train/photo (1)"),
        ("photo (1).jpg", "train/photo (1)"),
        ("photo 1", "train/photo"),
        ("a,b", "train/a,b"),
        ("a,1", "train/a"),
        ("images/train/photo (1).jpg labels/train/photo (1).png", "train/photo (1)"),
        ("images/train/photo (1).jpg,labels/train/photo (1).png", "train/photo (1)"),
        ('"images/train/a,b.jpg","labels/train/a,b.png"', "train/a,b"),
        ("images/train/photo.jpg\tlabels/train/photo_mask (1).png", "train/photo"),
    ):
        config = lists_config(tmp_path, f"{line}\n".encode())
        assert data.partition(config, dataset, 0).labeled == (name,), line
    for line in ("photo.jpg photo (1).jpg", "images/train/photo.jpg labels/train/a,b.png"):
        with pytest.raises(UserError, match="not in the train split"):
            data.partition(lists_config(tmp_path, f"{line}\n".encode()), dataset, 0)


def test_a_name_of_several_images_is_told_as_such(tmp_path):
    dataset = counted_dataset(["a/1", "b/1", "b/2"])
    with pytest.raises(UserError, match=r"names 1\.jpg, which several images .* as in a/1"):
        data.partition(lists_config(tmp_path, b"2.jpg\n1.jpg\n"), dataset, 0)


def test_a_line_longer_than_any_path_takes_no_time(tmp_path):
    line = "/".join("a" * 10**6)  # each of its ends is a name that an image could have
    with pytest.raises(UserError, match="not in the train split"):
        data.partition(lists_config(tmp_path, f"{line}\n".encode()), counted_dataset("bc"), 0)
