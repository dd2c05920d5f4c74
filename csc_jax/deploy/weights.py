"""The weights of an evaluated network by name, and as files: one .safetensors, or a bundle."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import save_file

from csc_jax.deploy.description import Description, decode, parse
from csc_jax.errors import UserError
from csc_jax.methods import Task
from csc_jax.models.weight_files import read_weights
from csc_jax.state import Network
from csc_jax.text import name as printable_name

Arrays = dict[str, np.ndarray]  # "params/backbone/stem1/conv/kernel" -> float32

_TRAINING_ONLY = ("projection", "auxiliary")  # heads without a part in class ids (decisions.md 16)
_KEY = "csc_jax"  # of the metadata of a .safetensors
WEIGHTS, CONFIG, CLASSES, CARD = "weights.safetensors", "config.json", "classes.json", "README.md"
_MOST_JSON = 1 << 20  # bytes


def evaluated(variables: Mapping[str, Any]) -> Arrays:
    """Returns the arrays of a network by name, without the heads that only training has."""
    flat = flatten_dict(dict(variables))
    return {
        "/".join(path): np.asarray(value, np.float32)
        for path, value in sorted(flat.items())
        if path[1] not in _TRAINING_ONLY
    }


def fill(task: Task, arrays: Arrays, source: object) -> Network:
    """Returns a network with these weights.

    Args:
      task: with the model, which has no auxiliary head.
      arrays: by name, from anywhere.
      source: where they came from, for messages.

    Raises:
      UserError: names or shapes are not those of the model.
    """
    abstract = jax.eval_shape(
        lambda key: task.init_network(key, projection=False), jax.random.key(0)
    )
    wanted = {"/".join(p): leaf.shape for p, leaf in flatten_dict(abstract.variables).items()}
    found = {name: array.shape for name, array in arrays.items()}
    different = sorted(
        name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
    )
    if different:
        lines = [
            f"{printable_name(name)[:120]} is {found.get(name, 'absent')}, the network has "
            f"{wanted.get(name, 'none')}"
            for name in different[:3]
        ]
        more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
        raise UserError(
            f"The weights in {source} are not those of its config: {'; '.join(lines)}{more}."
        )
    tree = unflatten_dict(
        {tuple(name.split("/")): np.asarray(a, np.float32) for name, a in arrays.items()}
    )
    return Network(tree["params"], tree.get("batch_stats", {}))


def write_file(path: Path, description: Description, arrays: Arrays) -> None:
    """Writes one .safetensors whose metadata describe the network."""
    save_file(arrays, path, metadata={_KEY: json.dumps(description.as_json())})


def read_file(path: Path) -> tuple[Description, Arrays]:
    """Reads what `write_file` wrote.

    Raises:
      UserError: it cannot be read, or is none of `--mode=export`.
    """
    arrays = read_weights(path)  # checks the header first
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    if _KEY not in metadata:
        raise UserError(
            f"{path} holds weights without a config. Give one that csc-jax export wrote, or train "
            "from it with --config.model.pretrained."
        )
    return parse(decode(metadata[_KEY], path), path), arrays


def write_bundle(folder: Path, description: Description, arrays: Arrays, card: str) -> None:
    """Writes weights, config, classes and model card into an existing folder."""
    values = description.as_json()
    classes = {"classes": values.pop("classes")}
    save_file(arrays, folder / WEIGHTS)
    for name, content in ((CONFIG, values), (CLASSES, classes)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card, encoding="utf-8")


def read_bundle(folder: Path) -> tuple[Description, Arrays]:
    """Reads what `write_bundle` wrote.

    Raises:
      UserError: the folder is no bundle, or a file of it is damaged.
    """
    missing = [name for name in (WEIGHTS, CONFIG, CLASSES) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is neither the work directory of a run nor a bundle: it has no "
            f"{missing[0]} and no checkpoints/."
        )
    config, classes = (_read_json(folder / name) for name in (CONFIG, CLASSES))
    if not isinstance(config, dict) or not isinstance(classes, dict):
        raise UserError(f"{folder / CONFIG} and {folder / CLASSES} must each hold a JSON object.")
    return parse(config | classes, folder), read_weights(folder / WEIGHTS)


def _read_json(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_JSON + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {os.strerror(error.errno or 0)}.") from error
    if len(content) > _MOST_JSON:
        raise UserError(f"{path} has more than {_MOST_JSON} bytes; no bundle's has.")
    return decode(content, path)
