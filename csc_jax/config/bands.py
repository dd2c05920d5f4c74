"""Fields of `data` that say what an image holds: RGB of 8 bits, or bands with values of their own.

`data.mean`, `data.std` and `data.pixel_type` may be left to the preparation of the data. A run
carries what was found, so that its network sees other images in the same way.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from csc_jax.config.defaults import RGB_MEAN, RGB_STD
from csc_jax.errors import UserError

MOST = 64  # bands
_RGB = 3
_FIELDS = ("mean", "std", "pixel_type")


def keeps_values(data: ConfigDict) -> bool:
    """Whether images keep the values of their files; else they become RGB of 8 bits."""
    return data.bands != _RGB or not len(data.mean) or bool(data.pixel_type)


def dtype(data: ConfigDict) -> str:
    """Returns the NumPy type of images; uint8 where the preparation has yet to find it."""
    return data.pixel_type or "uint8"


def with_measured(config: ConfigDict, found: Mapping[str, Any] | None) -> ConfigDict:
    """Returns a copy of the config with what the preparation, or an earlier run, has found.

    Args:
      config: of a run; what it gives itself stays.
      found: {"mean", "std"} -> a number for each band, {"pixel_type"} -> its name; None where
        nothing is known, as before any data is read: bands of 8 bits with mean 0 and deviation 1.
    """
    config = config.copy_and_resolve_references()
    data = config.data
    if not keeps_values(data):
        return config
    values = found or {"mean": (0,) * data.bands, "std": (1,) * data.bands, "pixel_type": "uint8"}
    if to_be_measured(data):
        data.mean, data.std = (tuple(map(float, values[name])) for name in ("mean", "std"))
    data.pixel_type = data.pixel_type or str(values["pixel_type"])
    return config


def found_by(plain: Mapping[str, Any], bands: int) -> Mapping[str, Any] | None:
    """Returns what a run has found, as `with_measured` takes it; None if it is of other bands.

    Args:
      plain: `to_plain` of its config, or {}.
      bands: `data.bands`.
    """
    found = {name: plain.get(f"data.{name}") for name in _FIELDS}
    return found if all(found.values()) and plain["data.bands"] == bands else None


def check(data: ConfigDict) -> None:
    """Raises UserError for fields that do not go together; `data` is that part of the config."""
    for name in ("mean", "std"):
        numbers = data[name]
        if not all(math.isfinite(number) for number in numbers):
            raise UserError(f"data.{name} is {tuple(numbers)}; it takes finite numbers.")
        if len(numbers) not in (0, data.bands) and not to_be_measured(data):
            example = ",".join(["1"] * data.bands)
            raise UserError(
                f"data.{name} is {tuple(numbers)}, but data.bands is {data.bands}; it takes a "
                f"number for each band, as in --config.data.{name}={example}, or () to have it "
                "measured."
            )
    if (len(data.mean) == 0) != (len(data.std) == 0):
        raise UserError(
            f"data.mean is {tuple(data.mean)} and data.std {tuple(data.std)}; give both, or () for "
            "both to have them measured."
        )
    if any(number <= 0 for number in data.std):
        raise UserError(f"data.std is {tuple(data.std)}; a deviation is above 0.")
    if not keeps_values(data):
        return
    if data.name != "folder":
        raise UserError(
            f"data.bands is {data.bands}, data.pixel_type {data.pixel_type!r} and data.mean "
            f"{tuple(data.mean)}: images keep their own values, which goes with data.name=folder, "
            f"not with {data.name!r}. Its images are RGB of 8 bits: leave these fields as they are."
        )
    if data.image_bits:
        raise UserError(
            f"data.image_bits is {data.image_bits}, which says how 16 bits become 8, but images "
            "keep their values (data.bands, data.mean or data.pixel_type says so). Set "
            "--config.data.image_bits=0."
        )


def to_be_measured(data: ConfigDict) -> bool:
    """Whether mean and deviation are still to be found."""
    return not len(data.mean) or (data.bands != _RGB and _is_rgb(data.mean, data.std))


def _is_rgb(mean: Sequence[float], std: Sequence[float]) -> bool:
    return tuple(mean) == RGB_MEAN and tuple(std) == RGB_STD
