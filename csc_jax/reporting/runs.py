"""What a work directory says of its run, read back for people to look at.

A work directory may come from anywhere: what is not as this package writes it counts as absent.
"""

import dataclasses
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from csc_jax import config as config_lib
from csc_jax.data.census import Counts
from csc_jax.errors import UserError
from csc_jax.evaluation import detail as detail_lib
from csc_jax.reporting import compare
from csc_jax.reporting.launches import Launch, read_launches
from csc_jax.reporting.writers import read_metrics

RATE = "train/images_per_second"
_MOST = 1e300  # of a number that can be drawn
_MOST_BYTES = 64 * 2**20  # of a list of ids, or a census
_NOT_OURS = (ValueError, TypeError, AttributeError, RecursionError)  # of values read back

# What may differ between runs that stand in one row of a comparison: their seed and their labelled
# images, and what changes no result, or by rounding alone.
_PARTITION = ("data.labeled_fraction", "data.labeled_list", "data.unlabeled_list")
_NO_MATTER = (
    *("seed", *_PARTITION, "data.root", "data.cache_dir", "data.threads", "data.prefetch"),
    *("data.workers", "data.max_unreadable", "batch.eval", "train.log_every", "train.eval_every"),
    *("train.panels", "train.report", "train.consistency_lag", "train.max_rejected", "eval.panels"),
    *("model.remat", "checkpoint.", "parallel.", "debug.", "wandb"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
      workdir: of the run.
      config: flat, as JSON holds it, fields of older versions completed by their defaults.
      records: of `metrics.jsonl`, numbers alone.
      launches: see `launches.py`.
      detail: see `detail.py`; None where nothing was measured.
      splits: "labeled" and "unlabeled" -> ids, as far as they were kept.
      census: of each split, from `data.json`; {} where there is none.
      counted: names of the classes of the census.
      largest: (height, width) px of each split, each the largest of its images, as far as known.
    """

    workdir: Path
    config: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    launches: Sequence[Launch]
    detail: detail_lib.Detail | None
    splits: Mapping[str, tuple[str, ...]]
    census: Mapping[str, Counts]
    counted: tuple[str, ...]
    largest: Mapping[str, tuple[int, int]]

    @property
    def method(self) -> str:
        """Its name, with that of the module on top of it."""
        name, contrast = self.config["method.name"], self.config["method.contrast"]
        return f"{name}" if contrast == "none" else f"{name}+{contrast}"

    @property
    def partition(self) -> str:
        """Which images are labelled: a list's name, or their share."""
        listed = str(self.config["data.labeled_list"])
        return Path(listed).name if listed else str(self.config["data.labeled_fraction"])

    @property
    def seed(self) -> int:
        """Of the run."""
        return int(self.config["seed"])

    @property
    def step(self) -> int:
        """The last one of which there is a record; 0 without any."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def miou(self) -> float | None:
        """The last one that training found, in [0, 1], of the network that is evaluated."""
        return self.last(f"val/{self.config['eval.network']}_miou")

    @property
    def class_iou(self) -> dict[str, float | None]:
        """Class -> its last IoU in training, in [0, 1]."""
        prefix = f"val/{self.config['eval.network']}_iou/"
        names = dict.fromkeys(k for record in self.records for k in record if k.startswith(prefix))
        return {name.removeprefix(prefix): self.last(name) for name in names}

    @property
    def rate(self) -> float | None:
        """Median of labelled and unlabelled images a second, without the first record."""
        rates = [record[RATE] for record in self.records if RATE in record]
        return statistics.median(rates[1:] or rates) if rates else None

    @property
    def seconds(self) -> float | None:
        """Of all launches that came to tell; None if none did."""
        known = [launch.seconds for launch in self.launches if launch.seconds is not None]
        return math.fsum(known) if known else None

    def last(self, key: str) -> float | None:
        """Returns the last value of a metric; None if there is none."""
        return next((r[key] for r in reversed(self.records) if key in r), None)


def read_run(workdir: Path) -> Run:
    """Reads a work directory.

    Raises:
      UserError: it holds no run.
    """
    path = workdir / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError("it is no JSON object")
        default = config_lib.to_plain(config_lib.default_config())
        for name in default.keys() & stored.keys():
            if _kind(stored[name]) is not _kind(default[name]):
                raise ValueError(f"{name} is {stored[name]!r}")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Give the --workdir of a training run."
        ) from error
    counted, census, largest = _census(workdir / "data.json")
    try:
        records = [_numbers(record) for record in read_metrics(workdir)]
    except OSError:
        records = []
    return Run(
        workdir,
        default | stored,
        [record for record in records if "step" in record],
        read_launches(workdir),
        detail_lib.load(workdir),
        {name: _ids(workdir / "splits" / f"{name}.txt") for name in ("labeled", "unlabeled")},
        census,
        counted,
        largest,
    )


def rows(runs: Sequence[Run]) -> list[str]:
    """Returns the row of each run: runs that differ by seed or partition alone share one.

    It is named by the method, and where that is not enough by the fields that differ as well.
    """
    keys = [
        tuple((k, str(v)) for k, v in sorted(run.config.items()) if not k.startswith(_NO_MATTER))
        for run in runs
    ]
    names: dict[tuple[tuple[str, str], ...], str] = {}
    for run, key in zip(runs, keys, strict=True):
        if key in names:
            continue
        alike = [set(k) for k, r in zip(keys, runs, strict=True) if r.method == run.method]
        common = set.intersection(*alike)
        differing = [f"{name}={value}" for name, value in key if (name, value) not in common]
        shown = differing[:3] + ["…"] * (len(differing) > 3)
        name = f"{run.method} ({', '.join(shown)})" if shown else run.method
        taken = Counter(names.values())[name]
        names[key] = f"{name} #{taken + 1}" if taken else name
    return [names[key] for key in keys]


def scores_of(runs: Sequence[Run]) -> tuple[compare.Scores, int]:
    """Returns the mIoU of runs in percent, and how many repeat another's row, partition and seed.

    Runs without a score are left out.
    """
    scores: compare.Scores = {}
    repeated = 0
    for run, row in zip(runs, rows(runs), strict=True):
        if run.miou is None:
            continue
        key = (row, run.partition, run.seed)
        repeated += key in scores
        scores.setdefault(key, 100 * run.miou)
    return scores, repeated


def _kind(value: Any) -> type:
    """Returns the type of a field's value; numbers are of one."""
    return float if type(value) is int else type(value)


def _numbers(record: Any) -> dict[str, Any]:
    """Returns the finite numbers of a record; {} if it is none."""
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return {}
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST
    }


_Census = tuple[tuple[str, ...], dict[str, Counts], dict[str, tuple[int, int]]]


def _census(path: Path) -> _Census:
    """Returns what `census.as_json` keeps: names of the classes, counts and largest image by split.

    The runs of older versions have no largest image.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            return (), {}, {}
        stored = json.loads(path.read_text(encoding="utf-8"))
        splits = {str(split): c for split, c in stored.items() if isinstance(c, dict)}
        names = tuple(next(iter(splits.values()))["pixels"])
        counted = {
            split: Counts(
                labeled=_count(counts["labeled_images"]),
                pixels=tuple(_count(counts["pixels"][name]) for name in names),
                images=tuple(_count(counts["images"][name]) for name in names),
                ignored=_count(counts["ignored_pixels"]),
                values={int(value): _count(count) for value, count in counts["values"].items()},
            )
            for split, counts in splits.items()
        }
        largest = {}
        for split, counts in splits.items():
            if "largest_image" in counts:
                height, width = map(_count, counts["largest_image"])
                largest[split] = height, width
        return names, counted, largest
    except (OSError, LookupError, ArithmeticError, StopIteration, *_NOT_OURS):
        return (), {}, {}


def _count(value: Any) -> int:
    if int(value) < 0:
        raise ValueError(f"{value} is no count")
    return int(value)


def _ids(path: Path) -> tuple[str, ...]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            return ()
        return tuple(path.read_text(encoding="utf-8", errors="replace").splitlines())
    except OSError:
        return ()
