"""Which train images are labelled: drawn by seed, or as published lists say."""

import fractions
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from ml_collections import ConfigDict

from csc_jax import text
from csc_jax.data import list_file
from csc_jax.data.source import Dataset, Source
from csc_jax.errors import UserError

_LONGEST = 200  # characters of a line that an error shows


class Partition(NamedTuple):
    """Ids of the train split, labelled and unlabelled."""

    labeled: tuple[str, ...]  # images whose labels are trained on
    unlabeled: tuple[str, ...]  # images whose labels, if they have any, are not used


def partition(config: ConfigDict, dataset: Dataset, seed: int) -> Partition:
    """Splits the train ids.

    Args:
      config: the `data` part of the configuration. `labeled_list` (one image a line, as `list_file`
        reads it) decides where it is given, else `labeled_fraction` of the images that have a label
        is drawn from `seed`.

    Raises:
      UserError: for a list with an unknown or repeated id or one of another split, lists that
        overlap, an image without label on the labelled list, a fraction outside (0, 1], or a
        partition that leaves nothing unlabelled.
    """
    source = dataset.sources["train"]
    if config.labeled_list:
        return _from_lists(config, dataset)
    if config.unlabeled_list:
        raise UserError(
            f"data.unlabeled_list is {config.unlabeled_list!r} but data.labeled_list is empty; "
            "give both lists, or the labelled one alone."
        )
    return _draw(_fraction(config.labeled_fraction), source, seed)


def write_partition(lists: Partition, workdir: Path) -> None:
    """Writes splits/labeled.txt and splits/unlabeled.txt, one id a line, into `workdir`.

    Raises:
      UserError: they cannot be written.
    """
    folder = Path(workdir) / "splits"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, ids in lists._asdict().items():
            (folder / f"{name}.txt").write_text("".join(f"{i}\n" for i in ids), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error}. Make room or choose another --workdir."
        ) from error


def _draw(fraction: fractions.Fraction, source: Source, seed: int) -> Partition:
    able = [name for name in source.ids if name not in source.without_label]
    # Rounded up: gives the published counts of both benchmarks (decisions.md#partitions).
    count = math.ceil(len(able) * fraction)
    order = np.random.default_rng(seed).permutation(len(able))
    chosen = {able[i] for i in order[:count]}
    labeled = tuple(name for name in source.ids if name in chosen)
    unlabeled = tuple(name for name in source.ids if name not in chosen)
    if unlabeled:
        return Partition(labeled, unlabeled)
    if fraction == 1:
        # Full supervision: the second stream still needs images, and takes them all.
        return Partition(source.ids, source.ids)
    raise UserError(
        f"data.labeled_fraction = {fraction} of {len(able)} train images leaves none "
        "unlabelled; use a smaller fraction or more images."
    )


def _fraction(text: str) -> fractions.Fraction:
    try:
        # An exponent of nine digits would take the memory of that many.
        value = fractions.Fraction(text if not re.search(r"e\W?\d{4}", text, re.I) else "")
    except (ValueError, ZeroDivisionError):
        value = fractions.Fraction(0)
    if not 0 < value <= 1:
        raise UserError(
            f"data.labeled_fraction is {text!r}; it must be a share of the train split above 0 "
            "and at most 1, such as 1/8."
        )
    return value


def _from_lists(config: ConfigDict, dataset: Dataset) -> Partition:
    source = dataset.sources["train"]
    labeled = _read_list("data.labeled_list", config.labeled_list, dataset)
    taken = set(labeled)
    bare = taken & source.without_label
    if bare:
        raise UserError(
            f"data.labeled_list {config.labeled_list} names {_some(bare)}, which the data set has "
            "no label for; an image of that kind can only be unlabelled."
        )
    if config.unlabeled_list:
        unlabeled = _read_list("data.unlabeled_list", config.unlabeled_list, dataset)
        overlap = taken.intersection(unlabeled)
        if overlap:
            raise UserError(
                f"data.labeled_list {config.labeled_list} and data.unlabeled_list "
                f"{config.unlabeled_list} share {_some(overlap)}; an image may be in one of them."
            )
    else:
        unlabeled = tuple(name for name in source.ids if name not in taken)
        if not unlabeled:
            raise UserError(
                f"data.labeled_list {config.labeled_list} names every train image and leaves none "
                'unlabelled; for full supervision use data.labeled_fraction = "1" instead.'
            )
    return Partition(labeled, unlabeled)


def _read_list(field: str, path: str, dataset: Dataset) -> tuple[str, ...]:
    train = dataset.sources["train"].ids
    known = list_file.Ids(train)
    listed, unknown = list[str](), list[str]()
    for line in list_file.read_lines(path, field):
        name = known.find(line)
        if name is not None:
            listed.append(name)
        elif not line.lstrip().startswith("#"):
            unknown.append(line.strip())
    if unknown:
        _refuse(field, path, unknown, dataset)
    if not listed:
        raise UserError(f"{field} {path} holds no id; write one id of the train split a line.")
    repeated = [name for name, times in Counter(listed).items() if times > 1]
    if repeated:
        raise UserError(f"{field} {path} names {_some(repeated)} more than once.")
    return tuple(listed)


def _refuse(field: str, path: str, unknown: Sequence[str], dataset: Dataset) -> NoReturn:
    for split, source in dataset.sources.items():
        known = list_file.Ids(source.ids)
        found = {name for line in unknown if (name := known.find(line)) is not None}
        if split != "train" and found:
            raise UserError(
                f"{field} {path} names {_some(found)} of the split {split}, which is never trained "
                "on. Take such lines out, or name another list."
            )
    known = list_file.Ids(dataset.sources["train"].ids)
    several = [line for line in unknown if known.is_ambiguous(line)]
    if several:
        raise UserError(
            f"{field} {path} names {_some(several)}, which several images of the train split end "
            "in. Write the folders before it, as in "
            f"{min(dataset.sources['train'].ids)}."
        )
    raise UserError(
        f"{field} {path} names {_some(unknown)}, not in the train split; its ids look like "
        f"{min(dataset.sources['train'].ids)}."
    )


def _some(names: Iterable[str]) -> str:
    """Names the first few, of which a hostile list may hold anything, and counts the rest."""
    names = [text.name(name[:_LONGEST]) for name in sorted(set(names))]
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
