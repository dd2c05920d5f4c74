"""The examples of docs/use_in_your_code.md run as they are printed."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "use_in_your_code.md").read_text()
EXAMPLES = dict(
    zip(("linen", "nnx"), re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), strict=True)
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_trains_and_fills_its_bank(name):
    source = EXAMPLES[name]
    variables: dict = {}
    exec(compile(source, f"use_in_your_code.md ({name})", "exec"), variables)
    metrics, bank = variables["metrics"], variables["bank"]
    assert metrics["ready"] == 1.0
    # After five steps of two images the bank is full, or as full as the gates allowed.
    assert np.all(np.asarray(bank.count) >= 8)
    assert np.isfinite(metrics["loss_c"])
    assert metrics["loss_c"] > 0
    assert metrics["loss"] < np.log(4)  # better than guessing


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_is_short_and_takes_the_contrast_module_alone(name):
    source = EXAMPLES[name]
    code = [line for line in source.splitlines() if line.strip()]
    assert len(code) <= 60
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    ours = {(n.module, a.name) for n in imports for a in n.names if "csc_jax" in str(n.module)}
    assert ours == {("csc_jax", "contrast")}
