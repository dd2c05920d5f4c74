"""`benchmark.py data`: images/s of each stage of the host pipeline, and of the whole."""

import argparse
import itertools
import logging
import math
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from csc_jax import data
from csc_jax.config import default_config
from csc_jax.data import codec, pipeline, synthetic, transforms

GOAL = 25 / 16  # images/s a CPU, of 1024x2048 PNGs
SHARE = 0.8  # of the decode-only rate, that the whole pipeline is to reach
_SIZE = (1024, 2048)  # (height, width) px of the made-up images
_LIST = 1000  # images in each list at least; Grain takes ms to shuffle one of a few
_TURNS = 5


def run() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="benchmark.py data", description=__doc__)
    parser.add_argument("--config", type=Path, help="instead of made-up images; needs --root")
    parser.add_argument("--root", default="", help="data.root of the config")
    parser.add_argument("--images", type=int, default=4, help="different made-up ones")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each stage")
    parser.add_argument("--threads", type=int, default=0, help="data.threads")
    parser.add_argument("--workers", type=int, default=0, help="data.workers")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        if options.config:
            config = runpy.run_path(str(options.config))["get_config"]()
            config.data.root = options.root
        else:
            config = _made_up(Path(folder), options.images)
        config.data.update({"threads": options.threads, "workers": options.workers})
        _measure(config, options.seconds)


def _made_up(folder: Path, images: int) -> ConfigDict:
    """Writes street scenes as PNG pairs and returns a config of the paper's recipe on them."""
    for split, count in (("train", images), ("val", 1)):
        for index in range(count):
            image, label, _ = synthetic.Scene(0, split, index, _SIZE).read()
            for kind, pixels in (("images", image), ("labels", label)):
                path = folder / kind / split / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(codec.encode_png(pixels))
    (folder / "classes.txt").write_text("\n".join(synthetic.CLASS_NAMES))
    config = default_config()
    config.data.update({"name": "folder", "root": str(folder), "cache_dir": str(folder / "cache")})
    config.data.update({"labeled_fraction": "1/2", "crop_size": (640, 640)})
    config.batch.update({"labeled": 2, "unlabeled": 2})
    return config


def _measure(config: ConfigDict, seconds: float) -> None:
    dataset = data.load(config.data)
    lists = data.partition(config.data, dataset, config.seed)
    lists = data.Partition(*(ids * math.ceil(_LIST / len(ids)) for ids in lists))
    source = dataset.sources["train"]
    options, cpus = pipeline.read_options(config.data), data.cpu_count()
    threads = options.num_threads
    records = [source.records[i] for i in range(min(len(source), 16))]
    height, width = source.max_size
    megabytes = np.mean([len(r["image"]) + len(r["label"]) for r in records]) / 1e6
    print(
        f"{dataset.name}, {len(source)} images of up to {height}x{width} px, {megabytes:.1f} MB "
        f"each; {cpus} CPUs, {threads} threads, {config.data.workers} workers"
    )
    meters: dict[str, Callable[[float], float]] = {
        name: partial(_stage_rate, work, items, threads)
        for name, (work, items) in _stages(config.data, source, records).items()
    }
    meters["whole pipeline"] = partial(
        _iterator_rate,
        data.train_iterator(config, dataset, lists),
        config.batch.labeled + config.batch.unlabeled,
        options.prefetch_buffer_size + threads,
    )
    # They take turns, so that a machine which slows down slows all of them down.
    samples: dict[str, list[float]] = {name: [] for name in meters}
    for turn in range(_TURNS + 1):
        for name, meter in meters.items():
            rate = meter(seconds / _TURNS)
            if turn:  # the first one warms up
                samples[name].append(rate)
    rates = {name: statistics.median(values) for name, values in samples.items()}
    for name, rate in rates.items():
        print(f"{name:<15} {rate:>9.1f} images/s  {1e3 * threads / rate:>8.1f} ms a thread")
    whole = rates.pop("whole pipeline")
    slowest = min(rates, key=lambda name: rates[name])
    print(
        f"Bottleneck: {slowest}. The whole pipeline reaches {whole / rates['decode']:.0%} of the "
        f"decode-only rate (goal: {SHARE:.0%})."
    )
    if source.max_size == _SIZE:
        print(f"Goal on {cpus} CPUs: {GOAL * cpus:.1f} images/s (25 on 16); reached: {whole:.1f}.")


_Stage = tuple[Callable[..., object], Sequence[Any]]  # work(item, rng), items


def _stages(
    config: ConfigDict, source: data.Source, records: Sequence[dict[str, bytes]]
) -> dict[str, _Stage]:
    augment = pipeline.weak_augmentation(config)
    elements = [source[i] for i in range(min(len(records), 8))]
    rng = np.random.default_rng(0)
    pairs = [(element["image"], element["label"]) for element in elements]
    crop = (augment.scale_range, augment.crop_size, augment.fill)
    crops = [transforms.random_resized_crop(*pair, rng, *crop) for pair in pairs]

    def decode(record: dict[str, bytes], _: np.random.Generator) -> None:
        codec.decode_image(record["image"])
        codec.decode_label(record["label"])

    return {
        "read": (lambda index, _: source.records[index], range(len(records))),
        "decode": (decode, records),
        # One stage, as only the window is resized.
        "resize, crop": (lambda p, rng: transforms.random_resized_crop(*p, rng, *crop), pairs),
        "flip": (transforms.random_flip, crops),
    }


def _stage_rate(work: Callable[..., object], items: Sequence[Any], threads: int, s: float) -> float:
    """Images/s of `threads` threads at once, in `s` seconds."""
    begun = time.perf_counter()

    def repeat(thread: int) -> int:
        rng = np.random.default_rng(thread)
        for done in itertools.count():
            if time.perf_counter() >= begun + s:
                return done
            work(items[(thread + done) % len(items)], rng)
        raise AssertionError

    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(repeat, range(threads)))
    return done / (time.perf_counter() - begun)


def _iterator_rate(iterator: Iterator[Any], images: int, buffered: int, s: float) -> float:
    """Images/s of an iterator whose batches have `images`, in `s` seconds."""
    for _ in range(buffered):  # made ahead
        next(iterator)
    begun = time.perf_counter()
    done = 0
    while (elapsed := time.perf_counter() - begun) < s:
        next(iterator)
        done += images
    time.sleep(buffered * images * elapsed / max(done, 1))  # it fills its buffer before others run
    return done / elapsed
