"""Files of images and labels, decoded one by one."""

import io
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image
from trees import SIZE, picture, write_png

from csc_jax import data
from csc_jax.data import codec
from csc_jax.errors import UserError


@pytest.mark.parametrize("kind", ["eps", "tiff"])
def test_a_label_is_read_as_png_alone(tmp_path, monkeypatch, kind):
    """For others Pillow starts programs (Ghostscript for EPS), or gives values that are no ids."""
    stream = io.BytesIO()
    pixels = np.zeros(SIZE, np.uint8 if kind == "eps" else np.float32)
    Image.fromarray(pixels).save(stream, kind)
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **_: started.append(arguments))
    assert codec.decode_stored_values(stream.getvalue(), ".png") is None
    assert not started


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16", "P"])
def test_ids_are_read_from_every_kind_of_png_with_one_channel(mode):
    ids = np.arange(12).reshape(3, 4) % (2 if mode == "1" else 12)
    if mode == "LA":  # grey and alpha
        label = Image.fromarray(np.stack([ids, 255 - ids], axis=-1).astype(np.uint8))
    else:
        label = Image.fromarray(ids.astype({"1": bool, "I;16": np.uint16}.get(mode, np.uint8)))
    if mode == "P":
        label.putpalette([7 * i % 256 for i in range(3 * 256)])
    assert label.mode == mode
    stream = io.BytesIO()
    label.save(stream, "png")
    stored = codec.decode_stored_values(stream.getvalue(), ".png")
    assert stored.dtype.kind in "iu"
    np.testing.assert_array_equal(stored, ids)


def test_an_image_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.png cannot be read: No such file"):
        codec.read_image(tmp_path / "none.png")
    (tmp_path / "half.png").write_bytes(codec.encode_png(picture(0))[:50])
    with pytest.raises(UserError, match=r"half\.png is not an image that can be read"):
        codec.read_image(tmp_path / "half.png")


def test_an_image_that_promises_too_many_pixels_is_corrupt():
    content = codec.encode_png(picture(0))
    header = b"IHDR" + struct.pack(">II", 2**31 - 1, 2**31 - 1) + content[24:29]
    huge = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    assert codec.decode_image(huge) is None
    assert codec.decode_image(b"") is None


def test_channels_are_rgb(tmp_path):
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    write_png(tmp_path / "red.png", red)
    np.testing.assert_array_equal(data.read_image(tmp_path / "red.png"), red)
