"""Disks that are full or read-only, files that are damaged, a clock that jumps: nothing is lost."""

import contextlib
import gc
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import orbax.checkpoint as ocp
import pytest
from data_cases import assert_same_batches, data_config, take
from tiny import tiny_config
from trees import camvid_tree

from csc_jax import config as config_lib
from csc_jax import data
from csc_jax.data.source import Unreadable
from csc_jax.errors import UserError
from csc_jax.reporting import writers
from csc_jax.training.checkpoint import Checkpointer
from csc_jax.training.experiment import Experiment, build
from csc_jax.training.loop import train

USUAL_USER = 65534  # "nobody"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def supervised(folder: Path, **overrides: object):
    options = {"train__steps": 4, "train__eval_every": 4, "checkpoint__every": 2} | overrides
    return tiny_config(folder, method__name="supervised", **options)


@pytest.fixture(scope="module")
def whole(folder):
    """A run that met no fault: its config, work directory and scores."""
    config = supervised(folder)
    return config, folder / "whole", train(config, folder / "whole")


def records(workdir):
    timing = "train/images_per_second"
    return [{k: v for k, v in r.items() if k != timing} for r in writers.read_metrics(workdir)]


def assert_as_without_fault(whole, workdir, scores):
    _, reference, expected = whole
    np.testing.assert_array_equal(scores.confusion, expected.confusion)
    assert records(workdir) == records(reference)


# ---- Checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experiment(folder):
    config = config_lib.resolve(supervised(folder), steps_per_epoch=4)
    return build(config, ("a", "b", "c"), np.zeros((3, 3), np.uint8))


@contextlib.contextmanager
def as_usual_user():
    """Permissions bind within the block, also where the tests run as root."""
    if os.geteuid():
        yield
        return
    os.seteuid(USUAL_USER)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared_folder():
    """A folder that every user can reach and write to; pytest's own are for their owner alone."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def test_a_file_in_the_place_of_the_checkpoints_is_told_before_anything_compiles(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(Experiment, "compile_init", None)
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match=r"kept in .*checkpoints: .*File exists.*--workdir"):
        train(supervised(folder), tmp_path)
    assert (tmp_path / "checkpoints").read_text() == "in the way"


def test_a_read_only_checkpoint_directory_is_told_at_the_start(shared_folder):
    (shared_folder / "checkpoints").mkdir()
    (shared_folder / "checkpoints").chmod(0o555)
    with as_usual_user(), pytest.raises(UserError, match=r"kept in .*Permission denied"):
        Checkpointer(shared_folder)


def test_a_folder_that_may_not_be_looked_into_is_told(shared_folder):
    workdir = shared_folder / "run"
    (workdir / "checkpoints").mkdir(parents=True)
    workdir.chmod(0)
    for read_only, use in ((True, "read from"), (False, "kept in")):
        with as_usual_user(), pytest.raises(UserError, match=rf"{use} .*Permission denied"):
            Checkpointer(workdir, read_only=read_only)


@pytest.mark.parametrize(
    "name", ["run[lr=0.1]", "run[", "a]b", r"back\slash", "all*", "one?", "[!a]"]
)
def test_a_name_that_looks_like_a_pattern_is_a_name(tmp_path, experiment, name):
    state = experiment.compile_init()()
    with Checkpointer(tmp_path / name) as checkpointer:
        checkpointer.save(1, state, {"iterator": 1}, {"a": 1}, 0.5)
        checkpointer.save(2, state, {"iterator": 2}, {"a": 1}, None)
    assert (tmp_path / name / "checkpoints/2").is_dir()
    with Checkpointer(tmp_path / name) as checkpointer:
        assert checkpointer.describe() == {"a": 1}
        assert checkpointer.restore(experiment.abstract_state()).loop == {"iterator": 2}
        assert checkpointer.restore(experiment.abstract_state(), "best").loop == {"iterator": 1}
    assert not (tmp_path / name / "damaged_checkpoints").exists()


def test_a_link_for_such_a_name_does_not_stay(tmp_path, experiment, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    checkpointer = Checkpointer(tmp_path / "a[b]")
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    checkpointer.close()
    del checkpointer
    gc.collect()
    assert not list((tmp_path / "tmp").iterdir())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp*"))
    with pytest.raises(UserError, match=r"has one of the characters \[ \] \* \? .*--workdir"):
        Checkpointer(tmp_path / "a[b]")


def test_the_first_checkpoint_is_read_back_at_once(tmp_path, experiment, monkeypatch):
    state = experiment.compile_init()()
    checked = []
    read_back = Checkpointer._read_back
    monkeypatch.setattr(
        Checkpointer, "_read_back", lambda *a: checked.append(a[1]) or read_back(*a)
    )
    with Checkpointer(tmp_path / "good") as checkpointer:
        checkpointer.save(1, state, {}, {"a": (1, 2)}, None)
        assert (tmp_path / "good/checkpoints/1").is_dir()  # not only begun
        checkpointer.save(2, state, {}, {"a": (1, 2)}, None)
    assert checked == [1]

    monkeypatch.setattr(Checkpointer, "_plain_name", lambda self, directory: directory)
    with (
        Checkpointer(tmp_path / "bad[1]") as checkpointer,  # which Orbax takes for a pattern
        pytest.raises(UserError, match=r"checkpoints/1 was written, but cannot be read back"),
    ):
        checkpointer.save(1, state, {}, {"a": 1}, None)
    monkeypatch.setattr(Checkpointer, "describe", lambda *_: {"a": 2})
    with (
        Checkpointer(tmp_path / "other") as checkpointer,
        pytest.raises(UserError, match=r"checkpoints/1 was written, but holds something else"),
    ):
        checkpointer.save(1, state, {}, {"a": 1}, None)


def test_a_directory_that_becomes_read_only_costs_no_checkpoint(shared_folder, experiment):
    state = experiment.compile_init()()
    directory = shared_folder / "checkpoints"
    before = set(threading.enumerate())
    with as_usual_user(), Checkpointer(shared_folder, keep=1) as checkpointer:
        checkpointer.save(1, state, {"iterator": 1}, {}, None)
        checkpointer.wait()
        directory.chmod(0o555)
        with pytest.raises(UserError, match=r"Permission denied.*continues from step 1, the last"):
            save_and_wait(checkpointer, 2, state)
        directory.chmod(0o777)
    with Checkpointer(shared_folder) as checkpointer:
        assert checkpointer.restore(experiment.abstract_state()).loop == {"iterator": 1}
    # Nor does Orbax leave threads behind that hold up the end of the process for 5 minutes. Those
    # of asyncio are idle and end with the process.
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith("asyncio"):
            thread.join(timeout=60)
            assert not thread.is_alive(), thread


def save_and_wait(checkpointer, step, state):
    checkpointer.save(step, state, {"iterator": step}, {}, None)
    checkpointer.wait()


ON_A_DISK_THAT_FILLS_UP = """
import resource, sys
from pathlib import Path
from test_faults import supervised
from csc_jax.training.checkpoint import Checkpointer
from csc_jax.errors import UserError
from csc_jax.training.loop import train

save = Checkpointer.save

def save_on_a_full_disk(self, step, *rest):
    if step == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # bytes a file
    save(self, step, *rest)

Checkpointer.save = save_on_a_full_disk
try:
    train(supervised(Path(sys.argv[1])), Path(sys.argv[2]))
except UserError as error:
    print("told:", error)
"""


def test_a_disk_that_fills_up_in_a_checkpoint_costs_only_that_one(whole, folder, tmp_path):
    """A limit of the file size makes writing fail, in TensorStore too, as a full disk does."""
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", ON_A_DISK_THAT_FILLS_UP, str(folder), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Exception ignored" not in done.stderr
    (told,) = (line for line in done.stdout.splitlines() if line.startswith("told: "))
    assert "File too large" in told
    assert "continues from step 2, the last whole one" in told
    assert_as_without_fault(whole, tmp_path, train(whole[0], tmp_path))
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert checkpointer.latest_step() == 4


def test_the_reason_is_told_wherever_tensorstore_puts_it(shared_folder, experiment, monkeypatch):
    path = f"/{'a long path/' * 30}ocdbt.process_0/d/0e66ce5e"
    text = (
        f'OUT_OF_RANGE: Error writing "step/0" at local file "{path}": Failed to write 20099 bytes '
        f"to file 22: File too large [os_error_code='27'] [tensorstore_spec='{{{path}: {path}}}']"
    )

    def save(*_args, **_options):
        raise ValueError(text)

    with Checkpointer(shared_folder) as checkpointer:
        monkeypatch.setattr(ocp.CheckpointManager, "save", save)
        with pytest.raises(UserError, match=r"Error writing .* … .*: File too large\. Make room"):
            save_and_wait(checkpointer, 1, experiment.compile_init()())


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("run/metadata", "deleted"),
        ("loop/metadata", "truncated"),
        ("state/_METADATA", "truncated"),
        ("state/manifest.ocdbt", "deleted"),
    ],
)
def test_a_checkpoint_with_one_damaged_file_gives_way(whole, tmp_path, caplog, name, damage):
    shutil.copytree(whole[1] / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / "4" / name
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    like = like_of(whole)
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(like)
    assert int(restored.state.step) == 2
    assert "The checkpoint of step 4 cannot be read" in caplog.text


def like_of(whole):
    config, workdir, _ = whole
    with Checkpointer(workdir, read_only=True) as checkpointer:
        run = checkpointer.describe()
    palette = np.asarray(run["palette"], np.uint8)
    resolved = config_lib.resolve(config, steps_per_epoch=4)
    return build(resolved, tuple(run["class_names"]), palette).abstract_state()


# ---- Images that became unreadable ---------------------------------------------------------------


@pytest.fixture
def loaded(tmp_path):
    """Config, data set and partition (2 labelled, 6 unlabelled) of a CamVid tree."""
    camvid_tree(tmp_path / "root")
    config = data_config(tmp_path, threads=1, prefetch=1)
    dataset = data.load(config.data)
    return config, dataset, data.partition(config.data, dataset, 0)


def damage(source: data.Source, cache: Path, index: int) -> None:
    """Turns one byte of the prepared data, by which this image alone can be read no more."""
    (path,) = cache.rglob("*train.array_record*")
    content = path.read_bytes()
    for place in range(100, len(content), 150):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        if unreadable(source) == [index]:
            return
    raise AssertionError("no byte belongs to this image alone")


def unreadable(source: data.Source) -> list[int]:
    found = []
    for index in range(len(source)):
        try:
            source[index]
        except Unreadable:
            found.append(index)
    return found


def test_the_next_readable_image_takes_the_place_of_one_damaged_midway(loaded, tmp_path, caplog):
    _, dataset, partition = loaded
    source = dataset.sources["train"]
    expected = data.train_iterator(*loaded)
    batches, images = [], []
    for _ in range(12):
        batches.append(next(expected))
        images.append(expected.images)
    victim, heir = partition.unlabeled[1:3]

    iterator = data.train_iterator(*loaded)
    assert_same_batches(batches[:2], take(iterator, 2))
    state = iterator.get_state()
    damage(source, tmp_path / "cache", source.ids.index(victim))
    replaced = 0
    for again in (iterator, data.train_iterator(*loaded)):  # midway, and after a restart
        again.set_state(state)
        for batch, drawn in zip(batches[2:], images[2:], strict=True):
            found = next(again)
            np.testing.assert_array_equal(found["labeled"]["image"], batch["labeled"]["image"])
            assert again.images["labeled"] == drawn["labeled"]
            assert again.images["unlabeled"] == [
                heir if name == victim else name for name in drawn["unlabeled"]
            ]
            pictures = zip(batch["unlabeled"]["image"], found["unlabeled"]["image"], strict=True)
            for name, (before, after) in zip(drawn["unlabeled"], pictures, strict=True):
                same = np.array_equal(before, after)
                assert same == (name != victim)
                replaced += not same
    assert replaced >= 2
    said = f"The image {victim} can no longer be read; {heir} takes its place (number 1, of at most"
    assert caplog.text.count(said) == 2  # once in each run
    assert "number 2" not in caplog.text


def test_labelled_images_are_replaced_by_labelled_ones(loaded, tmp_path):
    source = loaded[1].sources["train"]
    first, second = loaded[2].labeled
    damage(source, tmp_path / "cache", source.ids.index(first))
    iterator = data.train_iterator(*loaded)
    for batch in itertools.islice(iterator, 3):
        assert iterator.images["labeled"] == [second] * 2
        assert set(batch) == {"labeled", "unlabeled"}
        assert all(set(half) == {"image", "label", "inside"} for half in batch.values())


def test_images_of_a_batch_are_named_as_they_are(loaded):
    config, dataset, partition = loaded
    config.data.update({"crop_size": (24, 32), "scale_range": (1.0, 1.0), "flip": False})
    source = dataset.sources["train"]
    known = {source[i]["image"].tobytes(): name for i, name in enumerate(source.ids)}
    iterator = data.train_iterator(config, dataset, partition)
    for batch in itertools.islice(iterator, 6):
        for half, ids in iterator.images.items():
            assert ids == [known[image.tobytes()] for image in batch[half]["image"]]


def test_too_many_unreadable_images_end_a_run(loaded, tmp_path, caplog):
    config, dataset, partition = loaded
    config.data.max_unreadable = 0
    source = dataset.sources["train"]
    victim = partition.unlabeled[0]
    damage(source, tmp_path / "cache", source.ids.index(victim))
    iterator = data.train_iterator(config, dataset, partition)
    with pytest.raises(UserError, match=rf"1 train images .*data\.max_unreadable = 0: {victim}\."):
        take(iterator, 12)


def test_data_that_are_gone_end_a_run(loaded, tmp_path):
    config, _, partition = loaded
    (path,) = (tmp_path / "cache").rglob("*train.array_record*")
    path.unlink()
    dataset = data.load(config.data)
    with pytest.raises(UserError, match=r"can no longer be read .*No such file.*data\.cache_dir"):
        next(data.train_iterator(config, dataset, partition))


def test_evaluation_replaces_nothing(loaded, tmp_path, monkeypatch):
    source = loaded[1].sources["train"]
    damage(source, tmp_path / "cache", 3)
    with pytest.raises(UserError, match=rf"{source.ids[3]} can no longer be read.*hash mismatch"):
        list(data.eval_batches(source, 2))
    monkeypatch.setattr(cv2, "imdecode", lambda *_: None)
    with pytest.raises(UserError, match=rf"{source.ids[0]} can no longer .*it is corrupt"):
        list(data.eval_batches(source, 2))


def test_a_run_that_loses_its_images_keeps_its_checkpoint_and_can_be_repaired(whole, tmp_path):
    workdir, cache = tmp_path / "run", tmp_path / "cache"
    shutil.copytree(whole[1] / "checkpoints" / "2", workdir / "checkpoints" / "2")
    shutil.copytree(whole[0].data.cache_dir, cache)
    config = supervised(tmp_path)
    (path,) = cache.rglob("*train.array_record*")
    path.unlink()
    with pytest.raises(UserError, match=r"can no longer be read .*data\.cache_dir"):
        train(config, workdir)
    with Checkpointer(workdir, read_only=True) as checkpointer:
        assert checkpointer.latest_step() == 2
    shutil.rmtree(next(cache.glob("synthetic-*")))  # as the message says
    assert unreadable(data.load(config.data).sources["train"]) == []


# ---- Everything else -----------------------------------------------------------------------------


def test_training_goes_on_without_tensorboard_and_plots_and_with_a_clock_that_runs_backwards(
    whole, tmp_path, monkeypatch, caplog, capsys
):
    for folder in ("tensorboard", "plots"):
        (tmp_path / folder).write_text("in the way")
    clock = itertools.count(1_700_000_000, -3600)  # an hour at every look
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(time, "time_ns", lambda: next(clock) * 10**9)
    scores = train(whole[0], tmp_path)
    monkeypatch.undo()
    assert_as_without_fault(whole, tmp_path, scores)
    assert caplog.text.count("TensorBoard cannot be written") == 1
    evaluated = [r["step"] for r in writers.read_metrics(tmp_path) if "val/teacher_miou" in r]
    assert len(evaluated) == caplog.text.count("plots cannot be written") > 0
    rates = [r.get("train/images_per_second", 1.0) for r in writers.read_metrics(tmp_path)]
    assert all(0 < rate < 1e6 for rate in rates)
    lines = [line for line in capsys.readouterr().out.splitlines() if "ETA" in line]
    assert len(lines) == 4
    assert all(" ETA 0:0" in line for line in lines)


def test_files_of_tensorboard_stay_in_order_when_the_clock_jumps_back(tmp_path, monkeypatch):
    folder = tmp_path / "tensorboard"
    for part, seconds in enumerate((1_700_000_000, 1_600_000_000, 1_650_000_000)):
        monkeypatch.setattr(time, "time_ns", lambda seconds=seconds: seconds * 10**9)
        before = set(folder.iterdir()) if part else set()
        with writers.MetricWriter(tmp_path, resume_step=part) as writer:
            writer.write(part + 1, {"train/loss": 1.0})
        (new,) = set(folder.iterdir()) - before
        assert sorted(folder.iterdir())[-1] == new
