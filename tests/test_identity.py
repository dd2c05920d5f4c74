"""Which images a run is of: what a checkpoint keeps, what a resumed run is refused for."""

import copy
import json
import shutil

import numpy as np
import pytest
from tiny import tiny_config
from trees import SIZE, blocks, folder_tree, picture, write_jpeg, write_png

from csc_jax import data
from csc_jax.data.source import Dataset, Source
from csc_jax.errors import UserError
from csc_jax.evaluation.score import score
from csc_jax.training import identity
from csc_jax.training.checkpoint import Checkpointer
from csc_jax.training.loop import train


def source(*ids, without_digests=False):
    digests = () if without_digests else tuple(f"{'i' + name:0>16}{'l' + name:0>8}" for name in ids)
    return Source(ids, SIZE, (), digests=digests)


def described(train="abcdef", labeled="ab", val="xyz", names=("sky", "road"), **options):
    sources = {"train": source(*train, **options), "val": source(*val, **options)}
    dataset = Dataset("fake", names, np.zeros((2, 3), np.uint8), sources)
    lists = data.Partition(tuple(labeled), tuple(n for n in train if n not in labeled))
    run = {"class_names": list(names), "palette": [[1, 2, 3], [4, 5, 6]]}
    return json.loads(json.dumps(run | {"data": identity.describe(dataset, lists, "val", 4)}))


REFUSED = {
    "labelled": (described(labeled="ac"), r"labelled images: c is new, b is gone"),
    "labelled in another order": (described(labeled="ba"), r"labelled images: in another order"),
    "fewer labelled": (described(labeled="a"), r"labelled images: b is gone"),
    "trained on, now val": (
        described(train="abcde", val="xyzf"),
        r"val images: f is new[.;]",
    ),
    "val": (described(val="xy"), r"val images: z is gone"),
    "many": (described(val="xyzstuvw"), r"val images: s is new, t is new, u is new and 2 more"),
    "class names": (
        described(names=("road", "sky")),
        r"class 0 was 'sky' and is 'road', class 1 was 'road' and is 'sky'",
    ),
    "class count": (described(names=("a", "b", "c")), r"2 classes before, 3 now"),
    "palette": (
        described() | {"palette": [[1, 2, 3], [4, 5, 7]]},
        r"colour of 'road' was \(4, 5, 6\) and is \(4, 5, 7\)",
    ),
}


@pytest.mark.parametrize(("now", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("allow", [False, True])
def test_other_data_are_refused_by_name(now, message, allow):
    with pytest.raises(UserError, match=f"since the checkpoint: .*{message}.*--workdir"):
        identity.compare(described(), now, allow)


@pytest.mark.parametrize(
    ("half", "place", "what"),
    [("labeled", slice(0, 16), "image"), ("labeled", slice(16, 24), "label")],
)
def test_the_same_name_with_other_content_is_another_image(half, place, what):
    now = described()
    image, digest = now["data"][half][1]
    digest = digest[: place.start] + "f" * (place.stop - place.start) + digest[place.stop :]
    now["data"][half][1] = [image, digest]
    with pytest.raises(UserError, match=rf"labelled images: b has another {what}\."):
        identity.compare(described(), now, False)


def test_other_unlabelled_images_need_a_flag():
    more = described(train="abcdefg")
    with pytest.raises(
        UserError,
        match=r"unlabelled images: g is new\. .*--config\.checkpoint\.allow_new_unlabeled=True",
    ):
        identity.compare(described(), more, False)
    assert identity.compare(described(), more, True) == ["unlabelled images: g is new"]


def test_what_is_not_known_is_not_compared():
    assert identity.compare(described(), described(), False) == []
    old = described()
    del old["data"]
    assert identity.compare(old, described(labeled="c"), False) == []
    bare = described(without_digests=True)
    assert identity.compare(bare, described(), False) == []


def test_names_are_shown_on_one_line_and_without_what_a_terminal_obeys():
    names = ("a", "b\x1b[2J\n", "c")
    now = described(train=names, labeled=names[:2])
    with pytest.raises(UserError) as caught:
        identity.compare(described(), now, False)
    assert r"b\x1b[2J\n is new" in str(caught.value)


def test_images_that_were_trained_on_are_found_by_name_and_by_content():
    run = described()
    assert identity.trained_on(run, source("x", "y")) == {"labeled": [], "unlabeled": []}
    split = source("x", "a", "f")
    assert identity.trained_on(run, split) == {"labeled": ["a"], "unlabeled": ["f"]}
    moved = Source(("val/b",), SIZE, (), digests=(source("b").digests[0][:16] + "0" * 8,))
    assert identity.trained_on(run, moved) == {"labeled": ["val/b"], "unlabeled": []}
    del run["data"]
    assert identity.trained_on(run, split) == {"labeled": [], "unlabeled": []}


# Whole runs


@pytest.fixture(scope="module")
def first_part(tmp_path_factory):
    """A run of two steps on a folder of images: its data, config and work directory."""
    folder = tmp_path_factory.mktemp("identity")
    root = folder_tree(folder / "root")
    config = tiny_config(
        folder,
        data__name="folder",
        data__root=str(root),
        data__crop_size=(16, 16),
        data__labeled_fraction="1/2",
        batch__labeled=2,
        batch__unlabeled=2,
        method__name="supervised",
        train__steps=2,
        train__eval_every=2,
        train__panels=0,
        eval__panels=0,
    )
    train(config, folder / "run")
    return root, config, folder / "run"


@pytest.fixture
def resumed(first_part, tmp_path):
    """A copy of all three, to be changed and continued for two more steps."""
    root, config, workdir = first_part
    shutil.copytree(root, tmp_path / "root")
    shutil.copytree(workdir, tmp_path / "run")
    config = copy.deepcopy(config)
    config.data.root, config.train.steps = str(tmp_path / "root"), 4
    return tmp_path / "root", config, tmp_path / "run"


def files_of(workdir):
    return {
        path.relative_to(workdir): path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file() and path.name != "run.lock"
    }


def add_image(root, name, label=True):
    write_jpeg(root / f"images/{name}.jpg", picture(77))
    if label:
        write_png(root / f"labels/{name}.png", blocks(77, (0, 1, 2)))


def test_a_checkpoint_holds_the_images_of_its_run(first_part):
    _, config, workdir = first_part
    with Checkpointer(workdir, read_only=True) as checkpointer:
        run = checkpointer.describe()
    lists = data.partition(config.data, data.load(config.data), config.seed)
    assert tuple(image for image, _ in run["data"]["labeled"]) == lists.labeled
    assert tuple(image for image, _ in run["data"]["unlabeled"]) == lists.unlabeled
    assert [image for image, _ in run["data"]["evaluated"]["val"]] == ["val/0", "val/1"]
    assert len({digest for _, digest in run["data"]["labeled"]}) == len(lists.labeled)
    kept = json.loads((workdir / "data.json").read_text())
    assert kept["data"] == "folder"
    assert kept["train"]["labeled_images"] == 8


CHANGES = {
    "an image with a label": (lambda root: add_image(root, "train/aaa"), r"labelled images: "),
    "an image of val": (lambda root: add_image(root, "val/aaa"), r"val images: val/aaa is new"),
    "an unlabelled image": (
        lambda root: add_image(root, "train/aaa", label=False),
        r"unlabelled images: train/aaa is new.*allow_new_unlabeled=True",
    ),
    "class names": (
        lambda root: (root / "classes.txt").write_text("sky\nwide road 128 64 128\nground\n"),
        r"class 0 was 'ground' and is 'sky'",
    ),
    "a label of val": (
        lambda root: write_png(root / "labels/val/0.png", np.zeros(SIZE, np.uint8)),
        r"val images: val/0 has another label",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_run_does_not_go_on_with_other_data(resumed, change, message):
    root, config, workdir = resumed
    change(root)
    before = files_of(workdir)
    with pytest.raises(UserError, match=message):
        train(config, workdir)
    assert files_of(workdir) == before  # W/splits too


def test_an_edited_list_is_another_run(resumed):
    root, config, workdir = resumed
    lists = (workdir / "splits/labeled.txt").read_text().splitlines()
    others = (workdir / "splits/unlabeled.txt").read_text().splitlines()
    labeled = next(name for name in others if (root / f"labels/{name}.png").exists())
    (root / "list.txt").write_text("\n".join([*lists[:-1], labeled]))
    config.data.labeled_list = str(root / "list.txt")
    with pytest.raises(UserError, match=rf"labelled images: {labeled} is new, {lists[-1]} is gone"):
        train(config, workdir)
    with pytest.raises(UserError, match=r"data\.workers: 0 before, 2 now.*old values"):
        train(_with(config, data__labeled_list="", data__workers=2), workdir)


def _with(config, **fields):
    changed = copy.deepcopy(config)
    changed.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return changed


def test_a_run_goes_on_with_the_same_images_from_a_list_and_with_new_unlabelled_ones(
    resumed, caplog
):
    root, config, workdir = resumed
    caplog.set_level("INFO", "csc_jax")
    (root / "list.txt").write_text((workdir / "splits/labeled.txt").read_text())
    add_image(root, "train/new", label=False)
    config.data.labeled_list = str(root / "list.txt")
    config.checkpoint.allow_new_unlabeled = True
    train(config, workdir)
    assert "changed since the checkpoint: unlabelled images: train/new is new" in caplog.text
    assert "train/new" in (workdir / "splits/unlabeled.txt").read_text().splitlines()
    with Checkpointer(workdir, read_only=True) as checkpointer:
        assert "train/new" in dict(checkpointer.describe()["data"]["unlabeled"])


def test_evaluation_warns_of_images_that_were_trained_on(resumed, caplog):
    root, config, workdir = resumed
    score(config, workdir, "latest")
    assert "were trained on" not in caplog.text
    for kind in ("images", "labels"):  # a train image, moved to val under another name
        suffix = "png"
        (root / kind / f"train/site 0/ä00.{suffix}").rename(root / kind / f"val/moved.{suffix}")
    score(config, workdir, "latest")
    assert "1 of the 3 images of val were trained on" in caplog.text
    assert "val/moved" in caplog.text
    report = json.loads((workdir / "evaluation/val_teacher_2_whole_2.json").read_text())
    assert [*report["trained_on"]["labeled"], *report["trained_on"]["unlabeled"]] == ["val/moved"]


def test_a_checkpoint_of_before_goes_on_with_a_warning(resumed, caplog, monkeypatch):
    _, config, workdir = resumed
    restore = Checkpointer._restore

    def without_data(run):
        return {name: value for name, value in run.items() if name != "data"}

    def older(self, step, like, check):
        return restore(self, step, like, lambda run: check(without_data(run)))

    monkeypatch.setattr(Checkpointer, "_restore", older)
    train(config, workdir)
    assert "does not say which images it was trained on" in caplog.text
