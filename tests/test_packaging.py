"""pyproject.toml, pins, sources and tests name the same packages; the wheel is whole."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from hatchling.build import build_wheel
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import csc_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements(lines: Iterable[str]) -> list[Requirement]:
    return [Requirement(line) for line in lines if not line.startswith("#")]


PINS = requirements((ROOT / "requirements.txt").read_text().splitlines())
PARITY_PINS = requirements((ROOT / "requirements-parity.txt").read_text().splitlines())
DOCS_PINS = requirements((ROOT / "requirements-docs.txt").read_text().splitlines())
RANGES = [(wanted, PINS) for wanted in requirements(PROJECT["dependencies"] + EXTRAS["dev"])]
RANGES += [(wanted, PARITY_PINS) for wanted in requirements(EXTRAS["parity"])]
RANGES += [(wanted, DOCS_PINS) for wanted in requirements(EXTRAS["docs"])]


def pinned_version(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    assert specifier.operator == "=="
    return specifier.version


@pytest.mark.parametrize(("wanted", "pins"), RANGES, ids=lambda value: getattr(value, "name", ""))
def test_pins_lie_in_the_declared_ranges(wanted, pins):
    name = canonicalize_name(wanted.name)
    versions = [pinned_version(pin) for pin in pins if canonicalize_name(pin.name) == name]
    assert versions
    assert all(version in wanted.specifier for version in versions)


def test_exactly_one_pin_applies_here_and_is_installed():
    here = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate()]
    names = [canonicalize_name(pin.name) for pin in here]
    assert len(names) == len(set(names))
    for pin in here:
        assert metadata.version(pin.name) == pinned_version(pin)


def test_every_imported_package_is_declared():
    """But jax2onnx, which asks for an older Orbax than this package does (docs/deploy.md)."""
    provided_by = metadata.packages_distributions()
    ranges = [PROJECT["dependencies"], *EXTRAS.values()]
    declared = {canonicalize_name(Requirement(text).name) for texts in ranges for text in texts}
    for path in (ROOT / "csc_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            else:
                continue
            for top in {module.partition(".")[0] for module in modules}:
                if top in ("csc_jax", "jax2onnx") or top in sys.stdlib_module_names:
                    continue
                providers = {canonicalize_name(name) for name in provided_by.get(top, [top])}
                assert providers & declared, f"{path} imports {top}"


def test_make_parity_runs_what_is_skipped_without_a_package():
    for path in (ROOT / "tests").glob("test_*.py"):
        text = path.read_text()
        # What the extras `plan` and `gpu` bring is tested where they are.
        found = r"find_spec\(.(?!libtpu|jax_plugins)\w+.\) is None"
        if re.search(rf"importorskip\(|load_torchvision\(|{found}", text):
            assert "mark.parity" in text, path.name


def test_version_has_one_source():
    assert metadata.version("csc-jax") == csc_jax.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", csc_jax.__version__)


def test_the_wheel_finds_its_configs_by_name_wherever_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    wheel = build_wheel(str(tmp_path))
    with zipfile.ZipFile(tmp_path / wheel) as archive:
        archive.extractall(tmp_path / "site")  # all that an installation does, but for its scripts
    shipped = tmp_path / "site" / "csc_jax" / "configs"
    sources = sorted((ROOT / "configs").glob("*.py"))
    assert [path.name for path in sorted(shipped.iterdir())] == [path.name for path in sources]
    assert (tmp_path / "site" / "csc_jax" / "reporting" / "templates" / "report.css").is_file()
    (tmp_path / "elsewhere").mkdir()

    def call(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path / "elsewhere",
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    # A file that loads another.
    listed = call("-m", "csc_jax.main", "--config=camvid_pretrained", "--helpfull")
    assert f"(files in {shipped})" in listed
    assert "\n  --config.model.backbone=efficientnet_lite0\n" in listed
    assert "\n  --config.data.image_size=144,192\n" in listed  # camvid.py's
    code = "from csc_jax.commands import demo, run; print(demo._config().data.name); "
    arguments = ["--config=synthetic", "--rows=csc", "--dry_run"]
    printed = call("-c", f"{code}assert run('reproduce', {arguments}) == 0")
    assert printed.startswith("synthetic\n")
    assert "$ python -m csc_jax.main --config=synthetic --workdir=" in printed
    assert (tmp_path / "elsewhere" / "runs" / "tables" / "synthetic" / "comparison.csv").is_file()
