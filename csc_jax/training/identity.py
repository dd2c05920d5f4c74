"""Which images a run is of: kept with every checkpoint, compared before a run goes on."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from csc_jax import data
from csc_jax.errors import UserError
from csc_jax.text import name as printable

_NAMED = 3  # images or classes spelt out in a message
_IMAGE = 16  # leading digits of a digest that are of the image alone (`census.Facts`)


def describe(
    dataset: data.Dataset, partition: data.Partition, evaluated: str, steps_per_epoch: int
) -> dict[str, Any]:
    """Returns the images of a run, as JSON holds them: lists of [id, digest].

    Args:
      dataset: from which they are.
      partition: its labelled and unlabelled train images.
      evaluated: `eval.split`; its splits are listed under their names, and val always.
      steps_per_epoch: steps of one pass over the unlabelled list.
    """
    train = dataset.sources["train"]
    others = dict.fromkeys(split for split in ("val", *evaluated.split("+")) if split != "train")
    return {
        "labeled": _listed(train, partition.labeled),
        "unlabeled": _listed(train, partition.unlabeled),
        "evaluated": {split: _listed(dataset.sources[split]) for split in others},
        "steps_per_epoch": steps_per_epoch,
    }


def compare(
    before: Mapping[str, Any], now: Mapping[str, Any], allow_new_unlabeled: bool
) -> list[str]:
    """Compares what a checkpoint says of itself with the run that is to continue it.

    Args:
      before: of the checkpoint, with "class_names" and "palette"; "data", as of `describe`, is
        compared where it has it.
      now: likewise.
      allow_new_unlabeled: `checkpoint.allow_new_unlabeled`.

    Returns:
      One line for each difference that is allowed.

    Raises:
      UserError: it names the first classes and images that differ, and the way out.
    """
    refused = _classes(before, now)
    allowed = []
    if "data" in before:
        old, new = before["data"], now["data"]
        refused += _images("labelled images", old["labeled"], new["labeled"])
        for split, listed in old["evaluated"].items():
            if split in new["evaluated"]:
                refused += _images(f"{split} images", listed, new["evaluated"][split])
        unlabeled = _images("unlabelled images", old["unlabeled"], new["unlabeled"])
        if allow_new_unlabeled:
            allowed = unlabeled
        elif unlabeled and not refused:
            raise UserError(
                f"The data have changed since the checkpoint: {'; '.join(unlabeled)}. To go on "
                "with these unlabelled images, set --config.checkpoint.allow_new_unlabeled=True; "
                "or give the run its old data, or choose another --workdir."
            )
        else:
            refused += unlabeled
    if refused:
        raise UserError(
            f"The data have changed since the checkpoint: {'; '.join(refused)}. Give the run its "
            "old data to continue it (data.root, the class list, data.labeled_list; the lists it "
            "was trained on are in the folder splits of the --workdir), or choose another "
            "--workdir."
        )
    return allowed


def trained_on(run: Mapping[str, Any], source: data.Source) -> dict[str, list[str]]:
    """Returns the images of a split that a checkpoint was trained on, by name or by content.

    Args:
      run: what the checkpoint says of itself.
      source: the split.

    Returns:
      Their ids, as {"labeled": [...], "unlabeled": [...]}; an image of both is among the former.
      Empty lists for a checkpoint that does not say what it was trained on.
    """
    found: dict[str, list[str]] = {"labeled": [], "unlabeled": []}
    if "data" not in run:
        return found
    known: dict[str | tuple[str], str] = {}
    for half in ("unlabeled", "labeled"):
        for image, digest in run["data"][half]:
            known[image] = half
            if digest:
                known[_content(digest)] = half
    for image, digest in _listed(source):
        trained = known.get(image) or (known.get(_content(digest)) if digest else None)
        if trained:
            found[trained].append(image)
    return found


def digest(source: data.Source) -> str:
    """Returns 16 hexadecimal digits that change with any image or label of a split."""
    return hashlib.blake2b(
        repr(_listed(source)).encode(errors="replace"), digest_size=8
    ).hexdigest()


def _content(digest: str) -> tuple[str]:
    """Returns what stands for the image itself; no id is a tuple."""
    return (digest[:_IMAGE],)


def _listed(source: data.Source, ids: Sequence[str] | None = None) -> list[list[str]]:
    digests = source.digests or ("",) * len(source.ids)
    of = dict(zip(source.ids, digests, strict=True))
    return [[image, of[image]] for image in (source.ids if ids is None else ids)]


def _classes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = before["class_names"], now["class_names"]
    if old != new:
        if len(old) != len(new):
            return [f"{len(old)} classes before, {len(new)} now"]
        moved = [
            f"class {i} was {printable(a)!r} and is {printable(b)!r}"
            for i, (a, b) in enumerate(zip(old, new, strict=True))
            if a != b
        ]
        return [_some(moved)]
    recolored = [
        f"the colour of {printable(name)!r} was {tuple(a)} and is {tuple(b)}"
        for name, a, b in zip(new, before["palette"], now["palette"], strict=True)
        if list(a) != list(b)
    ]
    return [_some(recolored)] if recolored else []


def _images(what: str, old: Sequence[Sequence[str]], new: Sequence[Sequence[str]]) -> list[str]:
    """Returns [how two lists differ], [] if they do not."""
    before, now = (dict[str, str](listed) for listed in (old, new))  # type: ignore[arg-type]
    if before == now and list(before) == list(now):
        return []
    parts = [
        (f"{printable(image)} is new" for image in now if image not in before),
        (f"{printable(image)} is gone" for image in before if image not in now),
        (
            f"{printable(image)} has another {_part(before[image], now[image])}"
            for image in now
            if before.get(image, now[image]) != now[image] and before[image] and now[image]
        ),
    ]
    found = [_some(list(part)) for part in parts]
    differences = ", ".join(filter(None, found))
    if not differences:
        if list(before) == list(now):  # one of them without digests
            return []
        differences = "in another order"
    return [f"{what}: {differences}"]


def _part(before: str, now: str) -> str:
    changed = [
        name
        for name, part in (("image", slice(_IMAGE)), ("label", slice(_IMAGE, None)))
        if before[part] != now[part]
    ]
    return " and ".join(changed)


def _some(phrases: Iterable[str]) -> str:
    phrases = list(phrases)
    more = len(phrases) - _NAMED
    return ", ".join(phrases[:_NAMED]) + (f" and {more} more" if more > 0 else "")
