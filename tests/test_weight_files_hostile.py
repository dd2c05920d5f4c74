"""Files of weights made by hand to do harm: each is read or refused, and takes little memory."""

import json
import math
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from test_weight_files import FILES, write_legacy, write_zip

from csc_jax.errors import UserError
from csc_jax.models.weight_files import read_weights
from csc_jax.models.weights import convert_torch_state_dict

MEGABYTE = 2**20
HUGE = 10**30  # beyond int64


# Pickles by their opcodes, which pickletools explains.


def plain(value):
    """A number, a string, or a tuple or list of such."""
    return pickle.dumps(value, 2)[2:-1]


def call(function, *arguments):
    module, _, name = function.rpartition(".")
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


def storage(key="0", length=6, kind="FloatStorage"):
    start = b"(" + plain("storage") + f"ctorch\n{kind}\n".encode()
    return start + plain(key) + plain("cpu") + plain(length) + b"tQ"


def tensor(offset=0, size=(2, 3), stride=(3, 1), of=None):
    return call(
        "torch._utils._rebuild_tensor_v2",
        storage() if of is None else of,
        *(plain(offset), plain(size), plain(stride), plain(False)),
        call("collections.OrderedDict"),
    )


def dictionary(**values):
    return b"}(" + b"".join(plain(k) + v for k, v in values.items()) + b"u"


def program(content):
    return b"\x80\x02" + content + b"."


NUMBERS = np.arange(6, dtype=np.float32)


def read_zip(tmp_path, content, numbers=NUMBERS, **options):
    path = tmp_path / "a.pth"
    write_zip(path, program(content), {"0": numbers.tobytes()}, **options)
    return read_weights(path)


def read_old(tmp_path, content, numbers=NUMBERS, keys=("0",), length=6):
    path = tmp_path / "a.pth"
    after = pickle.dumps(list(keys), 2) + struct.pack("<q", length) + numbers.tobytes()
    write_legacy(path, program(content) + after)
    return read_weights(path)


@pytest.mark.parametrize("read", [read_zip, read_old])
def test_a_file_made_by_hand_is_read(tmp_path, read):
    state = read(tmp_path, dictionary(a=tensor(), b=tensor(5, (), ()), n=plain(3)))
    assert state.keys() == {"a", "b"}
    np.testing.assert_array_equal(state["a"], NUMBERS.reshape(2, 3))
    np.testing.assert_array_equal(state["b"], NUMBERS[5])


def test_a_compressed_archive_is_read(tmp_path):
    state = read_zip(tmp_path, dictionary(a=tensor()), compression=zipfile.ZIP_DEFLATED)
    np.testing.assert_array_equal(state["a"], NUMBERS.reshape(2, 3))


VIEWS = {
    "past the end": (0, (7,), (1,)),
    "offset": (4, (3,), (1,)),
    "stride": (0, (2, 3), (5, 3)),
    "negative offset": (-1, (2,), (1,)),
    "negative size": (0, (-2,), (1,)),
    "negative stride": (5, (2,), (-1,)),
    "repeated without end": (0, (10**12,), (0,)),
    "size beyond int64": (0, (HUGE,), (1,)),
    "offset beyond int64": (HUGE, (1,), (1,)),
    "stride beyond int64": (0, (2,), (HUGE,)),
    "product beyond int64": (0, (2**40, 2**40), (0, 0)),
    "axes": (0, (1,) * 100, (1,) * 100),
    "a float for a size": (0, (2.0,), (1,)),
    "a bool for a stride": (0, (2,), (True,)),
    "text for an offset": ("0", (2,), (1,)),
    "a number for the sizes": (0, 2, (1,)),
    "more strides": (0, (2,), (1, 1)),
    "nothing": (None, None, None),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("read", [read_zip, read_old])
def test_a_tensor_that_cannot_be_is_refused(tmp_path, read, view):
    with pytest.raises(UserError, match=r"a\.pth (is damaged|cannot be read)"):
        read(tmp_path, dictionary(a=tensor(*view)))


PROGRAMS = {
    "BUILD on a number": plain(3) + plain({"a": 1}) + b"b",
    "BUILD on a dictionary": b"}" + plain({"a": 1}) + b"b",
    "BUILD on a tensor": dictionary(a=tensor() + plain({"size": 3}) + b"b"),
    "BUILD on a storage": dictionary(a=storage() + plain({"length": 3}) + b"b"),
    "BUILD on a function": b"ctorch._utils\n_rebuild_tensor_v2\n" + plain({"x": 1}) + b"b",
    "BUILD on a class": b"ccollections\nOrderedDict\n" + plain({"x": 1}) + b"b",
    "slots of a class": b"ccollections\nOrderedDict\n" + plain((None, {"get": 1})) + b"b",
    "APPEND to a number": plain(3) + plain(1) + b"a",
    "APPENDS to text": plain("a") + b"(" + plain(1) + b"e",
    "ADDITEMS to a number": plain(3) + b"(" + plain(1) + b"\x90",
    "SETITEM of a tensor": tensor() + plain("a") + plain(1) + b"s",
    "SETITEMS of a number": plain(3) + b"(" + plain("a") + plain(1) + b"u",
    "an unhashable key": b"}" + plain([]) + plain(1) + b"s",
    "a call of a number": plain(3) + b")R",
    "a call of a dtype": b"ctorch\nFloatStorage\n)R",
    "a class that is none": plain(3) + b")\x81",
    "too little on the stack": b"R",
    "no mark": b"u",
    "an unknown name": call("builtins.eval", plain("1")),
    "an unknown opcode": b"\xff",
    "a missing memo": b"h\x07",
    "a persistent id of text": b"Px\n",
    "a persistent id of a number": plain(3) + b"Q",
    "a storage of no type": b"(" + plain("storage") * 3 + plain("cpu") + plain(1) + b"tQ",
    "a storage without name": dictionary(a=tensor(of=storage(key=0))),
    "a storage beyond int64": dictionary(a=tensor(of=storage(length=HUGE))),
    "a storage of less than none": dictionary(a=tensor(of=storage(length=-1))),
    "a storage of another length": dictionary(a=tensor(of=storage(length=7))),
    "a storage that is not there": dictionary(a=tensor(of=storage(key="1"))),
    "a storage outside": dictionary(a=tensor(of=storage(key="../data.pkl"))),
    "a tensor of a tensor": dictionary(a=tensor(of=tensor())),
    "a tensor of a number": dictionary(a=tensor(of=plain(3))),
    "an extension": b"\x82\x01",
    "a text of gigabytes": b"\x8d" + struct.pack("<Q", 2**33) + b"a",
    "bytes beyond int64": b"\x8e" + struct.pack("<Q", 2**64 - 1) + b"a",
    "a number of gigabytes": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"a",
    "a number of less than none": b"\x8b" + struct.pack("<i", -1),
    "a frame of gigabytes": b"\x95" + struct.pack("<Q", 2**40),
    "a memo of gigabytes": b"Nr" + struct.pack("<I", 2**31 - 1),
    "a memo beyond int64": b"Np99999999999999999999\n",
    "digits without end": b"I" + b"9" * 10_000 + b"\n",
    "nothing": b"",
}


@pytest.mark.parametrize("content", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("read", [read_zip, read_old])
def test_a_program_that_is_no_state_dict_is_refused(tmp_path, read, content):
    tracemalloc.start()
    try:
        with pytest.raises(
            UserError, match=r"a\.pth (is damaged|cannot be read|holds|is no state)"
        ):
            read(tmp_path, content)
        assert tracemalloc.get_traced_memory()[1] < 100 * MEGABYTE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("key", [plain(3), plain((1, 2)), b"N"])
def test_a_name_that_is_no_text_is_refused(tmp_path, key):
    with pytest.raises(UserError, match=r"has a (int|tuple|NoneType) in place of an array's name"):
        read_zip(tmp_path, b"}(" + key + tensor() + b"u")


def test_names_beside_the_arrays_may_be_anything(tmp_path):
    extra = b"}(" + plain("a") + tensor() + plain(3) + plain(HUGE) + b"u"
    assert read_zip(tmp_path, extra).keys() == {"a"}


def test_a_dictionary_that_answers_itself_is_asked_nothing(tmp_path):
    """A pickle may give an OrderedDict attributes that hide its methods."""
    content = call("collections.OrderedDict")
    content += b"(" + plain("a") + tensor() + b"u"
    content += b"}(" + plain("get") + plain(1) + plain("items") + plain(2) + b"ub"
    assert read_zip(tmp_path, content).keys() == {"a"}


def test_dictionaries_that_hold_each_other_many_times_take_no_time(tmp_path):
    """Thirty levels, each with the one below twice: 2^30 of them to whoever follows all."""
    content = b"}q\x00"
    for level in range(1, 31):
        below = b"h" + bytes([level - 1])
        content += b"}(" + plain("a")[:-2] + below + plain("b")[:-2] + below
        content += b"uq" + bytes([level])
    with pytest.raises(UserError, match="no state dict"):
        read_zip(tmp_path, content)


@pytest.mark.parametrize("read", [read_zip, read_old])
def test_tensors_that_share_one_storage_are_bounded_together(tmp_path, read):
    numbers = np.zeros(MEGABYTE, np.float32)
    shared = tensor(0, (MEGABYTE,), (1,), of=storage(length=MEGABYTE))
    content = dictionary(**{f"a{i}": shared for i in range(200)})
    options = {"length": MEGABYTE} if read is read_old else {}
    with pytest.raises(UserError, match="8 times the size of the file"):
        read(tmp_path, content, numbers, **options)


def test_many_names_of_one_storage_read_it_once(tmp_path):
    numbers = np.zeros(MEGABYTE, np.float32)
    views = {f"a{i}": tensor(0, (1,), (1,), of=storage(length=1 + i)) for i in range(200)}
    tracemalloc.start()
    try:
        state = read_zip(tmp_path, dictionary(**views), numbers)
        assert tracemalloc.get_traced_memory()[1] < 80 * MEGABYTE  # 200 readings take 800
    finally:
        tracemalloc.stop()
    assert len(state) == 200


def test_a_storage_of_two_types_is_refused(tmp_path):
    content = dictionary(a=tensor(), b=tensor(of=storage(kind="ByteStorage")))
    with pytest.raises(UserError, match="two types"):
        read_zip(tmp_path, content)


@pytest.mark.parametrize(
    ("keys", "length"), [(("1",), 6), (("0", "0"), 6), ((3,), 6), (("0",), -1), (("0",), 2**62)]
)
def test_a_list_of_storages_that_is_none_is_refused(tmp_path, keys, length):
    with pytest.raises(UserError, match=r"a\.pth is damaged"):
        read_old(tmp_path, dictionary(a=tensor()), keys=keys, length=length)


def bomb(path, declared=None):
    """A storage of 128 MB of zeros in 128 kB, which says that it has `declared` bytes."""
    size = 128 * MEGABYTE
    write_zip(path, program(dictionary(a=tensor())), {"0": bytes(size)}, zipfile.ZIP_DEFLATED)
    if declared is not None:
        sizes = struct.pack("<I", size), struct.pack("<I", declared)
        path.write_bytes(path.read_bytes().replace(*sizes))


@pytest.mark.parametrize("declared", [None, 24])
def test_a_member_that_inflates_to_far_more_is_refused_in_little_memory(tmp_path, declared):
    bomb(tmp_path / "a.pth", declared)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"over 8 times the archive's size|Bad CRC"):
            read_weights(tmp_path / "a.pth")
        assert tracemalloc.get_traced_memory()[1] < 40 * MEGABYTE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7])
def test_corrupt_compressed_data_are_refused(tmp_path, place):
    numbers = np.random.default_rng(0).integers(0, 4, 6000).astype(np.float32)
    whole = tensor(0, (6000,), (1,), of=storage(length=6000))
    read_zip(tmp_path, dictionary(a=whole), numbers, compression=zipfile.ZIP_DEFLATED)
    content = bytearray((tmp_path / "a.pth").read_bytes())
    where = int(place * len(content))
    content[where : where + 8] = b"\xff" * 8
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.pth (is damaged|cannot be read)"):
        read_weights(tmp_path / "a.pth")


def test_archives_that_torch_does_not_write_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    write_zip(path, program(dictionary(a=tensor())), {"0": NUMBERS.tobytes()}, zipfile.ZIP_LZMA)
    with pytest.raises(UserError, match="compression"):
        read_weights(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program(dictionary(a=tensor())))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("archive/data.pkl", program(dictionary(a=tensor())))
    with pytest.raises(UserError, match="one member twice"):
        read_weights(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "none")
    with pytest.raises(UserError, match=r"none that torch\.save wrote"):
        read_weights(path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    for name in ("zip.pth", "legacy.pth"):
        whole = (FILES / name).read_bytes()
        for end in range(0, len(whole) - 1, 97):
            (tmp_path / name).write_bytes(whole[:end])
            with pytest.raises(UserError, match=rf"{name} "):
                read_weights(tmp_path / name)


# Safetensors


def safetensors(path, header, data=None):
    data = NUMBERS.tobytes() if data is None else data
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "overlapping": {"a": entry(), "b": entry(shape=(1,), offsets=(4, 8))},
    "beyond the end": {"a": entry(shape=(2, 4), offsets=(0, 32))},
    "a hole": {"a": entry(shape=(1,), offsets=(20, 24))},
    "another shape": {"a": entry(shape=(2, 2))},
    "beyond int64": {"a": entry(shape=(HUGE,), offsets=(0, HUGE))},
    "product beyond int64": {"a": entry(shape=(2**40, 2**40), offsets=(0, 24))},
    "negative": {"a": entry(shape=(-2, -3))},
    "no shape": {"a": {"dtype": "F32"}},
    "a number": {"a": 3},
    "a list": [entry()],
    "one name twice": b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2),
    "no JSON": b"\xff\xfe",
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_hostile_safetensors_are_refused(tmp_path, header):
    safetensors(tmp_path / "a.safetensors", header)
    with pytest.raises(UserError, match=r"a\.safetensors (is damaged|cannot be read)"):
        read_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4", "F6_E2M3", "F8_E8M0", "C64", "X"])
def test_types_without_an_array_are_named(tmp_path, dtype):
    bits = int(dtype[1]) if dtype[1:2].isdigit() and dtype[0] == "F" else 8
    count = math.prod((2, 3)) * bits // 8
    safetensors(tmp_path / "a.safetensors", {"a": entry(dtype, offsets=(0, count))}, bytes(count))
    with pytest.raises(UserError, match=rf"holds a as {dtype}, which is not read; save .*F32"):
        read_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9])
def test_a_header_of_gigabytes_is_refused(tmp_path, length):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(UserError, match="header longer"):
        read_weights(tmp_path / "a.safetensors")


def test_what_is_read_is_told_to_fit_no_network(tmp_path):
    """Arrays under odd names go on to the conversion, which names them."""
    state = read_zip(
        tmp_path, dictionary(**{"\x1b[31m": tensor(), "": tensor(), "conv1": tensor()})
    )
    with pytest.raises(UserError, match="no known family"):
        convert_torch_state_dict(state, {"params": {}, "batch_stats": {}})
