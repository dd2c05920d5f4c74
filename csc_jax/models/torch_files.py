"""What `torch.save` writes, read without PyTorch and without running what is in it.

A pickle is a program. Three things keep a hostile one harmless:

* Only the few names that build tensors are known. They make plain notes of what is asked for, no
  arrays, and they cannot be changed by the pickle.
* Its opcodes are looked through before they run, as CPython makes a table as long as an opcode
  asks for.
* Arrays are made afterwards, and of those tensors alone that the caller wants. No size counts for
  more than the file can hold.
"""

import collections
import dataclasses
import io
import math
import pickle
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import ml_dtypes
import numpy as np

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the format before torch 1.6
_MOST_PICKLED = 16 * 2**20  # bytes; the names and sizes of 10,000 tensors take 2 MB
_MOST_AXES = 32
# torch.save does not compress, but an archive that was packed anew may be; weights shrink little.
_MOST_INFLATED, _MOST_INFLATION = 64 * 2**20, 8  # bytes that any archive may hold, times its size
_MOST_SHARED = 8  # times the file that all tensors together may take; tied weights share storages
_LARGEST = 2**63 - 1

_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
# Beside tensors, checkpoints hold scores (scalars of NumPy) and settings of optimizers.
_DISCARDED = frozenset(
    {
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
        ("collections", "Counter"),
        ("torch", "device"),
        ("torch", "Size"),
        *(("torch", name) for name in ("float64", "float32", "float16", "bfloat16")),
    }
)


class Hostile(ValueError):
    """The file asks for what no file of weights does; the message says for what."""


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """A run of numbers in the file, by its name there."""

    key: str
    dtype: np.dtype
    length: int  # elements

    def __setstate__(self, _: object) -> NoReturn:
        raise Hostile("a storage that is changed after it was named")


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a storage; `offset` and `stride` count elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __setstate__(self, _: object) -> NoReturn:
        raise Hostile("a tensor that is changed after it was made")

    @property
    def nbytes(self) -> int:
        """Of the array."""
        return math.prod(self.size) * self.storage.dtype.itemsize


class TorchFile:
    """An open file of `torch.save`; a context manager.

    Attributes:
      content: what was saved, with a `Tensor` for each tensor. Numbers of NumPy are lost.
    """

    content: Any

    def __init__(self, path: Path):
        """Reads all but the numbers.

        Raises:
          Hostile: it asks for more than tensors, or for more than it can hold.
          Exception: nearly any, for a damaged file.
        """
        self._file = path.open("rb")
        try:
            self._size = path.stat().st_size
            if zipfile.is_zipfile(self._file):
                self._open_archive()
            else:
                self._file.seek(0)
                self._open_legacy()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def arrays(self, tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Returns the numbers of tensors, read-only, in the dtypes that are stored.

        Raises:
          Hostile: a tensor lies outside of its storage, or all together exceed the file.
          Exception: nearly any, for a damaged file.
        """
        most = _MOST_SHARED * max(self._size, _MOST_INFLATED)
        if sum(tensor.nbytes for tensor in tensors.values()) > most:
            raise Hostile(f"tensors of over {_MOST_SHARED} times the size of the file")
        contents: dict[str, bytes] = {}
        arrays = {}
        for name, tensor in tensors.items():
            key = tensor.storage.key
            if key not in contents:
                contents[key] = self._read_storage(key)
            arrays[name] = _view(contents[key], tensor)
        return arrays

    # ---- Since torch 1.6: a zip archive of one pickle and a file for each storage ----

    def _open_archive(self) -> None:
        archive = zipfile.ZipFile(self._file)
        members = {info.filename: info for info in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise Hostile("one member twice")
        if sum(info.file_size for info in members.values()) > max(
            _MOST_INFLATED, _MOST_INFLATION * self._size
        ):
            raise Hostile(f"members that unpack to over {_MOST_INFLATION} times the archive's size")
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Hostile("a zip archive, but none that torch.save wrote")
        folder = pickles[0].removesuffix("data.pkl")

        def read(name: str) -> bytes:
            if name not in members:
                raise Hostile(f"no member {name!r}")
            info = members[name]
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise Hostile(f"member {name!r} with a compression that torch.save does not know")
            with archive.open(info) as stream:
                # With a length: without one, a member that says it is small is inflated as a whole.
                return stream.read(info.file_size)

        if f"{folder}byteorder" in members:
            _check_byteorder(read(f"{folder}byteorder").decode())
        if members[pickles[0]].file_size > _MOST_PICKLED:
            raise Hostile(f"names and sizes of more than {_MOST_PICKLED} bytes")
        self._read_storage: Callable[[str], bytes] = lambda key: read(f"{folder}data/{key}")
        self.content = _load(io.BytesIO(read(pickles[0])))

    # ---- Before: five pickles, then every storage, one after the other ----

    def _open_legacy(self) -> None:
        file = self._file
        if _load(file) != _MAGIC or _load(file) != _PROTOCOL:
            raise Hostile("it does not begin as torch.save does")
        _check_byteorder("little" if _load(file)["little_endian"] else "big")
        dtypes: dict[str, np.dtype] = {}
        self.content = _load(file, dtypes)
        places: dict[str, tuple[int, int]] = {}
        for key in _load(file):
            if key not in dtypes or key in places:
                raise Hostile("a list of storages that no tensor is of")
            (length,) = struct.unpack("<q", file.read(8))  # before its elements
            start, size = file.tell(), length * dtypes[key].itemsize
            if not 0 <= size <= self._size - start:
                raise Hostile(f"storage {key!r} reaches beyond the end of the file")
            places[key] = start, size
            file.seek(start + size)

        def read(key: str) -> bytes:
            if key not in places:
                raise Hostile(f"storage {key!r} is not in the file")
            start, size = places[key]
            file.seek(start)
            return file.read(size)

        self._read_storage = read


def _load(file: BinaryIO, storages: dict[str, np.dtype] | None = None) -> Any:
    """Returns what one pickle makes; the file is then at its end.

    Args:
      file: at the beginning of the pickle.
      storages: takes the dtype of each storage that the pickle names.
    """
    start = file.tell()
    stream = io.BytesIO(file.read(_MOST_PICKLED))
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            # CPython makes a table of that length; what writes pickles counts up.
            puts = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
            if puts and not 0 <= int(argument or 0) <= count:
                raise Hostile("a pickle whose memo is out of order")
    except ValueError as error:
        if stream.tell() < _MOST_PICKLED or isinstance(error, Hostile):
            raise
        raise Hostile(f"names and sizes of more than {_MOST_PICKLED} bytes") from error
    file.seek(start + stream.tell())
    stream.truncate()
    stream.seek(0)
    return _Unpickler(stream, {} if storages is None else storages).load()


class _Opaque:
    """Stands for what is of no use here, such as a scalar of NumPy."""

    __slots__ = ()

    def __setstate__(self, _: object) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Admits dictionaries, lists, numbers, strings and tensors, and nothing else."""

    def __init__(self, file: BinaryIO, storages: dict[str, np.dtype]):
        super().__init__(file)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return name
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        # Bound methods, because a pickle can set attributes of what it is given.
        if (module, name) in _DISCARDED:
            return self._discarded
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return self._parameter
        raise Hostile(
            f"it asks for {module}.{name}, which is no part of a tensor and was not run; save the "
            "state dict alone, torch.save(model.state_dict(), FILE)"
        )

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, length, *view = pid
        if kind != "storage" or dtype not in _DTYPES or any(v is not None for v in view):
            raise Hostile(f"an unknown kind of storage {kind!r:.40}")
        if not isinstance(key, str) or not _is_count(length):
            raise Hostile("a storage without name or length")
        if self._storages.setdefault(key, _DTYPES[dtype]) != _DTYPES[dtype]:
            raise Hostile(f"storage {key!r} of two types")
        return Storage(key, _DTYPES[dtype], length)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> Tensor:
        numbers = (offset, *size, *stride)
        if (
            not isinstance(storage, Storage)
            or not (isinstance(size, tuple) and isinstance(stride, tuple))
            or len(size) != len(stride)
            or len(size) > _MOST_AXES
            or not all(map(_is_count, numbers))
        ):
            raise Hostile("a tensor with impossible sizes or strides")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if count and (last >= storage.length or count > storage.length):
            raise Hostile("a tensor beyond the end of its storage")
        return Tensor(storage, offset, size, stride)

    def _parameter(self, data: Any, *_: object) -> Any:
        return data

    def _discarded(self, *_: object) -> _Opaque:
        return _Opaque()


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _view(content: bytes, tensor: Tensor) -> np.ndarray:
    """Returns a tensor as a view of its storage's bytes."""
    storage, width = tensor.storage, tensor.storage.dtype.itemsize
    if len(content) < storage.length * width:
        raise Hostile(
            f"storage {storage.key!r} has {len(content)} bytes in place of {storage.length * width}"
        )
    if not math.prod(tensor.size):
        return np.zeros(tensor.size, storage.dtype)
    numbers = np.frombuffer(content, storage.dtype, storage.length)[tensor.offset :]
    strides = [step * width for step in tensor.stride]
    return np.lib.stride_tricks.as_strided(numbers, tensor.size, strides, writeable=False)


def _check_byteorder(order: str) -> None:
    if order != sys.byteorder:
        raise Hostile(f"numbers of a machine of {order} byte order")
