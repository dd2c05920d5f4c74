"""`report.html`: what became of a run, in one file that opens anywhere.

`--mode=report` writes it, and every training at its end. Names of classes, files and fields are
users': the page escapes all of them, and shows what a browser would obey or hide.
"""

import base64
import datetime
import hashlib
import itertools
import logging
import math
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import csc_jax
from csc_jax import config as config_lib
from csc_jax import data, text
from csc_jax.data import census, codec
from csc_jax.errors import UserError
from csc_jax.evaluation import detail as detail_lib
from csc_jax.evaluation.calibration import BINS
from csc_jax.evaluation.detail import Detail
from csc_jax.parallel import distributed
from csc_jax.reporting import charts, compare, runs
from csc_jax.reporting.runs import Run
from csc_jax.reporting.writers import bank_was_ready
from csc_jax.state import Network
from csc_jax.training import early_stopping
from csc_jax.training.checkpoint import Checkpointer
from csc_jax.training.experiment import Experiment
from csc_jax.training.interrupt import EvaluationStopped

log = logging.getLogger("csc_jax")

FILE = "report.html"
_BANK = ("Separ", "Cons", "Memory bank", "Bank updates")  # how titles of its charts begin
_MOST_CLASSES = 60  # whose names and numbers stand on the picture of the confusion matrix
_MOST_IMAGES = 1000  # in the table of images
_MOST_PANELS = 2
_MOST_PIXELS = 40_000_000  # of a panel
_PNG = b"\x89PNG\r\n\x1a\n"


def report(config: ConfigDict, workdir: Path, checkpoint: str, others: Sequence[Path] = ()) -> Path:
    """Writes `workdir`/report.html, and returns its path.

    What the run's files do not hold is measured on `config.eval.split`, unless an earlier report
    has measured it for this checkpoint. If checkpoint or data are gone, the report says so and goes
    without.

    Args:
      config: of the run; `config.eval` says what is measured, and how.
      workdir: of the run.
      checkpoint: latest | best | a step.
      others: work directories of runs to compare it with.

    Raises:
      UserError: a work directory that holds no run, or `workdir` cannot be written to.
    """
    for folder in (workdir, *others):
        runs.read_run(folder)  # before anything is measured
    detail, note = None, ""
    try:
        detail = _measured(config, workdir, checkpoint)
    except UserError as error:
        note = f"Nothing was measured anew, as the network or its data are not there: {error}"
        log.warning("%s", note)
    path = workdir / FILE
    try:
        if detail is not None:
            detail_lib.save(detail, workdir)
        size = _write(page(workdir, others, [note] if note else []), path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}. Grant or free space there, or copy the "
            "run and give the copy as --workdir."
        ) from error
    log.info("written to %s (%.1f MB)", path, size / 1e6)
    return path


def after_training(
    experiment: Experiment,
    network: Network,
    step: int,
    source: data.Source,
    workdir: Path,
    before_batch: Callable[[], None],
) -> None:
    """Measures and writes the report of a training that ends; never a reason for it to fail.

    All of several processes call it, and the first alone writes.

    Args:
      experiment: of the run.
      network: what is evaluated.
      step: of the network.
      source: the split that is evaluated.
      workdir: of the run.
      before_batch: as in `Experiment.evaluate`.
    """
    path = workdir / FILE
    try:
        detail = detail_lib.measure(experiment, network, step, source, before_batch)
        if distributed.is_first():
            detail_lib.save(detail, workdir)
            _write(page(workdir), path)
            log.info("report: %s", path)
    except EvaluationStopped:
        log.info("stopped before the report; csc-jax report writes it")
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        log.warning("%s was not written (%s); the run itself is whole", path, reason)


def page(workdir: Path, others: Sequence[Path] = (), notes: Sequence[str] = ()) -> str:
    """Returns the HTML of a report from files alone.

    Args:
      workdir: of the run.
      others: work directories of runs to compare it with.
      notes: shown at the top.

    Raises:
      UserError: a work directory that holds no run.
    """
    run = runs.read_run(workdir)
    all_curves = charts.curves(run.records) if run.records else {}
    bank = {title: svg for title, svg in all_curves.items() if title.startswith(_BANK)}
    config = run.config
    values = {
        "title": f"{run.method} on {config['data.name']}",
        "run": run,
        "generated": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": csc_jax.__version__,
        "notes": [*notes, *_warnings(run)],
        "tiles": _tiles(run),
        "classes": _classes(run.detail),
        "means": _means(run.detail),
        "census": _census(run),
        "splits": _splits(run),
        "fields": _fields(run),
        "curves": {title: svg for title, svg in all_curves.items() if title not in bank},
        "confusion": run.detail and _confusion(run.detail),
        "calibration": run.detail and _calibration(run.detail),
        "examples": run.detail and _examples(run.detail),
        "images": run.detail and _images(run.detail),
        "panels": _panels(workdir),
        "bank": {"charts": bank, "facts": _bank_facts(run)} if bank else None,
        "time": _time(run),
        "reproduce": _reproduce(run),
        "comparison": _comparison([run, *map(runs.read_run, others)]) if others else None,
    }
    return _render(values)


def _measured(config: ConfigDict, workdir: Path, checkpoint: str) -> Detail:
    """Returns what is known of a checkpoint, measuring it if need be; UserError if it cannot be."""
    with Checkpointer(workdir, read_only=True) as checkpointer:
        checkpointer.describe(checkpoint)  # which explains what is missing
        step = checkpointer.latest_step(checkpoint)
    known = detail_lib.load(workdir)
    resolved = config_lib.resolve(config, steps_per_epoch=1)
    if (
        known is not None
        and known.step == step
        and known.fields == detail_lib.scored_fields(resolved)
    ):
        return known
    from csc_jax.evaluation.score import load  # which knows this package

    dataset = data.load(config.data)
    source = dataset.source(config.eval.split)
    experiment, network, step = load(config, workdir, checkpoint)
    if dataset.class_names != tuple(experiment.class_names):
        raise UserError(
            f"The checkpoint in {workdir} and the data set {dataset.name} have other classes. Give "
            "the data that it was trained for (--config.data.name, --config.data.root)."
        )
    return detail_lib.measure(experiment, network, step, source)


def _write(html: str, path: Path) -> int:
    """Writes the file in one go and returns its size, bytes."""
    encoded = html.encode("utf-8", errors="backslashreplace")
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(encoded)
    unfinished.replace(path)
    return len(encoded)


def _render(values: Mapping[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("csc_jax.reporting", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters.update(percent=_percent, number=_number, duration=_duration)
    template = environment.get_template("report.html")
    # The browser runs this script alone: whatever a name may hold, it is no program.
    script = environment.get_template("report.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.render(values, script=script, script_hash=f"sha256-{digest}")


def _shown(value: Any) -> Any:
    """What the page shows of a value: control characters and marks of direction as escapes."""
    if value is None:
        return "–"
    return text.name(value) if type(value) is str else value  # markup of ours stays


def _percent(ratio: float | None, digits: int = 1) -> str:
    return "–" if ratio is None or math.isnan(ratio) else f"{100 * ratio:.{digits}f}"


def _number(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} h"


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The numbers at the top: name, value, remark."""
    detail, tiles = run.detail, []
    if detail is not None:
        note = f", {detail.scores.note}" if detail.scores.note else ""
        where = f"{run.config['eval.network']} at step {detail.step} on "
        where += f"{detail.fields.get('eval.split')}{note}"
        tiles.append(("mIoU", f"{_percent(detail.scores.miou)} %", where))
        tiles.append(("boundary IoU", f"{_percent(detail.boundary.mean)} %", "mean over classes"))
        if detail.calibration is not None:
            remark = "calibration error, 0 is best"
            tiles.append(("ECE", f"{_percent(detail.calibration.ece)} %", remark))
    elif run.miou is not None:
        tiles.append(("mIoU", f"{_percent(run.miou)} %", "the last one of training"))
    labeled, unlabeled = (len(run.splits[name]) for name in ("labeled", "unlabeled"))
    if labeled:
        tiles.append(("labelled images", f"{labeled}", f"and {unlabeled} unlabelled"))
    tiles.append(("steps", f"{run.step:,}", f"of {run.config['train.steps']:,}"))
    if run.seconds is not None:
        tiles.append(("time", _duration(run.seconds), run.launches[-1].devices))
    return tiles


def _classes(detail: Detail | None) -> list[dict[str, Any]]:
    """A row of the tables of classes each; ratios in [0, 1], nan where there is none."""
    if detail is None:
        return []
    scores, pixels = detail.scores, detail.scores.confusion.sum()
    measures = {
        "share": scores.confusion.sum(axis=1) / max(pixels, 1),
        "iou": scores.iou,
        "precision": scores.precision,
        "recall": scores.recall,
        "f1": scores.f1,
        "boundary": detail.boundary.iou,
    }
    return [
        {"id": i, "name": name, "color": "#{:02x}{:02x}{:02x}".format(*detail.palette[i])}
        | {key: float(values[i]) for key, values in measures.items()}
        for i, name in enumerate(detail.class_names)
    ]


def _means(detail: Detail | None) -> list[float]:
    """Precision, recall, F1 and boundary IoU, the mean over the classes that have one."""
    if detail is None:
        return []
    of_classes = (detail.scores.precision, detail.scores.recall, detail.scores.f1)
    known = [values[~np.isnan(values)] for values in (*of_classes, detail.boundary.iou)]
    return [float(values.mean()) if values.size else math.nan for values in known]


def _census(run: Run) -> dict[str, Any] | None:
    """What the labels of each split hold, class by class; None where nobody counted."""
    splits = {split: counts for split, counts in run.census.items() if any(counts.pixels)}
    if not splits:
        return None
    scored = {row["name"]: row for row in _classes(run.detail)}
    rows = [
        {
            "name": name,
            "color": scored[name]["color"] if name in scored else None,
            "scored": scored[name]["share"] if name in scored else None,
            "splits": [(c.pixels[i] / sum(c.pixels), c.images[i]) for c in splits.values()],
        }
        for i, name in enumerate(run.counted)
    ]
    sizes = [f"{h} x {w} px in {split}" for split, (h, w) in run.largest.items()]
    return {"splits": splits, "rows": rows, "largest": ", ".join(sizes)}


def _warnings(run: Run) -> list[str]:
    """What a user should know of the data and of the run."""
    lines = []
    if {"train", "val"} <= run.census.keys():
        lines += census.warnings(run.census, run.counted, str(run.config["data.name"]))
    if run.detail is not None and run.detail.step < run.step:
        lines.append(f"Measured at step {run.detail.step}; the run went on to {run.step}.")
    key = f"val/{run.config['eval.network']}_miou"
    history = [(r["step"], r[key]) for r in run.records if key in r]
    patience = run.config["train.patience"]
    if run.step < run.config["train.steps"] and early_stopping.has_ended(history, patience):
        step, miou = early_stopping.best(history)
        lines.append(
            f"Training ended early, at step {run.step} of {run.config['train.steps']}: in "
            f"{patience} evaluations the val mIoU has not risen above the {_percent(miou, 2)} % of "
            f"step {step} (train.patience)."
        )
    elif run.step < run.config["train.steps"]:
        lines.append(f"The run has come to step {run.step} of {run.config['train.steps']}.")
    if rejected := sum(r.get("train/rejected", 0) > 0 for r in run.records):
        lines.append(f"{rejected} records hold steps without a finite loss, which were left out.")
    return lines


def _splits(run: Run) -> list[tuple[str, int, str]]:
    """Name, images, and a remark of each split."""
    how = f"data.labeled_list {run.config['data.labeled_list']}"
    if not run.config["data.labeled_list"]:
        how = f"{run.config['data.labeled_fraction']} of those with a label, by seed {run.seed}"
    found = []
    if run.splits["labeled"]:
        found.append(("train, labelled", len(run.splits["labeled"]), how))
        found.append(("train, unlabelled", len(run.splits["unlabeled"]), ""))
    if run.detail is not None:
        name = f"{run.detail.fields.get('eval.split')}"
        found.append((name, len(run.detail.scores.per_image), "measured here"))
    return found


def _fields(run: Run) -> dict[str, Any]:
    """The fields that differ from their defaults, and who set them."""
    default = config_lib.to_plain(config_lib.default_config())
    launch = next((launch for launch in run.launches if launch.command is not None), None)
    overrides = launch.overrides if launch is not None else {}
    rows = []
    for name, value in run.config.items():
        if value == default.get(name) and name not in overrides:
            continue
        origin = "command line" if name in overrides else "config"
        rows.append((name, _typed(default.get(name)), _typed(value), origin))
    return {
        "rows": rows,
        "file": launch.config if launch is not None else "",
        "known": launch is not None and launch.config != "",
        "overrides": sum(row[3] == "command line" for row in rows),
    }


def _typed(value: Any) -> str:
    """A value as the command line takes it."""
    return ",".join(map(str, value)) or "()" if isinstance(value, list) else str(value)


def _confusion(detail: Detail) -> dict[str, Any]:
    """Cells of the picture, in units of a cell's side, and the pairs that are confused most."""
    matrix, names = detail.scores.confusion, detail.class_names
    truth = matrix.sum(axis=1)
    ratios = matrix / np.maximum(truth, 1)[:, None]
    few = len(names) <= _MOST_CLASSES
    cells = [
        {
            "x": int(column),
            "y": int(row),
            "ratio": float(ratios[row, column]),
            "title": f"{names[row]} taken for {names[column]}" if few else "",
        }
        for row, column in np.argwhere(ratios > (0 if few else 0.005))
    ]
    wrong = matrix * (1 - np.eye(len(names), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:10]
    pairs = [
        (names[i // len(names)], names[i % len(names)], int(wrong.flat[i]), float(ratios.flat[i]))
        for i in order
        if wrong.flat[i]
    ]
    return {"names": names, "few": few, "cells": cells, "pairs": pairs}


def _calibration(detail: Detail) -> dict[str, Any] | None:
    found = detail.calibration
    if found is None:
        return None
    accuracy = found.accuracy
    rows = [
        (
            *(m / BINS, (m + 1) / BINS, int(found.count[m])),
            *(float(found.confidence[m] / found.count[m]), float(accuracy[m])),
        )
        for m in range(BINS)
        if found.count[m]
    ]
    return {"chart": charts.reliability(found), "ece": found.ece, "rows": rows}


def _examples(detail: Detail) -> list[dict[str, Any]]:
    return [
        {"kind": kind, "name": e.name, "miou": e.miou, "uri": uri}
        for kind in ("worst", "best")
        for e in detail.examples
        if e.kind == kind and (uri := _uri(e.picture))
    ]


def _images(detail: Detail) -> dict[str, Any]:
    order = sorted(detail.scores.per_image.items(), key=lambda item: (math.isnan(item[1]), item[1]))
    return {"rows": order[:_MOST_IMAGES], "count": len(order)}


def _panels(workdir: Path) -> list[tuple[str, str]]:
    """Name and picture of the first and the last panel that the run drew."""
    paths = sorted((workdir / "plots").glob("panel_*.png"))
    chosen = paths if len(paths) <= _MOST_PANELS else [paths[0], paths[-1]]
    found = []
    for path in chosen:
        try:
            uri = _uri(path.read_bytes())
        except OSError:
            continue
        if uri:
            found.append((path.stem, uri))
    return found[::-1]


def _uri(encoded: bytes) -> str:
    """Returns a PNG or JPEG that can be decoded, and is not huge, as a data URI; else ""."""
    if encoded.startswith(_PNG):
        kind = "png"
        sides = int.from_bytes(encoded[16:20]), int.from_bytes(encoded[20:24])
        if math.prod(sides) > _MOST_PIXELS:
            return ""
    elif encoded.startswith(b"\xff\xd8\xff") and len(encoded) < _MOST_PIXELS:
        kind = "jpeg"
    else:
        return ""
    if codec.decode_image(encoded) is None:
        return ""
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode('ascii')}"


def _bank_facts(run: Run) -> list[tuple[str, str]]:
    """What the curves of the bank come to."""
    ready = [r for r in run.records if "train/loss" in r and bank_was_ready(r)]
    facts = []
    if any("train/ready" in r for r in run.records):
        first = next((r["step"] for r in ready if "train/ready" in r), None)
        when = "not yet" if first is None else f"by step {first}"
        facts.append(("every class in the bank", when))
    for key, name in (("separation", "Separ (Eq. 9), lower is better"), ("bank_fill", "filled")):
        values = [r[f"train/{key}"] for r in ready if f"train/{key}" in r]
        if values and key == "separation":
            facts.append((name, f"{values[0]:.4g} first, {values[-1]:.4g} last"))
        elif values:
            facts.append((name, f"{_percent(values[-1])} %"))
    cons = [r["train/consistency"] for r in run.records if "train/consistency" in r]
    if cons:
        facts.append(("Cons (Eq. 7), higher is better", f"{cons[-1]:.4g} last"))
    for key, name in (("consistency", "consistency steps"), ("enqueue", "enqueues")):
        passed = [r[f"train/{key}_accepted"] for r in ready if f"train/{key}_accepted" in r]
        if passed:
            share = _percent(statistics.fmean(passed))
            facts.append((f"{name} that passed the gate", f"{share} % of steps"))
    return facts


def _time(run: Run) -> list[tuple[str, str]]:
    facts = []
    if run.rate is not None:
        images = run.config["batch.labeled"] + run.config["batch.unlabeled"]
        facts.append(("images a second, labelled and unlabelled", f"{run.rate:.4g}"))
        facts.append(("steps a second", f"{run.rate / images:.4g}"))
    for index, launch in enumerate(run.launches, 1):
        processes = f", {launch.processes} processes" if launch.processes > 1 else ""
        took = "end not recorded" if launch.seconds is None else _duration(launch.seconds)
        what = f"launch {index}, {launch.begin}"
        facts.append((what, f"{took}, {launch.devices}{processes}"))
    if len(run.launches) > 1 and run.seconds is not None:
        facts.append(("all launches that recorded their end", _duration(run.seconds)))
    return facts


def _reproduce(run: Run) -> dict[str, Any]:
    lines = [launch.line for launch in run.launches if launch.line]
    stored = f"{Path(config_lib.__file__).parents[1] / 'stored_config.py'}:{run.workdir}"
    again = shlex.join(["csc-jax", f"--config={stored}", "--workdir=NEW"])
    versions = run.launches[-1].versions if run.launches else {}
    return {"commands": list(dict.fromkeys(lines)), "again": again, "versions": versions}


def _comparison(found: Sequence[Run]) -> dict[str, Any]:
    """Several runs, of which the first is the one whose report this is."""
    names, labels = _short_names(found), runs.rows(found)
    scores, repeated = runs.scores_of(found)
    partitions = list(dict.fromkeys(partition for _, partition, _ in scores))
    summary = []
    for row, partition in itertools.product(dict.fromkeys(labels), partitions):
        values = [v for (r, p, _), v in scores.items() if (r, p) == (row, partition)]
        if values:
            deviation = statistics.stdev(values) if len(values) > 1 else None
            summary.append((row, partition, len(values), statistics.mean(values), deviation))
    differences = compare.differences(scores, labels[0], list(dict.fromkeys(labels)))
    fields = [
        (name, [_typed(run.config.get(name)) for run in found])
        for name in found[0].config
        if len({_typed(run.config.get(name)) for run in found}) > 1
    ]
    classes = dict.fromkeys(name for run in found for name in run.class_iou)
    key = "val/{}_miou"
    curves = []
    for run in found:
        name = key.format(run.config["eval.network"])
        points = [(r["step"], 100 * r[name]) for r in run.records if name in r]
        curves.append(([step for step, _ in points], [miou for _, miou in points]))
    return {
        "runs": list(zip(names, labels, found, strict=True)),
        "names": names,
        "baseline": labels[0],
        "summary": summary,
        "differences": differences,
        "caution": compare.caution(differences),
        "repeated": repeated,
        "fields": fields,
        "classes": [(name, [run.class_iou.get(name) for run in found]) for name in classes],
        "curves": charts.lines(curves, "mIoU of the runs", "step", "mIoU %"),
        "efficiency": _label_efficiency(found, labels),
        "lines": charts.LINES,
    }


def _label_efficiency(found: Sequence[Run], labels: Sequence[str]) -> dict[str, Any] | None:
    """mIoU over the number of labelled images; None unless a row has several such numbers."""
    by_row: dict[str, dict[int, list[float]]] = {}
    for run, row in zip(found, labels, strict=True):
        if run.miou is not None and run.splits["labeled"]:
            points = by_row.setdefault(row, {})
            points.setdefault(len(run.splits["labeled"]), []).append(100 * run.miou)
    if all(len(points) < 2 for points in by_row.values()):
        return None
    series = []
    for points in by_row.values():
        images = sorted(points)
        spread = [statistics.stdev(points[n]) if len(points[n]) > 1 else 0.0 for n in images]
        series.append((images, [statistics.mean(points[n]) for n in images], spread))
    return {"chart": charts.label_efficiency(series), "rows": list(by_row)}


def _short_names(found: Sequence[Run]) -> list[str]:
    """The last part of each work directory's path, or as many as tell them apart."""
    paths = [run.workdir.absolute().parts for run in found]
    for count in range(1, max(map(len, paths))):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return ["/".join(parts) for parts in paths]
