"""Transforms and batches: geometry, order, seeds, resuming, processes."""

import pickle
import types
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
import trees
from data_cases import assert_same_batches, changed, data_config, take
from ml_collections import ConfigDict
from trees import SIZE, picture, write_jpeg, write_png

from csc_jax import augment, data
from csc_jax.data import codec, pipeline, transforms
from csc_jax.errors import UserError

# ---- Transforms ----------------------------------------------------------------------------------


def coordinate_image(height=60, width=80):
    """An image whose colour is its place, (y, x, 0) in steps of 3, and the same place as label."""
    y, x = np.mgrid[:height, :width]
    image = np.stack((3 * y, 3 * x, 0 * x), -1).astype(np.uint8)
    return image, y.astype(np.uint8), x.astype(np.uint8)


FILL = (0, 0, 99)


def resized_crop(scales, size):
    return lambda *maps, rng: transforms.random_resized_crop(*maps, rng, scales, size, FILL)


# Of (image, label, rng). The sizes of "resize down" divide by odd numbers: halving has no middle
# pixel to copy, so that any choice is half a pixel off.
TRANSFORMS = {
    "resize down": lambda *maps, rng: transforms.resize(*maps, (20, 16)),
    "resize up": lambda *maps, rng: transforms.resize(*maps, (90, 120)),
    "crop": resized_crop((1.0, 1.0), (24, 36)),
    "crop with padding": resized_crop((1.0, 1.0), (70, 36)),
    "random resize and crop": resized_crop((0.5, 2.0), (24, 36)),
    "random resize and crop with padding": resized_crop((0.5, 2.0), (70, 90)),
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


@pytest.mark.parametrize("seed", range(12))
def test_a_resized_crop_is_a_window_of_the_resized_image(seed):
    """OpenCV resizes the whole image; the window must be part of it, at its border too."""
    # Smooth, as warpAffine rounds places to 1/32 px.
    image = cv2.GaussianBlur(picture(seed, (50, 70)), (0, 0), 2)
    y, x = (axis.astype(np.uint8) for axis in np.mgrid[:50, :70])
    size = (40, 60) if seed % 2 else (64, 96)

    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.5, 1) if rng.random() < 0.5 else rng.uniform(1, 2.0)
    have = (round(50 * scale), round(70 * scale))
    places = zip(have, size, strict=True)
    starts = [int(rng.integers(min(0, h - w), max(0, h - w) + 1)) for h, w in places]
    window = tuple(slice(s + w, s + 2 * w) for s, w in zip(starts, size, strict=True))

    def expected(map_, interpolation, fill):
        whole = cv2.resize(map_, have[::-1], interpolation=interpolation)
        return np.pad(whole, ((size[0],) * 2, (size[1],) * 2), constant_values=fill)[window]

    move = resized_crop((0.5, 2.0), size)
    for label in (y, x):
        crop, crop_label, inside = move(image, label, rng=np.random.default_rng(seed))
        nearest = expected(label, cv2.INTER_NEAREST_EXACT, 255)
        np.testing.assert_array_equal(inside, nearest != 255)
        gap = np.abs(crop_label.astype(int) - nearest)
        assert gap.max() <= 1  # of two equally near pixels OpenCV takes now one, now the other
        assert (gap > 0).mean() < 0.05
    for channel in range(3):
        bilinear = expected(image[..., channel], cv2.INTER_LINEAR, FILL[channel])
        assert np.abs(crop[..., channel].astype(int) - bilinear).max() <= 2


def test_padding_is_the_fill_colour_and_ignored_and_the_image_lies_anywhere():
    image, label = np.zeros((10, 12, 3), np.uint8), np.ones((10, 12), np.uint8)
    corners = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        crop, crop_label, inside = transforms.random_resized_crop(
            image, label, rng, (1.0, 1.0), (14, 12), (9, 8, 7)
        )
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
        _, label, _ = resized_crop((1.0, 1.0), (17, 20))(image, y, rng=np.random.default_rng(seed))
        starts.add(int(label[0, 0]))
    assert starts == {0, 1, 2, 3}


def test_scale_is_down_or_up_equally_often():
    image, label = np.zeros((100, 100, 3), np.uint8), np.zeros((100, 100), np.uint8)
    rng = np.random.default_rng(0)
    shrink_or_grow = resized_crop((0.5, 2.0), (200, 200))  # shows all of the largest
    sides = np.array([
        shrink_or_grow(image, label, rng=rng)[2].any(0).sum() for _ in range(1500)
    ])  # fmt: skip
    assert sides.min() >= 50
    assert sides.max() <= 200
    assert 0.42 < (sides < 100).mean() < 0.58
    assert abs(sides[sides < 100].mean() - 75) < 3
    assert abs(sides[sides > 100].mean() - 150) < 6


def test_flip_is_fair():
    maps = (np.arange(2, dtype=np.uint8)[None],)
    rng = np.random.default_rng(0)
    flips = [transforms.random_flip(maps, rng)[0][0, 0] for _ in range(400)]
    assert 0.42 < np.mean(flips) < 0.58


# ---- Batches -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Config, data set and partition (2 labelled, 6 unlabelled) of a CamVid tree."""
    folder = tmp_path_factory.mktemp("data")
    trees.camvid_tree(folder / "root")
    config = data_config(folder)
    dataset = data.load(config.data)
    return config, dataset, data.partition(config.data, dataset, 0)


def test_batches_have_fixed_shapes(loaded):
    for batch in take(data.train_iterator(*loaded), 5):
        for half, count in (("labeled", 2), ("unlabeled", 3)):
            image, label, inside = (batch[half][key] for key in ("image", "label", "inside"))
            assert image.shape == (count, 16, 16, 3)
            assert label.shape == inside.shape == (count, 16, 16)
            assert (image.dtype, label.dtype, inside.dtype) == (np.uint8, np.uint8, bool)


def test_the_shapes_of_a_batch_are_known_without_it(loaded):
    config = changed(loaded[0], crop_size=(16, 24))
    batch = next(data.train_iterator(config, *loaded[1:]))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    assert data.abstract_batch(config) == shapes


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


def test_images_and_labels_are_together_through_the_whole_pipeline(tmp_path):
    """Files, resize, crop, flip, batch and CutMix: each label still says its pixel's place."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    trees.camvid_tree(tmp_path / "root", train=4, val=1)
    for i in range(4):  # the classes are stripes, down in half of the images, across in the others
        stripes = y // 2 if i % 2 else x // 3
        image = np.stack((10 * (y // 2), 10 * (x // 3), 0 * y + 60 * i), -1).astype(np.uint8)
        (tmp_path / f"root/images/train/train é{i}.jpg").unlink()
        write_png(tmp_path / f"root/images/train/train é{i}.png", image)
        write_png(tmp_path / f"root/labels/train/train é{i}.png", (stripes % 11).astype(np.uint8))
    config = data_config(tmp_path, labeled_fraction="1/2", crop_size=(24, 24))
    dataset = data.load(config.data)
    iterator = data.train_iterator(config, dataset, data.partition(config.data, dataset, 0))
    batch = next(iterator)["unlabeled"]
    mask = augment.cutmix_mask(jax.random.key(0), 3, (24, 24), 1.0)
    assert 0.3 < np.mean(mask) < 0.7
    images, labels = (np.asarray(augment.mix(mask, batch[key])) for key in ("image", "label"))
    known = labels != 255
    source = np.rint(images[..., 2] / 60).astype(int)
    assert len(np.unique(source[known])) > 1  # parts of different images
    place = np.where(source % 2, images[..., 0], images[..., 1]) / 10
    gap = np.abs(place % 11 - labels)
    gap = np.minimum(gap, 11 - gap)[known]  # the classes repeat
    assert (gap <= 0.5).mean() > 0.9  # but for the mixed colours between two stripes
    assert gap.max() <= 1.0


def whole_batch(parts):
    return {
        half: {key: np.concatenate([p[half][key] for p in parts]) for key in parts[0][half]}
        for half in parts[0]
    }


@pytest.mark.parametrize("processes", [2, 4])
def test_the_shares_of_all_processes_are_the_batch_of_one(loaded, processes):
    config = changed(loaded[0])
    config.batch.labeled, config.batch.unlabeled = 4, 8
    iterators = [
        data.train_iterator(config, *loaded[1:], process_index=i, process_count=processes)
        for i in range(processes)
    ]
    shares = zip(*(take(iterator, 5) for iterator in iterators), strict=True)
    union = [whole_batch(parts) for parts in shares]
    assert_same_batches(union, take(data.train_iterator(config, *loaded[1:]), 5))


class CountingSource(data.Source):
    """Notes which images are read."""

    def __getitem__(self, index):
        self.records.noted.append(index)
        return super().__getitem__(index)


class NotedRecords:
    def __init__(self, records):
        self.records, self.noted = records, []

    def __getitem__(self, index):
        return self.records[index]


def test_a_process_reads_only_its_share(loaded):
    config, dataset, partition = loaded
    config = changed(config, threads=1, prefetch=1)
    config.batch.labeled, config.batch.unlabeled = 4, 8
    source = dataset.sources["train"]
    read = []
    for processes in (1, 4):
        records = NotedRecords(source.records)
        counting = CountingSource(source.ids, source.max_size, records)
        watched = data.Dataset("watched", ("a",), dataset.palette, {"train": counting})
        iterator = data.train_iterator(config, watched, partition, 0, processes)
        take(iterator, 8)
        read.append(len(records.noted))
    assert 8 * 12 <= read[0] <= 10 * 12  # up to two batches are made ahead
    assert 8 * 3 <= read[1] <= 10 * 3


def test_a_batch_that_does_not_divide_by_the_processes_is_an_error(loaded):
    with pytest.raises(UserError, match=r"batch\.unlabeled is 3.* the 2 processes"):
        data.train_iterator(*loaded, process_index=0, process_count=2)


def test_worker_processes_give_the_same_batches(loaded):
    config = changed(loaded[0], workers=2, threads=1)
    batches = take(data.train_iterator(config, *loaded[1:]), 4)
    assert_same_batches(batches, take(data.train_iterator(*loaded), 4))


def test_threads_and_buffer_are_set_for_the_machine(monkeypatch):
    monkeypatch.setattr(codec, "cpu_count", lambda: 12)
    for fields, found in (
        ({}, (12, 24)),
        ({"workers": 4}, (3, 6)),
        ({"workers": 40}, (1, 2)),
        ({"threads": 5}, (5, 10)),
        ({"threads": 5, "prefetch": 3}, (5, 3)),
    ):
        config = {"threads": 0, "prefetch": 0, "workers": 0} | fields
        options = pipeline.read_options(ConfigDict(config))
        assert (options.num_threads, options.prefetch_buffer_size) == found


def test_images_without_label_are_ignored_pixels_of_the_unlabelled_half(tmp_path):
    trees.folder_tree(tmp_path / "root", labeled=4, unlabeled=4)
    config = data_config(tmp_path, name="folder", labeled_fraction="1")
    dataset = data.load(config.data)
    partition = data.partition(config.data, dataset, 0)
    assert set(partition.unlabeled) == dataset.sources["train"].without_label
    for batch in take(data.train_iterator(config, dataset, partition), 4):
        assert (batch["unlabeled"]["label"] == 255).all()
        assert (batch["labeled"]["label"] != 255).any()
        assert batch["unlabeled"]["inside"].any()


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
    trees.camvid_tree(tmp_path / "root", train=4, val=2)
    for name in ("train é1", "train é2"):
        write_jpeg(tmp_path / f"root/images/train/{name}.jpg", picture(0, (10, 40)))
        write_png(tmp_path / f"root/labels/train/{name}.png", np.zeros((10, 40), np.uint8))
    source = data.load(data_config(tmp_path).data).sources["train"]
    assert source.max_size == (24, 40)
    batches = list(data.eval_batches(source, 2))
    assert [(b["image"].shape[1:3], int(b["valid"].sum())) for b in batches] == [
        (SIZE, 1),
        ((10, 40), 2),
        (SIZE, 1),
    ]


def test_workers_are_refused_where_shared_memory_is_too_small(loaded, monkeypatch):
    config, dataset, lists = changed(loaded[0], workers=2), *loaded[1:]
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    images = config.batch.labeled + config.batch.unlabeled
    free = 2 * 4 * images * 16 * 16 * 5 - 1  # bytes of image, label and `inside`
    monkeypatch.setattr(pipeline, "_SHARED_MEMORY", Path("/"))
    with pytest.raises(
        UserError, match=r"data\.workers is 2, .* 1 MB left.*--shm-size=1m.*data\.workers=0"
    ):
        data.train_iterator(config, dataset, lists)
    free += 1
    pipeline._check_shared_memory(config, 1)
    free //= 2
    pipeline._check_shared_memory(config, 2)  # each process has half of a batch
