"""The examples of docs/ run as they are printed."""

import ast
import csv
import itertools
import re
import runpy
from pathlib import Path

import draw_method
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contrast_cases import random_bank
from tiny import CLASSES, Harness, tiny_config
from toy_network import toy_method

from csc_jax import config as config_lib
from csc_jax import contrast, methods
from csc_jax.training import experiment

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "use_in_your_code.md").read_text()
*WHOLE, HALVES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
EXAMPLES = dict(zip(("linen", "nnx"), WHOLE, strict=True))


def test_the_figure_of_the_method_is_what_its_script_draws(tmp_path):
    draw_method.main([f"--out={tmp_path / 'method.svg'}"])
    drawn = (tmp_path / "method.svg").read_bytes()
    assert drawn == (DOCS / "images" / "method.svg").read_bytes()


def test_every_cited_decision_is_there():
    anchors = set(re.findall(r'<a id="(\w+)"></a>', (DOCS / "decisions.md").read_text()))
    root = DOCS.parent
    files = [root / "README.md", *DOCS.glob("*.md")]
    files += [
        p for d in ("csc_jax", "configs", "scripts", "tests") for p in (root / d).rglob("*.py")
    ]
    number, cited = r"\d+[a-c]?", set()
    for file in files:
        # A line break, with what marks a comment, may stand between any two words.
        text = re.sub(r"\s*\n[\s#>|]*", " ", file.read_text())
        for numbers in re.findall(rf"decisions\.md ({number}(?:(?:, | and | to ){number})*)", text):
            cited |= {(file.name, each) for each in re.findall(number, numbers)}
        cited |= {(file.name, each) for each in re.findall(r"decisions\.md#([\w-]+)", text)}
    assert len(cited) > 60
    assert {each for each in cited if each[1] not in anchors} == set()


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_tables_by_seed_hold_what_the_runs_came_to(page):
    with (DOCS / "results" / "camvid_pretrained_runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    lines = iter((DOCS.parent / page).read_text().splitlines())
    header = next(line for line in lines if re.match(r"\| mIoU %, 1/8, seed \| 0 \|", line))
    seeds = [cell.strip() for cell in header.split("|")[2:] if cell.strip().isdigit()]
    next(lines)
    rows = []
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines):
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows.append(row := name.split(",")[0])
        if "less" in row:
            continue
        found = [float(r["miou"]) for r in runs if (r["row"], r["partition"]) == (row, "1/8")]
        assert len(found) == len(seeds) >= 8
        np.testing.assert_allclose([float(c) for c in cells[:-1]], found, atol=0.0551)
        mean, spread = map(float, cells[-1].split(" ± "))
        np.testing.assert_allclose(mean, np.mean(found), atol=0.051)
        np.testing.assert_allclose(spread, np.std(found, ddof=1), atol=0.051)
    assert rows[:3] == ["supervised", "cutmix_mean_teacher", "csc"]


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


def test_the_loss_of_the_halves_is_that_of_the_method():
    variables = {"contrast": contrast}
    exec(compile(HALVES, "use_in_your_code.md (halves)", "exec"), variables)
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(3, CLASSES, 2, 6)), jnp.float32)
    valid = jnp.asarray(rng.random((3, CLASSES, 2)) < 0.7)
    bank = random_bank(1, [4, 2, 5, 3], 5, 6)
    ids = jnp.broadcast_to(jnp.arange(CLASSES)[:, None], valid.shape)
    loss = variables["sum_of_halves"](
        contrast.normalize(features).reshape(3, -1, 6),
        ids.reshape(3, -1),
        valid.reshape(3, -1),
        1,
        bank,
    )
    method, state = toy_method(method__name="csc")
    queries = contrast.Samples(features, ids, valid)
    expected = method._contrastive_loss(state.replace(bank=bank), queries, 1)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_a_method_is_one_file_one_line_and_one_test(tmp_path, monkeypatch):
    page = (DOCS / "add_a_method.md").read_text()
    method, line, test = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([each for each in method.splitlines() if each.strip()]) <= 40
    (tmp_path / "entropy_minimization.py").write_text(method)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    default_config = config_lib.default_config

    def with_the_line():
        c = default_config()
        exec(line, {"c": c})
        return c

    monkeypatch.setattr(config_lib, "default_config", with_the_line)
    variables: dict = {}
    exec(compile(test, "add_a_method.md (test)", "exec"), variables)
    variables["test_entropy_falls"]()
    on_top = Harness(tiny_config(method__name="entropy_minimization", method__contrast="csc"))
    step = on_top.step.func.eval_shape
    state, _ = step(*on_top.step.args, jax.eval_shape(on_top.init), on_top.batch(0))
    assert state.bank is not None


def test_batches_of_the_commands_for_several_gpus_divide_by_them():
    page = (DOCS / "scaling.md").read_text()
    lines = [line for line in page.splitlines() if "--config.batch." in line]
    assert len(lines) >= 4  # one host with 8 GPUs, and two; 4 TPUs; a plan for 4
    for command in lines:
        devices = jax.devices()[: 4 if "4 chips" in command or "v5e:2x2" in command else 8]
        config = runpy.run_path(str(DOCS.parent / "configs" / "cityscapes.py"))["get_config"]()
        for field, value in re.findall(r"--config\.(batch\.\w+)=(\d+)", command):
            config.update_from_flattened_dict({field: int(value)})
        palette = np.zeros((19, 3), np.uint8)
        experiment.build(config_lib.resolve(config, 1), ("road",) * 19, palette, devices)
