"""Exported networks are the run's: read again, on other sizes, by a function of their own."""

import importlib.util
import json
import logging
import re
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from saved_run import STEP, save_run

import csc_jax
from csc_jax import main, stored_config
from csc_jax.deploy import card, hub, program
from csc_jax.deploy import export as export_lib
from csc_jax.deploy.network import function
from csc_jax.errors import UserError
from csc_jax.models import plain
from csc_jax.models.convolution import convolve
from csc_jax.models.depthwise import convolve_depthwise
from csc_jax.models.resize import resize_aligned


def needs_flatbuffers(test):
    missing = importlib.util.find_spec("flatbuffers") is None
    reason = "flatbuffers is not installed (extra export)"
    return pytest.mark.parity(pytest.mark.skipif(missing, reason=reason)(test))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_run(folder, method__name="supervised", eval__network="student", loss__aux_weight=0.4)
    return folder


@pytest.fixture(scope="module")
def model(run):
    return csc_jax.load(run)


def export(run, out, file_format, **options):
    config = stored_config.get_config(str(run))
    return export_lib.export(config, run, "latest", file_format=file_format, out=out, **options)


def picture(height, width):
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [(7, 9), (16, 16)])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(1, 1, 1), (1, 2, 1), (3, 2, 1), (3, 1, 6)]
)
def test_plain_convolutions_are_the_same(size, kernel, stride, dilation):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *size, 4)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(kernel, kernel, 4, 5)), jnp.float32)
    of_channel = jnp.asarray(rng.normal(size=(kernel, kernel, 1, 4)), jnp.float32)
    expected = convolve(x, weights, stride, dilation)
    by_channel = convolve_depthwise(x, of_channel, stride, dilation)
    with plain.convolutions():
        jaxpr = str(jax.make_jaxpr(lambda: convolve(x, weights, stride, dilation))())
        np.testing.assert_allclose(convolve(x, weights, stride, dilation), expected, atol=1e-4)
        found = convolve_depthwise(x, of_channel, stride, dilation)
        np.testing.assert_allclose(found, by_channel, atol=1e-4)
    assert "conv_general_dilated" in jaxpr
    assert not plain.is_on()


def test_a_resize_of_sizes_unknown_is_the_same():
    x = np.random.default_rng(0).normal(size=(2, 7, 5, 3)).astype(np.float32)
    b, h, w, rows, columns = jax.export.symbolic_shape("b, h, w, r, c")
    like = jax.ShapeDtypeStruct((rows, columns), jnp.uint8)
    exported = jax.export.export(
        jax.jit(lambda x, like: resize_aligned(x, like.shape)), platforms=["cpu"]
    )(jax.ShapeDtypeStruct((b, h, w, 3), jnp.float32), like)
    for size in ((13, 20), (7, 5), (3, 1)):
        found = exported.call(x, np.zeros(size, np.uint8))
        np.testing.assert_allclose(found, resize_aligned(jnp.asarray(x), size), atol=1e-6)


@pytest.fixture(scope="module")
def stablehlo(run, tmp_path_factory):
    return export(run, tmp_path_factory.mktemp("out") / "net.stablehlo", "stablehlo")


@needs_flatbuffers
def test_one_program_takes_any_size_on_three_platforms(stablehlo, model):
    loaded = csc_jax.load(stablehlo)
    for size in ((33, 47), (40, 40)):
        image = picture(*size)
        expected = model.predict(image, probabilities=True)
        found = loaded.predict(image, probabilities=True)
        np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-4)
    assert loaded.class_names == model.class_names
    with zipfile.ZipFile(stablehlo) as archive:
        header = json.loads(archive.read("header.json"))
        exported = jax.export.deserialize(bytearray(archive.read("program.bin")))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert header["program"]["size"] is None
    assert header["classes"][0]["name"] == model.class_names[0]
    assert header["config"]["data.mean"] == list(model.description.config.data.mean)


@needs_flatbuffers
def test_a_program_stands_without_this_package(stablehlo, model, tmp_path):
    """The three lines of docs/deploy.md."""
    from safetensors.numpy import load

    images = picture(20, 30)[None]
    with zipfile.ZipFile(stablehlo) as archive:
        segment = jax.export.deserialize(bytearray(archive.read("program.bin"))).call
        weights = load(archive.read("weights.safetensors"))
    classes, probabilities = segment(weights, images)
    expected = model.predict(images[0], probabilities=True)
    np.testing.assert_allclose(probabilities[0], expected.probabilities, atol=1e-4)
    assert (np.asarray(classes)[0] != expected.classes).mean() < 0.01


@needs_flatbuffers
def test_a_program_of_one_size_takes_all_images_in_windows(run, tmp_path):
    out = export(run, tmp_path / "net.stablehlo", "stablehlo", size=(32, 40))
    loaded = csc_jax.load(out)
    sliding = csc_jax.load(run, mode="sliding", window=(32, 40))
    for size in ((32, 40), (50, 41)):
        image = picture(*size)
        expected = sliding.predict(image, probabilities=True)
        found = loaded.predict(image, probabilities=True)
        np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-4)
    assert loaded.predict(picture(9, 60)).classes.shape == (9, 60)


def rewritten(path, out, **members):
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(out, "w") as archive:
        for name, value in (content | members).items():
            archive.writestr(name, value)
    return out


@needs_flatbuffers
def test_a_program_that_calls_more_than_a_network_is_refused(stablehlo, model, tmp_path):
    segment = function(model.description)

    shapes = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in model.arrays.items()}
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.uint8)
    exported = jax.export.export(
        jax.jit(lambda w, x: (segment(w, x)[0], jnp.linalg.cholesky(segment(w, x)[1][0, :7, :7]))),
        disabled_checks=[],
    )(shapes, images)
    out = rewritten(
        stablehlo, tmp_path / "a.stablehlo", **{"program.bin": bytes(exported.serialize())}
    )
    with pytest.raises(UserError, match="calls 'lapack_spotrf_ffi', which is no part of a network"):
        csc_jax.load(out)


@needs_flatbuffers
@pytest.mark.parametrize(
    ("member", "value", "message"),
    [
        ("program.bin", b"x" * 100, "holds no program that can be read"),
        ("header.json", b"{}", "does not describe a network"),
        ("header.json", b"[" * 10**5, "is no JSON"),
        ("weights.safetensors", b"abc", "cannot be read as a file of weights"),
    ],
)
def test_damaged_programs_are_named(stablehlo, tmp_path, member, value, message):
    out = rewritten(stablehlo, tmp_path / "a.stablehlo", **{member: value})
    with pytest.raises(UserError, match=message):
        csc_jax.load(out)


@needs_flatbuffers
def test_a_header_that_does_not_fit_the_program_is_an_error(stablehlo, tmp_path):
    with zipfile.ZipFile(stablehlo) as archive:
        header = json.loads(archive.read("header.json"))
    for change, message in (
        ({"classes": header["classes"][:-1]}, "does not fit the weights and classes"),
        ({"program": {"size": [9, 9]}}, "does not fit the weights and classes"),
        ({"program": {"size": [9, 10**9]}}, "does not say which size"),
        ({"program": 3}, "does not say which size"),
    ):
        content = json.dumps(header | change).encode()
        out = rewritten(stablehlo, tmp_path / "a.stablehlo", **{"header.json": content})
        with pytest.raises(UserError, match=message):
            csc_jax.load(out)


def test_an_archive_that_is_none_or_compressed_is_an_error(tmp_path):
    path = tmp_path / "a.stablehlo"
    path.write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="is no file of csc-jax export"):
        csc_jax.load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", b" " * 10**6)
    with pytest.raises(UserError, match=r"header\.json is compressed"):
        csc_jax.load(path)


def test_a_bundle_says_what_is_known_and_leaves_the_rest_to_its_owner(run, tmp_path, caplog):
    reports = run / "evaluation"
    reports.mkdir(exist_ok=True)
    scores = {"images": 6, "miou": 0.5, "iou/sky": 0.25, "iou/road": None}
    (reports / f"val_student_{STEP}_whole.json").write_text(json.dumps(scores))
    (reports / f"val_student_{STEP}_sliding.json").write_text("damaged")
    with caplog.at_level(logging.INFO, "csc_jax"):
        out = export(run, tmp_path / "deep" / "bundle", "bundle")
    assert re.search(r"read again: probabilities differ by at most \d", caplog.text)
    assert sorted(p.name for p in out.iterdir()) == [
        *("README.md", "classes.json", "config.json", "weights.safetensors")
    ]
    text = (out / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: csc_jax\n")
    assert "| val | whole | 6 | 50.0% |" in text
    assert "| 0 | sky | 25.0% |" in text
    assert "| seed | 0 |" in text
    assert f"| step | {STEP} |" in text
    assert "\n# license:" in text  # a comment: the owner's to choose
    assert str(run) not in text
    assert [p.name for p in out.parent.iterdir()] == ["bundle"]
    with pytest.raises(UserError, match="is there already"):
        export(run, out, "bundle")


def test_names_are_no_markup_in_the_card():
    assert card.escaped("a|b<script>\n![x](y)") == r"a\|b\<script\>\\n\!\[x\]\(y\)"


def test_what_differs_from_the_run_is_not_kept(run, tmp_path, monkeypatch):
    read = export_lib.load

    def other(path, **options):
        found = read(path, **options)
        return types.SimpleNamespace(probabilities=lambda x: found.probabilities(x) + 0.01)

    monkeypatch.setattr(export_lib, "load", other)
    with pytest.raises(UserError, match=r"differs from the run by 0\.01 in a probability"):
        export(run, tmp_path / "w.safetensors", "safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"file_format": "pickle"}, "takes one of stablehlo, safetensors"),
        ({"file_format": "onnx"}, r"must end in \.onnx"),
        ({"file_format": "bundle", "size": (3, 3)}, "--size goes with"),
        ({"file_format": "safetensors", "push": "hf:a/b"}, r"must end in \.safetensors"),
        ({"file_format": "bundle", "push": "a/b"}, "it takes hf:OWNER/REPO"),
        ({"file_format": "bundle", "push": "hf:a/../b"}, "it takes hf:OWNER/REPO"),
    ],
)
def test_what_cannot_be_exported_is_said_first(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        export_lib.check(out=tmp_path / "out.bin", **options)


def test_the_command_exports(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "net.safetensors"
    arguments = [f"--workdir={run}", "--mode=export", "--format=safetensors", f"--out={out}"]
    with flagsaver.flagsaver():
        assert main.main(["csc-jax", *arguments]) == 0
    assert "read again" in capsys.readouterr().out
    assert csc_jax.load(out).description.step == STEP
    with flagsaver.flagsaver():
        assert main.main(["csc-jax", *arguments[:-1], "--out=x.safetensors", "--size=3"]) == 2
    assert "--size is '3'; it takes height and width" in capsys.readouterr().err


class Api:
    """The part of huggingface_hub's interface that is called."""

    def __init__(self, folder, error=None):
        self.folder, self.error, self.calls = folder, error, []

    def HfApi(self):
        return self

    def create_repo(self, name, *, private, exist_ok):
        self.calls.append(("create", name, private, exist_ok))
        return f"https://hub/{name}"

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        if self.error:
            raise self.error
        self.calls.append(("upload", repo_id, folder_path, sorted(allow_patterns)))

    def snapshot_download(self, name, *, allow_patterns):
        if self.error:
            raise self.error
        self.calls.append(("download", name, sorted(allow_patterns)))
        return str(self.folder)


FILES = ["README.md", "classes.json", "config.json", "weights.safetensors"]


def test_a_bundle_goes_to_the_hub_and_comes_from_there(run, model, tmp_path, monkeypatch, caplog):
    out = tmp_path / "bundle"
    api = Api(out)
    monkeypatch.setitem(sys.modules, "huggingface_hub", api)
    with caplog.at_level(logging.INFO, "csc_jax"):
        export(run, out, "bundle", push="hf:me/net.1")
    assert api.calls == [
        ("create", "me/net.1", True, True),
        ("upload", "me/net.1", str(out), FILES),
    ]
    assert "published: https://hub/me/net.1" in caplog.text
    loaded = csc_jax.load("hf:me/net.1")
    assert api.calls[-1] == ("download", "me/net.1", FILES)
    image = picture(30, 20)
    np.testing.assert_array_equal(loaded.predict(image).classes, model.predict(image).classes)


def test_no_token_is_shown(tmp_path, monkeypatch):
    error = ConnectionError("Bearer hf_SecretSecret refused\nAuthorization: hf_Other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", Api(tmp_path, error))
    for act in (lambda: hub.push(tmp_path, "hf:a/b"), lambda: csc_jax.load("hf:a/b")):
        with pytest.raises(UserError, match="ConnectionError: Bearer … refused") as caught:
            act()
        assert "Secret" not in str(caught.value)
        assert "Other" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        csc_jax.load("hf:a/b")


def test_onnx_agrees_in_its_own_runtime(run, model, tmp_path):
    # Not of `make parity`: pip cannot install it beside this package's Orbax (docs/deploy.md).
    pytest.importorskip("jax2onnx", reason="jax2onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    out = export(run, tmp_path / "net.onnx", "onnx", size=(24, 40))
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    image = picture(24, 40)
    classes, probabilities = session.run(["classes", "probabilities"], {"images": image[None]})
    expected = model.predict(image, probabilities=True)
    np.testing.assert_allclose(probabilities[0], expected.probabilities, atol=1e-4)
    assert (classes[0] != expected.classes).mean() < 0.01
    header = json.loads(session.get_modelmeta().custom_metadata_map["csc_jax"])
    assert header["classes"][0]["name"] == model.class_names[0]
    with pytest.raises(UserError, match=r"Run an \.onnx with onnxruntime"):
        csc_jax.load(out)


def test_extras_that_are_missing_are_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    monkeypatch.delitem(sys.modules, "jax._src.export.serialization", raising=False)
    with pytest.raises(UserError, match=r"csc-jax\[onnx\]"):
        export(run, tmp_path / "net.onnx", "onnx")
    with pytest.raises(UserError, match=r"csc-jax\[export\]"):
        export(run, tmp_path / "net.stablehlo", "stablehlo")
    assert not list(tmp_path.iterdir())


def test_a_network_that_needs_its_size_has_one(model, tmp_path, monkeypatch):
    sizes = []

    def exported(description, arrays, size):
        sizes.append(size)
        if size is None:
            raise TypeError("a size is not known")
        return types.SimpleNamespace(serialize=lambda: b"")

    monkeypatch.setattr(program, "_export", exported)
    found = program.write(tmp_path / "a", model.description, model.arrays, None)
    assert sizes == [None, (32, 32)]
    assert found == (32, 32)


@needs_flatbuffers
def test_a_transformer_is_exported_at_its_size(tmp_path):
    """Of 29 x 43 px it sees 32 x 40: whole patches of 8 px."""
    folder = tmp_path / "run"
    folder.mkdir()
    options = {"model__backbone": "vit_tiny", "data__crop_size": (24, 40)}
    save_run(folder, method__name="supervised", eval__network="student", **options)
    out = export(folder, tmp_path / "net.stablehlo", "stablehlo", size=(29, 43))
    image = picture(29, 43)
    expected = csc_jax.load(folder).predict(image, probabilities=True)
    found = csc_jax.load(out).predict(image, probabilities=True)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-4)
    other = export(folder, tmp_path / "other.stablehlo", "stablehlo")
    with zipfile.ZipFile(other) as archive:
        assert json.loads(archive.read("header.json"))["program"]["size"] == [24, 40]
