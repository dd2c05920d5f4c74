"""What to label next: the rule on hand-made cases, and what `--mode=label` writes of a run."""

import csv
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image
from saved_run import STEP, save_run

import csc_jax
from csc_jax import data, main, stored_config
from csc_jax.data.example import BadExample, Pair
from csc_jax.deploy import acquisition
from csc_jax.deploy.acquisition import Measures, rank
from csc_jax.deploy.label import label
from csc_jax.errors import UserError
from csc_jax.models.layers import Outputs
from csc_jax.parallel import distributed

HOSTILE = ("=1+1", "frame.0001", 'a, "b"', "größe 空", "<i>x $y$")


def angles(*degrees):
    """Returns features in the plane, of any length: their directions alone are compared."""
    radians = np.radians(degrees)
    return (
        np.stack([np.cos(radians), np.sin(radians)], -1) * np.arange(3, 3 + len(degrees))[:, None]
    )


def test_of_ten_neighbours_one_comes_first_and_the_others_last():
    """Ten uncertain frames of one video, and three less uncertain images elsewhere."""
    video = angles(*np.linspace(80, 80.09, 10))
    uncertainty = np.array([0.5 + 0.01 * i for i in range(10)] + [0.2, 0.2, 0.2])
    ranking = rank(uncertainty, np.concatenate([video, angles(180, 270, 300)]), angles(0))
    assert set(np.argsort(-uncertainty)[:10]) == set(range(10))  # what uncertainty alone takes
    # 9 is the most uncertain and 80 degrees from the labelled one; then 180 degrees from it.
    assert ranking.order[:4].tolist() == [9, 10, 11, 12]
    np.testing.assert_allclose(ranking.distance[0], 2 * np.sin(np.radians(80.09 / 2)))
    np.testing.assert_allclose(ranking.distance[1], 2 * np.sin(np.radians((180 - 80.09) / 2)))
    assert (ranking.score[4:] < 0.01).all()


def test_what_is_labelled_keeps_its_neighbours_back():
    labeled = angles(90, 10)
    features = angles(10, 40, 91)
    ranking = rank(np.array([0.9, 0.1, 0.9]), features, labeled)
    assert ranking.order.tolist() == [1, 2, 0]
    assert ranking.nearest.tolist() == [1, 0, 1]
    np.testing.assert_allclose(ranking.score[-1], 0, atol=1e-7)
    chord = 2 * np.sin(np.radians([15, 0.5, 0]))
    np.testing.assert_allclose(ranking.distance, chord, atol=1e-7)
    np.testing.assert_allclose(ranking.score, [0.1, 0.9, 0.9] * chord, atol=1e-7)


def greedy_by_hand(uncertainty, features, labeled):
    """The rule as it is written, with every distance anew at each step."""
    taken, left, found = list(labeled), list(range(len(features))), []
    while left:
        scores = [
            uncertainty[i] * min(float(np.linalg.norm(features[i] - t)) for t in taken)
            for i in left
        ]
        best = int(np.argmax(scores))
        found.append((left[best], scores[best]))
        taken.append(features[left.pop(best)])
    return found


@pytest.mark.parametrize("chunk", [3, 1024])
def test_the_order_is_that_of_the_rule(chunk, monkeypatch):
    monkeypatch.setattr(acquisition, "_CHUNK", chunk)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 5)).astype(np.float32)
    labeled = rng.normal(size=(8, 5)).astype(np.float32)
    uncertainty = rng.random(30).astype(np.float32)
    directions = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, labeled)]
    expected = greedy_by_hand(uncertainty, *directions)
    ranking = rank(uncertainty, features, labeled)
    assert ranking.order.tolist() == [index for index, _ in expected]
    np.testing.assert_allclose(ranking.score, [score for _, score in expected], rtol=1e-4)
    assert (np.diff(ranking.score) <= 0).all()

    # Of a large data set, the rest follows by what is left of its score.
    monkeypatch.setattr(acquisition, "MOST_GREEDY", 4)
    short = rank(uncertainty, features, labeled)
    assert short.order[:4].tolist() == ranking.order[:4].tolist()
    assert sorted(short.order) == list(range(30))
    assert (np.diff(short.score) <= 0).all()


def test_images_without_any_feature_are_ranked_too():
    ranking = rank(np.array([0.1, 0.2]), np.zeros((2, 3)), np.zeros((1, 3)))
    assert sorted(ranking.order) == [0, 1]
    assert np.isfinite(ranking.score).all()


def test_entropy_and_disagreement_of_a_hand_made_network():
    """Logits are the image times a number, which is all of a network."""
    task = types.SimpleNamespace(
        num_classes=3,
        eval_forward=lambda factor, x: Outputs(x * factor, None, None, x[:, ::2] + factor),
    )
    image = np.zeros((2, 2, 2, 3), np.uint8)
    image[0, 0, 0] = 200, 0, 0  # certain; the other three pixels know nothing
    image[1] = 200, 0, 0
    image[1, 1, 1] = 0, 100, 100  # two classes alike
    found = acquisition.make_measure(task)(jnp.float32(1), jnp.float32(-1), image)
    np.testing.assert_allclose(found.entropy, [3 / 4, np.log(2) / np.log(3) / 4], rtol=1e-6)
    # Times -1, every pixel prefers another class, but for those that have no preference.
    np.testing.assert_allclose(found.disagreement, [1 / 4, 1])
    np.testing.assert_allclose(found.uncertainty, (found.entropy + found.disagreement) / 2)
    np.testing.assert_allclose(found.features[0], [101, 1, 1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_run(folder)
    return folder


def read_ranking(folder):
    with (folder / "ranking.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_run_ranks_its_unlabelled_images_and_writes_their_masks(run, caplog):
    caplog.set_level("INFO", "csc_jax")
    with flagsaver.flagsaver():
        assert main.main(["csc-jax", "--mode=label", f"--workdir={run}"]) == 0
    config = stored_config.get_config(str(run))
    dataset = data.load(config.data)
    partition = data.partition(config.data, dataset, config.seed)
    out = run / "label"
    rows = read_ranking(out)
    assert [int(row["rank"]) for row in rows] == list(range(1, 13))
    assert sorted(row["image"] for row in rows) == sorted(partition.unlabeled)
    seen = set(partition.labeled)
    for row in rows:
        score, entropy, disagreement, distance = (
            float(row[part]) for part in ("score", "entropy", "disagreement", "distance")
        )
        np.testing.assert_allclose(score, (entropy + disagreement) / 2 * distance, rtol=1e-4)
        assert 0 < entropy <= 1
        assert row["nearest"] in seen
        seen.add(row["image"])

    model, source = csc_jax.load(run), dataset.sources["train"]
    for row in rows:
        result = model.predict(source[source.ids.index(row["image"])]["image"])
        mask = read(out / "masks" / f"{row['image']}.png")
        np.testing.assert_array_equal(mask, result.classes)
        confidence = read(out / "masks" / f"{row['image']}_confidence.png")
        np.testing.assert_allclose(confidence / 255, result.confidence, atol=0.003)
    assert len(list((out / "masks").iterdir())) == 3 * len(rows)
    height, width, _ = read(out / "contact_sheet.png").shape
    assert width >= 5 * 240  # five in a row, three rows
    assert height >= 3 * 240


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A run on photographs under hostile names, which it sees at another size than their own."""
    folder = tmp_path_factory.mktemp("photos")
    root = folder / "root"
    rng = np.random.default_rng(0)
    for part in ("images/train", "images/val", "labels/train", "labels/val"):
        (root / part).mkdir(parents=True)
    (root / "classes.txt").write_text("ground\nthing\n")

    def save(name, size, *, labeled):
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{name}.jpg")
        if labeled:
            Image.fromarray(pixels[..., 0] // 128).save(root / "labels" / f"{name}.png")

    for name in ("val/v", "train/l0", "train/l1"):
        save(name, (40, 40), labeled=True)
    for i, name in enumerate(HOSTILE):
        save(f"train/{name}", (50 + 8 * i, 70), labeled=False)
    config = {"name": "folder", "root": str(root), "image_size": (32, 32), "labeled_fraction": "1"}
    save_run(folder / "W", **{f"data__{field}": value for field, value in config.items()})
    return folder


def test_masks_fit_photographs_of_any_name_and_size(photos, tmp_path):
    work, root, out = photos / "W", photos / "root", tmp_path / "deep" / "out"
    label(stored_config.get_config(str(work)), work, "latest", out, polygons="labelme")
    rows = read_ranking(out)
    assert {row["image"] for row in rows} == {f"train/{name}" for name in HOSTILE}
    for row in rows:
        photo, mask = (root / "images" / f"{row['image']}.jpg"), (out / "masks" / row["image"])
        drawn = json.loads(mask.with_name(f"{mask.name}.json").read_text())
        assert (mask.parent / drawn["imagePath"]).resolve() == photo.resolve()
        height, width, _ = read(photo).shape
        assert (drawn["imageHeight"], drawn["imageWidth"]) == (height, width)
        assert read(mask.with_name(f"{mask.name}.png")).shape == (height, width)
    # A mask is a label as it stands.
    for row in rows:
        target = root / "labels" / f"{row['image']}.png"
        target.write_bytes((out / "masks" / f"{row['image']}.png").read_bytes())
    config = stored_config.get_config(str(work))
    assert not data.load(config.data).sources["train"].without_label
    with pytest.raises(UserError, match="has no unlabelled images to rank: all 7 train images"):
        label(config, work, "latest", tmp_path / "again")
    assert not (tmp_path / "again").exists()
    for row in rows:
        (root / "labels" / f"{row['image']}.png").unlink()


def test_an_image_that_is_gone_is_named_when_the_others_are_done(photos, tmp_path, monkeypatch):
    whole, gone = Pair.read, f"train/{HOSTILE[1]}"

    def read_or_not(pair, *arguments):
        if pair.id == gone:
            raise BadExample(f"{pair.image} cannot be read")
        return whole(pair, *arguments)

    config = stored_config.get_config(str(photos / "W"))
    data.load(config.data)  # prepared, whatever tests have changed
    monkeypatch.setattr(Pair, "read", read_or_not)
    with pytest.raises(UserError, match=r"1 of 5 images cannot be read any more: .*frame\.0001"):
        label(config, photos / "W", "latest", tmp_path / "out")
    masks = [p for p in (tmp_path / "out/masks/train").iterdir() if "_" not in p.name]
    assert len(masks) == 4
    assert len(read_ranking(tmp_path / "out")) == 5
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


def test_folders_that_hold_something_are_left_alone(photos, tmp_path):
    config, work = stored_config.get_config(str(photos / "W")), photos / "W"
    corrected = tmp_path / "out" / "masks" / "a.png"
    corrected.parent.mkdir(parents=True)
    corrected.write_bytes(b"by hand")
    for out in (tmp_path / "out", corrected):
        with pytest.raises(UserError, match=r"is there already, and may hold masks"):
            label(config, work, "latest", out)
    with pytest.raises(UserError, match=r"--out=.* lies in data\.root"):
        label(config, work, "latest", photos / "root" / "images" / "masks")
    assert not (photos / "root" / "images" / "masks").exists()
    with pytest.raises(UserError, match=r"cannot be written: .*choose another --out"):
        label(config, work, "latest", work / "config.json" / "out")


def test_two_images_are_never_written_to_one_file(photos, tmp_path):
    config, work = stored_config.get_config(str(photos / "W")), photos / "W"
    train = photos / "root" / "images" / "train"
    other = train / f"{HOSTILE[1]}_overlay.jpg"
    other.write_bytes((train / f"{HOSTILE[1]}.jpg").read_bytes())
    try:
        with pytest.raises(UserError, match=r"The data set folder holds both .* to one file"):
            label(config, work, "latest", tmp_path / "out")
    finally:
        other.unlink()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value", "options", "message"),
    [
        ("eval.mode", "center_crop", {}, r"eval\.mode is 'center_crop'\. Set it to"),
        ("data.synthetic.train", 16, {"polygons": "labelme"}, "in no file of its own. Use .*coco"),
        ("data.labeled_fraction", "1", {}, "no unlabelled images to rank: all 16"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    run, tmp_path, field, value, options, message
):
    config = stored_config.get_config(str(run))
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        label(config, run, "latest", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_network_of_other_classes_is_refused(run, photos, tmp_path):
    config = stored_config.get_config(str(run))
    config.data = stored_config.get_config(str(photos / "W")).data
    with pytest.raises(UserError, match="the data set folder have other classes"):
        label(config, run, "latest", tmp_path / "out")


def test_a_network_without_finite_numbers_is_refused(run, tmp_path, monkeypatch):
    nothing = Measures(*(np.full(shape, np.nan, np.float32) for shape in ((1,), (1,), (1, 3))))
    monkeypatch.setattr(acquisition, "make_measure", lambda task: lambda *arguments: nothing)
    with pytest.raises(UserError, match=f"step {STEP} gives no finite numbers for the image train"):
        label(stored_config.get_config(str(run)), run, "latest", tmp_path / "out")


def test_several_processes_are_refused(run, monkeypatch, capsys):
    for name, does in (("join", lambda *_, **__: None), ("leave", lambda status: status)):
        monkeypatch.setattr(distributed, name, does)
    monkeypatch.setattr(distributed, "several", lambda: True)
    with flagsaver.flagsaver():
        assert main.main(["csc-jax", "--mode=label", f"--workdir={run}", "--out=x"]) == 2
    assert "--mode=label runs in one process" in capsys.readouterr().err
