"""The notebook runs from its first cell to its last, with few steps and a small network."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

NOTEBOOK = json.loads(
    (Path(__file__).parents[1] / "notebooks" / "own_images.ipynb").read_text(encoding="utf-8")
)
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
FEW = (
    " --config.model.width=4 --config.model.decoder_width=8 --config.model.projection_dim=8"
    " --config.method.name=supervised --config.train.log_every=1"
)


def run(cell: str, variables: dict[str, Any]) -> Any:
    """Runs a cell as Jupyter does; returns what would be shown of its last expression."""

    def shell(command: str) -> None:
        subprocess.run(command.format(**variables), shell=True, check=True)

    source = re.sub(r"^!((?:.*\\\n)*.*)", lambda m: f"shell({m[1]!r})", cell, flags=re.MULTILINE)
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    variables["shell"] = shell
    exec(compile(tree, "own_images.ipynb", "exec"), variables)
    if last is None:
        return None
    shown = eval(compile(ast.Expression(last.value), "own_images.ipynb", "eval"), variables)
    for name in ("_repr_html_", "_repr_png_"):
        if hasattr(shown, name):
            return getattr(shown, name)()
    return shown


def test_no_output_is_kept():
    for cell in NOTEBOOK["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("PATH", os.environ["PATH"])  # which the notebook changes, as the next
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    monkeypatch.setenv("XLA_FLAGS", flags)
    variables: dict[str, Any] = {}
    shown = []
    for cell in CELLS:
        shown.append(run(cell, variables))
        if "STEPS = " in cell:
            variables |= {"STEPS": 2, "CONFIG": variables["CONFIG"] + FEW}
    printed = capfd.readouterr().out
    assert "24 labelled and 120 unlabelled images" in printed
    pages = [each for each in shown if isinstance(each, str)]
    assert len(pages) == 1
    assert pages[0].startswith("<iframe ")
    pictures = [each for each in shown if isinstance(each, bytes)]
    assert len(pictures) == 2  # the panel, and the overlay
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert {path.name for path in (tmp_path / "bundle").iterdir()} >= {"README.md", "config.json"}
    masks = [p for p in (tmp_path / "predictions").rglob("*.png") if "overlay" not in p.name]
    assert len(masks) == 16
    with Image.open(tmp_path / "predictions" / "015.png") as mask:
        np.testing.assert_array_equal(mask, variables["result"].classes)


def test_the_first_cell_installs_a_clone_or_a_wheel(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append(command))
    (tmp_path / "clone" / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "clone" / "notebooks")
    with pytest.raises(FileNotFoundError, match=r"Upload csc_jax-….whl"):
        run(CELLS[0], {})
    (wheel := Path("csc_jax-0.2.0-py3-none-any.whl").resolve()).touch()
    run(CELLS[0], {})
    (tmp_path / "clone" / "csc_jax").mkdir()
    run(CELLS[0], {})
    install = [sys.executable, "-m", "pip", "install", "--quiet"]
    assert calls == [[*install, str(wheel)], [*install, str(tmp_path / "clone")]]
