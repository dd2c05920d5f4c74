"""What a trained network says of itself: classes, colours and config, in a run or as JSON.

As JSON it goes with every exported file. It may then come from anywhere, so that each value is
checked before anything is made of it.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import csc_jax
from csc_jax import config as config_lib
from csc_jax.config import checks as config_checks
from csc_jax.errors import UserError
from csc_jax.text import name as printable_name

FORMAT = 1  # of the JSON; another one is another program's
_MOST_CLASSES = 255  # class ids are uint8, and 255 is none
_MOST_NUMBERS = 64  # of a field with several
_LARGEST = 1 << 16  # px, channels or times, of fields that say how much memory a network takes
_LARGEST_SCALE = 8.0  # of eval.scales

# Folders and files on the machine of the training: nobody else's business, and of no use elsewhere.
_PATHS = {
    "data.root": "",
    "data.cache_dir": "",
    "data.labeled_list": "",
    "data.unlabeled_list": "",
    "data.folder.classes": "",
}


@dataclasses.dataclass(frozen=True)
class Description:
    """A network without its weights.

    Attributes:
      class_names: C names.
      palette: (C, 3) uint8 RGB.
      config: of its run, with what `config.eval` says of how images are predicted.
      step: of the training.
      version: of csc_jax that trained it.
    """

    class_names: tuple[str, ...]
    palette: np.ndarray
    config: ConfigDict
    step: int
    version: str = csc_jax.__version__

    def as_json(self) -> dict[str, Any]:
        """Returns what JSON can hold; paths on this machine are left out."""
        config = config_lib.to_plain(self.config) | _PATHS
        if not config["model.pretrained"].startswith(("hf:", "pip:")):
            config["model.pretrained"] = "none"
        return {
            "format": FORMAT,
            "csc_jax": self.version,
            "step": self.step,
            "classes": [
                {"name": name, "color": color.tolist()}
                for name, color in zip(self.class_names, self.palette, strict=True)
            ],
            "config": config,
        }


def parse(values: Any, source: object) -> Description:
    """Returns the description that `as_json` made.

    Args:
      values: decoded JSON, from anywhere.
      source: file that it was in, for messages.

    Raises:
      UserError: it is no description, of another version, or asks for what no network has.
    """
    if not isinstance(values, Mapping) or "classes" not in values or "config" not in values:
        raise UserError(f"{source} does not describe a network of csc_jax: no classes, no config.")
    if values.get("format") != FORMAT:
        raise UserError(
            f"{source} has the format {printable_name(values.get('format'))[:40]}, this version of "
            f"csc_jax reads {FORMAT}. Use the version that wrote it."
        )
    try:
        names, colors = _classes(values["classes"])
        config = config_lib.from_plain(dict(values["config"]))
        _check_bounds(config)
        config_checks.validate(config)
        step, version = int(values["step"]), str(values["csc_jax"])[:40]
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    # Wrong types and missing keys of all kinds.
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        reason = printable_name(f"{type(error).__name__}: {error}")[:120]
        raise UserError(f"{source} does not describe a network of csc_jax ({reason}).") from error
    return Description(names, colors, config, step, version)


def decode(text: str | bytes, source: object) -> Any:
    """Returns the value of a JSON text; UserError where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is no JSON ({printable_name(error)[:120]}).") from error


def _classes(listed: Any) -> tuple[tuple[str, ...], np.ndarray]:
    if not 1 <= len(listed) <= _MOST_CLASSES:
        raise UserError(f"{len(listed)} classes; there are 1 to {_MOST_CLASSES}.")
    names, colors = [], []
    for entry in listed:
        name, color = entry["name"], entry["color"]
        if not isinstance(name, str) or not name or len(name) > 200:
            raise UserError(f"{printable_name(name)[:40]!r} is no name of a class.")
        if len(color) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in color):
            raise UserError(f"{printable_name(color)[:40]} is no colour, three numbers to 255.")
        names.append(name)
        colors.append(color)
    return tuple(names), np.array(colors, np.uint8)


def _check_bounds(config: ConfigDict) -> None:
    """Raises UserError for a network or a manner of prediction that no memory holds."""
    for name, value in config_lib.flatten(config).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if len(numbers) > _MOST_NUMBERS:
            raise UserError(f"{name} has {len(numbers)} values; at most {_MOST_NUMBERS} are read.")
        sized = name.startswith(("model.", "eval.", "data.image_size", "data.crop_size", "batch."))
        for number in numbers if sized else ():
            if isinstance(number, (int, float)) and not abs(number) <= _LARGEST:
                raise UserError(f"{name} is {number}; at most {_LARGEST} is read.")
    if max(config.eval.scales, default=1) > _LARGEST_SCALE:
        raise UserError(f"eval.scales is {config.eval.scales}; at most {_LARGEST_SCALE} is read.")
