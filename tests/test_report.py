"""`report.html`: every section from a tiny run, escaped names, no word of the network."""

import base64
import dataclasses
import hashlib
import json
import logging
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from absl.testing import flagsaver
from tiny import tiny_config

from csc_jax import config as config_lib
from csc_jax import data, main
from csc_jax.errors import UserError
from csc_jax.evaluation import detail as detail_lib
from csc_jax.evaluation.score import load, score
from csc_jax.reporting import launches, report, runs, writers
from csc_jax.training.loop import train

SECTIONS = {
    *("data", "scores", "confusion", "calibration", "images", "panels", "curves", "bank"),
    *("configuration", "time", "reproduce"),
}
HOSTILE = '<img src=x onerror="alert(1)">\u202egnp\x07\x1b[31m\'&{{ 7 * 7 }}'


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, and text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self.sections = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "section":
            self.sections.append(dict(attributes)["id"])

    def handle_endtag(self, tag):
        self.words.append(" ")

    def handle_data(self, text):
        if self.lasttag not in ("style", "script"):
            self.words.append(text)

    @property
    def text(self):
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def whole(folder):
    """A run that wrote its report: its config, work directory and scores."""
    config = tiny_config(folder, train__report=True)
    return config, folder / "whole", train(config, folder / "whole")


@pytest.fixture
def copy(whole, tmp_path):
    """The work directory of that run, to be spoilt; without its checkpoints."""
    ignored = shutil.ignore_patterns("checkpoints", "tensorboard")
    return shutil.copytree(whole[1], tmp_path / "copy", ignore=ignored)


def changed(workdir, **fields):
    path = workdir / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {k.replace("__", "."): v for k, v in fields.items()}))


def assert_self_contained(html):
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                assert re.match(r"#[\w-]+$|data:(image/(png|jpeg);base64)?,", value), (tag, value)
            for link in re.findall(r"url\(([^)]*)\)", value or ""):
                assert link.startswith("#"), (tag, value)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    return page


def test_training_ends_with_a_report_that_has_every_section(whole):
    _, workdir, scores = whole
    html = (workdir / "report.html").read_text()
    page = assert_self_contained(html)
    assert set(page.sections) == SECTIONS
    assert f"{100 * scores.miou:.1f} %" in page.text
    charts = [a["aria-label"] for t, a in page.tags if t == "svg"]
    for title in ("Losses", "Mean IoU on the validation split", "Pseudo-labels", "Learning rate"):
        assert title in charts
    for title in ("Separ (Eq. 9), lower is better", "Cons (Eq. 7), higher is better"):
        assert title in charts
    assert {"Confusion matrix", "Reliability curve"} <= set(charts)
    for word in ("precision %", "recall %", "F1 %", "boundary IoU %", "jaxlib", "pedestrian"):
        assert word in page.text


def test_every_picture_is_a_data_uri_that_decodes(whole):
    page = Page((whole[1] / "report.html").read_text())
    pictures = [a["src"] for t, a in page.tags if t == "img"]
    assert len(pictures) == 2 * 4 + 2  # worst and best, panels
    for uri in pictures:
        encoded = base64.b64decode(uri.partition(",")[2], validate=True)
        assert cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR) is not None


def test_the_only_script_is_the_one_that_the_policy_allows(whole):
    html = (whole[1] / "report.html").read_text()
    page = Page(html)
    (policy,) = [a["content"] for t, a in page.tags if "http-equiv" in a]
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'; img-src data:;" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_what_was_measured_agrees_with_the_evaluation(whole):
    config, workdir, scores = whole
    detail = detail_lib.load(workdir)
    np.testing.assert_array_equal(detail.scores.confusion, scores.confusion)
    assert detail.scores.per_image == pytest.approx(scores.per_image, abs=1e-6)
    assert detail.calibration.count.sum() == scores.confusion.sum()
    assert detail.calibration.right.sum() == np.trace(scores.confusion)
    assert detail.step == 6
    ranked = sorted(scores.per_image, key=scores.per_image.get)
    assert [e.name for e in detail.examples if e.kind == "worst"] == ranked[:4]
    assert [e.name for e in detail.examples if e.kind == "best"] == ranked[::-1][:4]
    assert score(config, workdir, "latest").miou == detail.scores.miou


def test_confidence_with_flips_and_without_logits(whole):
    config, workdir, _ = whole
    config = config.copy_and_resolve_references()
    config.eval.flip = True
    source = data.load(config.data).source("val")
    experiment, network, step = load(config, workdir, "latest")
    detail = detail_lib.measure(experiment, network, step, source)
    total = detail.calibration.confidence.sum() / detail.calibration.count.sum()
    assert 1 / 7 < total <= 1  # a mean of two probabilities, no sum of them
    config.eval.flip, config.eval.mode, config.eval.panels = False, "center_crop", 0
    config.eval.window = (16, 24)
    experiment, network, step = load(config, workdir, "latest")
    detail = detail_lib.measure(experiment, network, step, source)
    assert detail.calibration is None
    assert detail.examples == ()
    assert detail.scores.confusion.sum() == 6 * 16 * 24
    assert detail.scores.note == "center_crop"


def test_the_mode_measures_what_no_report_has_measured(whole, caplog, monkeypatch):
    config, workdir, _ = whole
    again = detail_lib.measure
    measured = []
    monkeypatch.setattr(detail_lib, "measure", lambda *a: measured.append(a[2]) or again(*a))
    report.report(config, workdir, "latest")
    assert measured == []  # the training has measured it
    report.report(config, workdir, "3")
    assert measured == [3]
    page = Page((workdir / "report.html").read_text())
    assert "Measured at step 3; the run went on to 6." in page.text
    report.report(config, workdir, "6")
    assert measured == [3, 6]


def test_the_command_writes_a_report_of_several_runs(whole, copy, tmp_path, capsys):
    def run(*arguments):
        with flagsaver.flagsaver():
            return main.main(["csc-jax", *arguments])

    (whole[1] / "report.html").unlink()
    assert run("--mode=report", f"--workdir={whole[1]}", f"--compare={copy},{copy}") == 0
    page = Page((whole[1] / "report.html").read_text())
    assert "comparison" in page.sections
    assert "report.html" in capsys.readouterr().out
    assert run("--mode=report", f"--workdir={whole[1]}", f"--compare={tmp_path}/none") == 2
    assert "none/config.json cannot be read" in capsys.readouterr().err
    assert run("--mode=evaluate", f"--workdir={whole[1]}", f"--compare={copy}") == 2
    assert "--compare goes with --mode=report" in capsys.readouterr().err
    assert run("--mode=report") == 2
    assert "--workdir is missing" in capsys.readouterr().err


def test_without_checkpoint_or_data_the_report_says_so(whole, copy, caplog):
    (copy / "evaluation" / "report.json").unlink()
    with caplog.at_level(logging.WARNING, "csc_jax"):
        report.report(whole[0], copy, "latest")
    page = Page((copy / "report.html").read_text())
    assert set(page.sections) == SECTIONS - {"confusion", "calibration", "images"}
    assert "holds no checkpoint" in page.text
    assert "The last IoU that training recorded" in page.text
    assert "Nothing was measured" in caplog.text


def test_names_are_escaped_and_made_visible(whole, copy, tmp_path):
    detail = detail_lib.load(copy)
    names = (HOSTILE, *detail.class_names[1:])
    image = f"{HOSTILE}.png"
    detail = dataclasses.replace(
        detail,
        class_names=names,
        scores=dataclasses.replace(detail.scores, per_image={image: 0.5}),
        examples=(dataclasses.replace(detail.examples[0], name=image),),
    )
    detail_lib.save(detail, copy)
    counted = {"labeled_images": 1, "pixels": {HOSTILE: 0, "b": 1}, "images": {HOSTILE: 0, "b": 1}}
    counted |= {"ignored_pixels": 0, "values": {}}
    (copy / "data.json").write_text(
        json.dumps({HOSTILE: counted, "train": counted, "val": counted})
    )
    (copy / "splits" / "labeled.txt").write_text(f"{HOSTILE}\n")
    changed(copy, data__root=HOSTILE, data__name=HOSTILE, data__labeled_list=f"/x/{HOSTILE}")
    other = shutil.copytree(copy, tmp_path / HOSTILE.replace("/", ""))
    changed(other, method__name=HOSTILE)
    lines = (
        (copy / "launches.jsonl")
        .read_text()
        .replace('"command": null', f'"command": {json.dumps(["--workdir=" + HOSTILE])}')
    )
    (copy / "launches.jsonl").write_text(lines)
    html = report.page(copy, [other], [HOSTILE])
    page = assert_self_contained(html)
    assert [t for t, a in page.tags if t == "img" and a["src"] == "x"] == []
    assert "<img src=x" in page.text  # as text, read back from its escapes
    assert "{{ 7 * 7 }}" in page.text
    for character in "\u202e\x07\x1b":
        assert character not in html
    assert r"\u202egnp\x07\x1b[31m" in page.text
    titles = [a["title"] for t, a in page.tags if t == "td" and "title" in a]
    assert any(r"\u202e" in title for title in titles)


def test_several_runs_stand_side_by_side(whole, copy, tmp_path):
    others = []
    for method, seed, points in (("csc", 1, 2), ("supervised", 0, -1), ("supervised", 1, -2)):
        for share, count in (("1/4", 4), ("1/2", 8)):
            other = shutil.copytree(copy, tmp_path / f"{method}_{seed}_{count}")
            changed(other, method__name=method, seed=seed, data__labeled_fraction=share)
            (other / "splits" / "labeled.txt").write_text("a\n" * count)
            value = 0.5 + points / 100 + count / 100
            record = {"step": 6, "val/teacher_miou": value, "val/teacher_iou/sky": value}
            writers.metrics_path(other).write_text(json.dumps(record) + "\n")
            others.append(other)
    record = {"step": 6, "val/teacher_miou": 0.5, "val/teacher_iou/sky": 0.25}
    writers.metrics_path(copy).write_text(json.dumps(record) + "\n")
    page = assert_self_contained(report.page(copy, others))
    assert set(page.sections) - SECTIONS == {"comparison"}
    # At 1/4: csc 50 and 56 %, supervised 53 and 52 %; at 1/2 there is csc's seed 1 alone.
    assert "0: +3.0, 1: -4.0 -0.5 ± 4.9" in page.text
    assert "1: -4.0 -4.0 – –" in page.text
    charts = [a["aria-label"] for t, a in page.tags if t == "svg"]
    assert {"Label efficiency", "mIoU of the runs"} <= set(charts)
    assert "method.name csc csc csc supervised" in page.text
    names = "copy csc_1_4 csc_1_8 supervised_0_4 supervised_0_8 supervised_1_4 supervised_1_8"
    assert f"class {names} sky 25.0" in page.text


def test_rows_are_named_by_what_tells_them_apart(copy, tmp_path):
    found = [runs.read_run(copy)]
    for index, fields in enumerate(
        ({"seed": 4, "data.root": "x"}, {"loss.name": "ohem"}, {"method.contrast": "csc"})
    ):
        other = shutil.copytree(copy, tmp_path / str(index))
        path = other / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        found.append(runs.read_run(other))
    assert runs.rows(found) == [
        *["csc (loss.name=cross_entropy)"] * 2,
        "csc (loss.name=ohem)",
        "csc+csc",
    ]
    assert runs.rows(found[:2]) == ["csc", "csc"]
    scores, repeated = runs.scores_of([found[0], found[1], found[0]])
    assert (len(scores), repeated) == (2, 1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("evaluation/report.json", "{}"),
        ("evaluation/report.json", "[" * 100_000),
        ("evaluation/report.json", '{"step": 1e999}'),
        ("metrics.jsonl", '{"step": 1}\n{"step": "x"}\n[1]\n{"step": 2, "train/loss": 1e999}\n'),
        ("metrics.jsonl", '{"step": 3, "train/loss": "<b>"}\n' + "9" * 500 + "\n"),
        ("launches.jsonl", '{"launch": 1}\n3\n{"launch": 1, "seconds": "x"}\n'),
        ("data.json", '{"train": {"labeled_images": 1, "pixels": 3}}'),
        (
            "data.json",
            '{"train": {"labeled_images": 1, "pixels": {"a": 1, "b": -1}, "ignored_pixels": 0, '
            '"images": {"a": 1, "b": 1}, "values": {}}}',
        ),
        ("plots/panel_000006.png", "no picture"),
        ("splits/labeled.txt", "\udcff"),
    ],
)
def test_files_that_are_not_as_we_write_them_count_as_absent(copy, name, content):
    (copy / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert_self_contained(report.page(copy))


def test_a_huge_picture_is_left_out(copy):
    panel = copy / "plots" / "panel_000006.png"
    stored = bytearray(panel.read_bytes())
    stored[16:24] = (100_000).to_bytes(4) * 2
    panel.write_bytes(stored)
    assert [name for name, _ in report._panels(copy)] == ["panel_000003"]


@pytest.mark.parametrize("field", [{"seed": "x"}, {"train.steps": [1]}, {"data.name": 3}])
def test_a_folder_that_holds_no_run_is_named(whole, copy, tmp_path, field):
    with pytest.raises(UserError, match=r"nowhere/config.json cannot be read"):
        report.report(whole[0], copy, "latest", [tmp_path / "nowhere"])
    changed(copy, **{name.replace(".", "__"): value for name, value in field.items()})
    with pytest.raises(UserError, match=rf"{next(iter(field))} is .*--workdir"):
        report.report(whole[0], copy, "latest")


def test_a_report_that_fails_costs_a_training_one_line(whole, folder, monkeypatch, caplog):
    config, workdir, scores = whole
    before = (workdir / "report.html").read_bytes()

    def fail(*_, **__):
        raise RuntimeError("no\n room")

    monkeypatch.setattr(report, "page", fail)
    with caplog.at_level(logging.WARNING, "csc_jax"):
        again = train(config, workdir)
    np.testing.assert_array_equal(again.confusion, scores.confusion)
    (line,) = [r.getMessage() for r in caplog.records if "report.html" in r.getMessage()]
    assert line.endswith("was not written (RuntimeError: no room); the run itself is whole")
    assert (workdir / "report.html").read_bytes() == before


def test_launches_are_kept_with_their_commands(tmp_path, monkeypatch):
    import jax

    path = Path(launches.__file__).parents[1] / "main.py"
    command = ["--config", "camvid", "--workdir=a b", "--config.seed=3", "--config.wandb"]
    monkeypatch.setattr("sys.argv", [str(path), *command])
    with launches.launched(tmp_path, jax.devices()[:2], time.perf_counter()):
        (running,) = launches.read_launches(tmp_path)
        assert running.seconds is None
    monkeypatch.setattr("sys.argv", ["notebook.py"])
    with (
        pytest.raises(ZeroDivisionError),
        launches.launched(tmp_path, jax.devices()[:1], time.perf_counter()),
    ):
        _ = 1 / 0
    first, second = launches.read_launches(tmp_path)
    assert first.line == "csc-jax --config camvid '--workdir=a b' --config.seed=3 --config.wandb"
    assert (first.config, first.overrides) == ("camvid", {"seed": "3", "wandb": ""})
    assert first.devices == "2 x cpu"
    assert first.versions["jax"] == jax.__version__
    assert second.command is None
    assert second.seconds is not None


def test_fields_are_told_apart_by_who_set_them(copy):
    lines = (
        (copy / "launches.jsonl")
        .read_text()
        .replace('"command": null', '"command": ["--config=own.py", "--config.train.steps=6"]')
    )
    (copy / "launches.jsonl").write_text(lines)
    page = Page(report.page(copy))
    assert (
        "The run began with --config=own.py; 1 field(s) were set on the command line" in page.text
    )
    assert "train.steps 0 6 command line" in page.text
    assert "optimizer.name sgd adamw config" in page.text
    assert "seed 0" not in page.text.partition("set by")[2].partition("Run time")[0]
    (copy / "launches.jsonl").write_text(lines.replace("--config=own.py", "demo"))
    assert "The run began with" not in Page(report.page(copy)).text  # csc-jax demo names no config


def test_the_census_is_shown_where_there_is_one(copy):
    names = detail_lib.load(copy).class_names
    stored = {
        "data": "synthetic",
        "train": {
            "labeled_images": 16,
            "pixels": dict.fromkeys(names, 0) | {"sky": 750, "car": 250},
            "images": dict.fromkeys(names, 0) | {"sky": 12, "car": 3},
            "ignored_pixels": 9,
            "values": {},
        },
    }
    nothing = dict.fromkeys(names, 0)
    stored["val"] = {"labeled_images": 0, "pixels": nothing, "images": nothing}
    stored["val"] |= {"ignored_pixels": 0, "values": {}}
    page = Page(report.page(copy))  # as the training has left it
    assert "Labels: 16 of train, 6 of val." in page.text
    assert re.search(r"Largest images \(height x width\): \d+ x \d+ px in train", page.text)
    (copy / "data.json").unlink()
    assert "Labels: " not in Page(report.page(copy)).text
    (copy / "data.json").write_text(json.dumps(stored))
    page = Page(report.page(copy))
    assert "sky 75.00 12" in page.text
    assert "Labels: 16 of train. Shares" in page.text
    assert "Largest" not in page.text  # a version before has kept no sizes
    assert "0.89 % of the pixels of train are to be ignored" in page.text
    assert "No train label holds building, road, pavement, tree, pedestrian; 2 of 7" in page.text


def test_a_stored_config_without_the_field_still_gets_a_report(copy):
    path = copy / "config.json"
    values = json.loads(path.read_text())
    del values["train.report"]
    path.write_text(json.dumps(values))
    assert runs.read_run(copy).config["train.report"] is True
    assert config_lib.from_plain(values).train.report
