"""Preparing: the cache, bad files, interruptions, resuming, full disks, and the command."""

import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import trees
from data_cases import data_config, prepared
from trees import SIZE, picture, write_png

from csc_jax import data
from csc_jax.data import builder
from csc_jax.data.census import Facts
from csc_jax.data.checked import Checked, Encoded
from csc_jax.data.example import Listing
from csc_jax.errors import UserError

ROOT = Path(__file__).parents[1]
FACTS = Facts("0123456789abcdef" + "89abcdef", (7,) + (0,) * 254 + (3,), {0: 7, 255: 3})


@pytest.fixture
def config(tmp_path):
    trees.camvid_tree(tmp_path / "root")
    return data_config(tmp_path)


def test_second_run_reads_the_cache_and_a_changed_file_prepares_anew(config, tmp_path, caplog):
    caplog.set_level("INFO", "csc_jax")
    data.load(config.data)
    assert "Preparing camvid: checking 11 images and storing" in caplog.text
    assert str(prepared(tmp_path)[0].parents[1]) in caplog.text
    caplog.clear()
    data.load(config.data)
    assert "Preparing" not in caplog.text
    assert "Labels: 8 train, 3 val" in caplog.text  # as after the preparation
    write_png(tmp_path / "root/labels/train/train é0.png", np.zeros(SIZE, np.uint8))
    assert (data.load(config.data).sources["train"][0]["label"] == 0).all()
    assert len(prepared(tmp_path)) == 2


def test_nothing_is_printed_and_nothing_left_but_the_cache(config, tmp_path, capfd):
    data.load(config.data)
    assert capfd.readouterr() == ("", "")
    assert len(list((tmp_path / "cache").glob("*"))) == 2  # the folder and the lock
    assert not list((tmp_path / "cache").glob("*.checked"))


def test_image_size_is_what_is_stored(config):
    config.data.image_size = (12, 20)
    dataset = data.load(config.data)
    element = dataset.sources["val"][0]
    assert element["image"].shape == (12, 20, 3)
    stored = np.random.default_rng(0).integers(0, 12, SIZE, np.uint8)
    assert set(np.unique(element["label"])) <= {*stored.ravel().tolist(), 255}
    assert dataset.sources["train"].max_size == (12, 20)


def test_synthetic_fields_are_part_of_the_fingerprint(tmp_path):
    config = data_config(tmp_path, name="synthetic").data
    config.synthetic.update({"train": 4, "val": 2, "size": (16, 16)})
    first = data.load(config)
    config.synthetic.seed = 1
    second = data.load(config)
    assert len(prepared(tmp_path)) == 2
    assert (first.sources["val"][1]["image"] != second.sources["val"][1]["image"]).any()


def test_a_source_can_go_to_another_process(config):
    source = data.load(config.data).sources["train"]
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[3]["image"], source[3]["image"])


# ---- Bad files -----------------------------------------------------------------------------------


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def make_unreadable(path):
    path.unlink()
    path.symlink_to(path.name)


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
        lambda root: write_png(root / "labels/val/val é1.png", np.full(SIZE, 3000, np.uint16)),
        r"val é1\.png holds the label id 3000",
    ),
    "colours for ids": (
        lambda root: write_png(root / "labels/val/val é1.png", picture(0)),
        r"val é1\.png is a colour image",
    ),
    "JPEG without end": (
        lambda root: truncate(root / "images/train/train é2.jpg", -100),
        r"train é2\.jpg is corrupt or truncated",
    ),
    "half a JPEG": (
        lambda root: truncate(root / "images/train/train é2.jpg", 900),
        r"train é2\.jpg is corrupt or truncated",
    ),
    "PNG without end": (
        lambda root: truncate(root / "labels/train/train é2.png", -100),
        r"train é2\.png is corrupt or truncated",
    ),
    "header of a PNG": (
        lambda root: truncate(root / "labels/train/train é2.png", 40),
        r"train é2\.png is corrupt or truncated",
    ),
    "empty file": (
        lambda root: truncate(root / "images/train/train é2.jpg", 0),
        r"train é2\.jpg is corrupt or truncated",
    ),
    "no image": (
        lambda root: (root / "images/train/train é2.jpg").write_bytes(b"<html>" * 99),
        r"train é2\.jpg is corrupt or truncated",
    ),
    "unreadable": (
        lambda root: make_unreadable(root / "images/train/train é2.jpg"),
        r"train é2\.jpg cannot be read: Too many levels of symbolic links",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_named_and_nothing_is_taken_for_whole(config, tmp_path, fault):
    spoil, message = FAULTS[fault]
    spoil(tmp_path / "root")
    for _ in range(2):  # the second run must not find a folder of the first
        with pytest.raises(UserError, match=message) as caught:
            data.load(config.data)
        assert "data.root holds 1 images" in str(caught.value)
    assert not prepared(tmp_path)
    assert not list((tmp_path / "cache").glob("*/*/incomplete*"))


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.95])
def test_a_truncated_png_image_is_named(tmp_path, keep):
    root = trees.folder_tree(tmp_path / "root")
    path = root / "images/train/site 0/ä00.png"
    truncate(path, int(keep * path.stat().st_size))
    with pytest.raises(UserError, match=r"ä00\.png is corrupt or truncated"):
        data.load(data_config(tmp_path, name="folder").data)


def test_all_bad_files_are_reported_at_once_ten_in_the_error_all_in_a_file(tmp_path):
    trees.camvid_tree(tmp_path / "root", train=9, val=4)
    labels = sorted((tmp_path / "root/labels").glob("*/*.png"))
    contents = [path.read_bytes() for path in labels]
    for path in labels:
        path.unlink()
    config = data_config(tmp_path).data
    with pytest.raises(UserError, match=r"holds 13 images .* and 3 more, all listed in") as caught:
        data.load(config)
    assert str(caught.value).count("has no label") == 10
    listed = (tmp_path / "cache/camvid_bad_files.txt").read_text().splitlines()
    assert [line.split("has no label ")[1] for line in listed] == list(map(str, labels))
    for path, content in zip(labels, contents, strict=True):
        path.write_bytes(content)
    assert len(data.load(config).sources["train"]) == 9
    assert not (tmp_path / "cache/camvid_bad_files.txt").exists()


# ---- Interruptions -------------------------------------------------------------------------------


class Noise:
    """An example that counts how often it is read, with an accident at one of them."""

    has_label = True

    def __init__(self, index, accident=None):
        self.id = f"{index:03d}"
        self.index = index
        self.accident = accident
        self.reads = 0

    def fingerprint(self):
        return "same"

    def original(self):
        return None

    def read(self, on_values):
        self.reads += 1
        if self.accident:
            self.accident()
        return picture(self.index), np.zeros(SIZE, np.uint8), None


def prepare(cache, accident=None, at=70, count=80):
    """Prepares `count` train images, of which one has an accident; returns data set and images."""
    examples = [Noise(i, accident if i == at else None) for i in range(count)]
    splits = {"train": examples, "val": [Noise(999)]}
    listing = Listing(("a",), np.zeros((1, 3), np.uint8), splits)
    return builder.prepare("noise", listing, str(cache), (0, 0)), examples


def test_an_interrupted_preparation_goes_on(tmp_path, caplog):
    caplog.set_level("INFO", "csc_jax")

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "cache", interrupt)
    assert not prepared(tmp_path)
    dataset, examples = prepare(tmp_path / "cache")
    # All of the first 64, which are stored before any other is read, and some of the rest.
    assert [example.reads for example in examples[:64]] == [0] * 64
    assert examples[70].reads == 1
    assert "of them were checked before)" in caplog.text
    for i, element in enumerate(dataset.sources["train"][k] for k in range(80)):
        assert element["id"] == f"{i:03d}"
        np.testing.assert_array_equal(element["image"], picture(i))
    assert not (tmp_path / "cache/noise.checked").exists()


def in_another_process(code):
    """Runs code that may call `test_data_prepare.prepare`."""
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    command = [sys.executable, "-c", script + textwrap.dedent(code)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_a_killed_preparation_goes_on_and_its_rest_is_cleared(tmp_path):
    cache = tmp_path / "cache"
    done = in_another_process(f"""
        import os, test_data_prepare
        test_data_prepare.prepare({str(cache)!r}, lambda: os._exit(9))
    """)
    assert done.returncode == 9, done.stderr
    assert list(cache.glob("*/*/incomplete*"))  # it had begun
    assert not prepared(tmp_path)
    dataset, examples = prepare(cache)
    assert [example.reads for example in examples[:64]] == [0] * 64
    assert len(dataset.sources["train"]) == 80
    assert not list(cache.glob("*/*/incomplete*"))


def test_repaired_files_are_all_that_is_checked_again(tmp_path):
    root = trees.camvid_tree(tmp_path / "root")
    config = data_config(tmp_path).data
    label = root / "labels/train/train é3.png"
    content = label.read_bytes()
    truncate(label, 50)
    with pytest.raises(UserError, match="holds 1 images"):
        data.load(config)
    assert len(list((tmp_path / "cache/camvid.checked").glob("*.npz"))) == 10
    label.write_bytes(content)
    stored = data.load(config).sources["train"][3]["label"]
    values = np.random.default_rng(3).integers(0, 12, SIZE, np.uint8)
    np.testing.assert_array_equal(stored, np.where(values == 11, 255, values))


def test_what_was_checked_is_only_believed_if_it_is_whole(tmp_path):
    checked = Checked(tmp_path / "x.checked")
    kept = Encoded(b"image" * 50, b"label" * 50, (24, 32), FACTS)
    checked.save("key", kept)
    assert "key" in checked
    assert checked.load("key") == kept
    checked.save("own", kept._replace(image=None))
    assert checked.load("own") == kept._replace(image=None)
    path = tmp_path / "x.checked/key.npz"
    whole = path.read_bytes()
    at = whole.index(b"labellabel")
    damages = [whole[:-30], whole[: len(whole) // 2], b"", b"\0" * len(whole)]
    damages.append(whole[:at] + b"\0" + whole[at + 1 :])
    for damaged in damages:
        path.write_bytes(damaged)
        assert checked.load("key") is None
    assert checked.load("other") is None


def test_a_save_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError("No space left on device")

    checked = Checked(tmp_path / "x.checked")
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        checked.save("key", Encoded(b"image", b"label", (24, 32), FACTS))
    assert "key" not in checked
    assert not list((tmp_path / "x.checked").iterdir())


def test_two_runs_that_prepare_at_once_share_one_preparation(tmp_path, caplog):
    caplog.set_level("INFO", "csc_jax")
    waiting, others = threading.Event(), []

    def other():
        others.append(prepare(tmp_path / "cache"))

    class WaitingIsLogged:
        def filter(self, record):
            if "Waiting for another process" in record.getMessage():
                waiting.set()
            return True

    builder.log.addFilter(observer := WaitingIsLogged())
    thread = threading.Thread(target=other)

    def meanwhile():
        thread.start()
        assert waiting.wait(60)

    try:
        mine, examples = prepare(tmp_path / "cache", meanwhile)
        thread.join()
    finally:
        builder.log.removeFilter(observer)
    ((theirs, not_read),) = others
    assert sum(example.reads for example in examples) == 80
    assert sum(example.reads for example in not_read) == 0
    np.testing.assert_array_equal(
        mine.sources["train"][1]["image"], theirs.sources["train"][1]["image"]
    )


# ---- Disks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1_000, 120_000])  # bytes a file: each image's, the data set's
def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path, limit):
    """A limit of the file size makes writing fail as a full disk does."""
    cache = tmp_path / "cache"
    done = in_another_process(
        f"""
        import resource, test_data_prepare
        from csc_jax.errors import UserError
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            test_data_prepare.prepare({str(cache)!r})
        except UserError as error:
            print("told:", error)
        """
    )
    assert done.stdout.startswith(f"told: Preparing the data in {cache} failed: "), done.stderr
    assert "File too large" in done.stdout
    assert "data.cache_dir" in done.stdout
    assert not prepared(tmp_path)
    assert not list(cache.glob("*/*/incomplete*"))
    assert not list(cache.glob("*.checked/*.unfinished"))
    dataset, examples = prepare(cache)
    assert len(dataset.sources["train"]) == 80
    kept = sum(example.reads == 0 for example in examples)
    assert kept == (0 if limit == 1_000 else 80)


def test_a_cache_that_cannot_be_written_names_its_field(config, tmp_path):
    (tmp_path / "file").write_text("")
    config.data.cache_dir = str(tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        data.load(config.data)


@pytest.mark.parametrize("name", ["camvid", "cityscapes", "pascal_voc", "folder"])
def test_data_root_is_only_read(tmp_path, name):
    make = getattr(trees, f"{name.removeprefix('pascal_')}_tree")
    root = make(tmp_path / "root")
    paths = [root, *root.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = [(path, path.stat().st_mtime_ns) for path in paths]
    try:
        dataset = data.load(data_config(tmp_path, name=name).data)
    finally:
        for path in paths:  # so that the test's folder can be removed
            path.chmod(0o755)
    assert len(dataset.sources["train"])
    # What root may do regardless of the modes shows here.
    assert [(path, path.stat().st_mtime_ns) for path in [root, *root.rglob("*")]] == before


def test_a_prepared_cache_is_only_read(config, tmp_path):
    first = data.load(config.data)
    paths = [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]
    before = [(path, path.stat().st_mtime_ns) for path in paths]
    second = data.load(config.data)
    assert second.sources["train"].ids == first.sources["train"].ids
    assert [(path, path.stat().st_mtime_ns) for path in paths] == before
    assert len([tmp_path / "cache", *(tmp_path / "cache").rglob("*")]) == len(paths)


# ---- The command ---------------------------------------------------------------------------------


def call_command(*arguments):
    command = [sys.executable, "-m", "csc_jax.main", "prepare", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_command_prepares_and_says_what_it_found(tmp_path):
    root = trees.folder_tree(tmp_path / "root")
    arguments = (
        "--config=configs/folder.py",
        f"--config.data.root={root}",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
    )
    done = call_command(*arguments)
    assert done.returncode == 0, done.stderr
    assert "Preparing folder: checking 13 images" in done.stdout
    for line in ("train    11 images, 8 with a label", "val       2 images", "3 classes: ground,"):
        assert line in done.stdout
    assert "8 labelled and 3 unlabelled" in done.stdout
    # SIZE is 24 x 32 px: what a run would have, and why.
    assert "data.crop_size = 16,32, chosen: the median train image is 24x32 px" in done.stdout
    assert "batch.labeled = 8, chosen: 8 labelled images" in done.stdout
    assert len(prepared(tmp_path)) == 1
    for path in (root / "labels/val").glob("*"):
        write_png(path, np.full(SIZE, 9, np.uint8))
    done = call_command(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: data.root holds 2 images that cannot be used")
    assert "Traceback" not in done.stderr


def test_the_command_explains_a_missing_config():
    done = call_command("--config=configs/nothing.py")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --config=configs/nothing.py is neither a file nor")
    assert "Traceback" not in done.stderr
