"""What trains otherwise than in an earlier version, so that no run changes in silence.

A checkpoint holds the version that wrote it. A run that one of these changes concerns goes on as it
was where a field brings the old behaviour back, and is refused by name where none does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from csc_jax.errors import UserError

Fields = dict[str, Any]  # a flat config, as `config.to_plain` gives it


class Change(NamedTuple):
    """One change of what is computed from the same config, seed and data."""

    version: str  # in which it came
    what: str  # a clause, after "since version …"
    concerns: Callable[[Fields], bool]  # whether the run of a config is another one with it
    before: Fields | None = None  # fields that came with it, at the values that undo it


def _has_module(c: Fields) -> bool:
    return bool(c["method.name"] == "csc" or c["method.contrast"] == "csc")


def _has_baseline(c: Fields) -> bool:
    return c["method.name"] in ("csc", "cutmix_mean_teacher")


def _is_one_of(*names: str) -> Callable[[Fields], bool]:
    return lambda c: c["method.name"] in names


def _has_photometric_views(c: Fields) -> bool:
    """Whether the views of `method.color_jitter` and `method.blur` are made (FixMatch: below)."""
    uses = c["method.name"] in ("csc", "cutmix_mean_teacher", "cps", "mean_teacher", "u2pl")
    return bool(uses and (c["method.color_jitter"] or c["method.blur"]))


CHANGES = (
    Change(
        "0.2.0",
        "L_c is the sum of a loss for each half of the batch",
        _has_module,
        {"contrast.halves": "together"},
    ),
    Change(
        "0.2.0",
        "L_u is the mean over the pixels that have a pseudo-label",
        _has_baseline,
        {"method.unsupervised_mean": "all"},
    ),
    Change(
        "0.2.0",
        "colour jitter multiplies and blur extends the image at its border",
        _has_photometric_views,
    ),
    Change(
        "0.2.0",
        "the strong view is that of UniMatch's code, and pseudo-labels are made without dropout",
        _is_one_of("fixmatch", "unimatch", "unimatch_v2"),
    ),
    Change(
        "0.2.0",
        "labelled and unlabelled images are batches of their own, and pseudo-labels are made "
        "without dropout",
        _is_one_of("cct", "cps"),
    ),
    Change(
        "0.2.0",
        "the targets are made without dropout, and flaw maps are blurred as in the authors' code",
        _is_one_of("gct"),
    ),
    Change(
        "0.2.0",
        "the module's pseudo-labels come from the teacher in evaluation mode",
        lambda c: c["method.name"] == "mean_teacher" and c["method.contrast"] == "csc",
    ),
)


def fields_before(stored: Fields, version: str) -> Fields:
    """Returns the values of fields that a checkpoint of `version` lacks, as it was trained.

    Args:
      stored: flat config in the checkpoint, all fields that there were.
      version: of the checkpoint.

    Raises:
      UserError: something has changed that no field undoes; it says what.
    """
    fields: Fields = {}
    for change in CHANGES:
        if _number(change.version) <= _number(version) or not change.concerns(stored):
            continue
        if not change.before:
            raise UserError(
                f"The work directory holds a run of csc_jax {version}; since version "
                f"{change.version} {change.what}, so it would go on as another run. Continue it "
                "with the older version, or choose another --workdir."
            )
        fields |= change.before
    return fields


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
