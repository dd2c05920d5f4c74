"""A work directory with the files that a report reads, made up without training."""

import json
from pathlib import Path

import cv2
import numpy as np

from csc_jax import config as config_lib
from csc_jax.data import codec
from csc_jax.evaluation.boundary import BoundaryIoU
from csc_jax.evaluation.calibration import BINS, Calibration
from csc_jax.evaluation.detail import Detail, Example, save
from csc_jax.evaluation.metrics import Scores
from csc_jax.reporting import visualize, writers


def made_up_run(workdir: Path, names: tuple[str, ...], seed: int = 0, **fields: object) -> Path:
    """Writes all that a report has a section for; `fields` have "__" for each dot."""
    rng = np.random.default_rng(seed)
    config = config_lib.default_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    config.seed, config.train.steps = seed, 400
    (workdir / "splits").mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config_lib.to_plain(config)))
    for name, count in (("labeled", 12 * (1 + seed % 2)), ("unlabeled", 90)):
        lines = "".join(f"{name}_{i}\n" for i in range(count))
        (workdir / "splits" / f"{name}.txt").write_text(lines)
    records = []
    for step in range(10, 401, 10):
        decay = np.exp(-step / 150) + 0.03 * rng.random()
        values = {"loss": 3 * decay, "loss_s": decay, "loss_u": decay / 2, "loss_c": 1.5 * decay}
        values |= {"kept_fraction": 1 - decay, "learning_rate": 1e-3 * (1 - step / 400) ** 0.9}
        values |= {"ready": 1.0, "separation": 20 + 30 * decay, "consistency": 1 - decay / 2}
        values |= {"bank_fill": min(1, step / 100), "enqueue_accepted": rng.random()}
        values |= {"consistency_accepted": rng.random(), "images_per_second": 40 + rng.random()}
        records.append({"step": step} | {f"train/{k}": float(v) for k, v in values.items()})
        if step % 100 == 0:
            iou = dict.fromkeys((f"val/teacher_iou/{name}" for name in names), 0.6 - decay / 2)
            records.append({"step": step, "val/teacher_miou": 0.6 - decay / 2} | iou)
    writers.metrics_path(workdir).write_text("".join(json.dumps(r) + "\n" for r in records))
    counts = {"pixels": dict(zip(names, map(int, rng.integers(0, 9999, len(names))), strict=True))}
    counts |= {"images": {name: i for i, name in enumerate(names)}, "ignored_pixels": 7}
    census = {
        split: counts | {"labeled_images": 12, "values": {}, "largest_image": [48, 64]}
        for split in ("train", "val")
    }
    (workdir / "data.json").write_text(json.dumps({"data": "folder"} | census))
    versions = {"csc_jax": "0.2.0", "jax": "0.10.2", "Python": "3.11.7"}
    command = ["--config=folder", f"--workdir={workdir}", "--config.train.steps=400"]
    launch = {"launch": "1", "begin": "2026-01-01T00:00:00+00:00", "command": command}
    launch |= {"versions": versions, "devices": "1 x cpu", "processes": 1}
    lines = [json.dumps(launch), json.dumps({"launch": "1", "seconds": 3725.0})]
    (workdir / "launches.jsonl").write_text("\n".join(lines))

    num_classes = len(names)
    palette = rng.integers(0, 256, (num_classes, 3)).astype(np.uint8)
    confusion = rng.integers(0, 300, (num_classes,) * 2)
    np.fill_diagonal(confusion, 2000)
    image = cv2.resize(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8), (320, 240))
    label = cv2.resize(rng.integers(0, num_classes, (6, 8)).astype(np.uint8), (320, 240), None, 0)
    picture = codec.encode_png(visualize.four((image, label, label, label), palette))
    visualize.save_panel(
        *(workdir / "plots" / "panel_000400.png", {"image": [image], "ground truth": [label]}),
        *(palette, ["class"] * num_classes, "made up"),
    )
    inside = rng.integers(100, 1000, BINS).astype(float)
    middle = (np.arange(BINS) + 0.5) / BINS
    boundary = np.arange(num_classes) + 3
    ids = [f"street/{i:03d}.jpg" for i in range(9)]
    mious = dict(zip(ids, rng.random(9).tolist(), strict=True))
    examples = tuple(
        Example(kind, name, mious[name], picture) for kind in ("worst", "best") for name in ids[:4]
    )
    fields = {k: v for k, v in config_lib.to_plain(config).items() if k.startswith("eval.")}
    calibration = Calibration(inside, inside * middle, np.round(inside * middle**1.3))
    save(
        Detail(
            *(400, fields, names, palette, Scores(confusion, mious)),
            *(BoundaryIoU(boundary, 2 * boundary + 1), calibration, examples),
        ),
        workdir,
    )
    return workdir
