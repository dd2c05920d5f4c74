"""What somebody types first: help, versions, configs by name."""

import itertools
import os
import re
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

import csc_jax
from csc_jax import command_help, main
from csc_jax import config as config_lib
from csc_jax.config import files as config_files
from csc_jax.errors import UserError

ROOT = Path(__file__).parents[1]
SCRIPTS = [p for p in sorted((ROOT / "scripts").glob("*.py")) if "__main__" in p.read_text()]


def run(*arguments: str) -> int:
    with flagsaver.flagsaver():
        return main.main(["csc-jax", *arguments])


def test_help_fits_a_screen_and_has_each_mode_and_config(capsys):
    for arguments in (["--help"], ["-h"], ["--config=configs/camvid.py", "--help"]):
        assert run(*arguments) == 0
    first, *others = capsys.readouterr().out.split("csc-jax trains")[1:]
    assert others == [first] * 2
    lines = f"csc-jax trains{first}".splitlines()
    assert len(lines) <= 22  # of 24: the command itself and the next prompt
    assert max(len(line) for line in lines if str(ROOT) not in line) <= 80
    for mode in flags.FLAGS["mode"].parser.enum_values:
        assert re.search(rf"^  {mode} +csc-jax --", first, re.MULTILINE), mode
    for path in (ROOT / "configs").glob("*.py"):
        assert re.search(rf"\b{path.stem}\b", first)
    assert str(ROOT / "configs") in first


def test_no_arguments_show_the_help_as_an_error(capsys):
    assert run() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.strip() == command_help.screen()


def test_version_names_what_a_report_needs(capsys):
    assert run("--version") == 0
    python = ".".join(map(str, sys.version_info[:3]))
    assert capsys.readouterr().out.split(", ") == [
        f"csc_jax {csc_jax.__version__}",
        f"jax {metadata.version('jax')}",
        f"Python {python}\n",
    ]


def test_helpfull_has_every_flag_and_every_field_with_its_meaning(capsys):
    assert run("--helpfull") == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("checkpoint", "coordinator", "images", "mode", "out", "workdir"):
        assert any(line.startswith(f"  --{name}: ") for line in lines), name
    fields = {
        line.removeprefix("  --config.").partition("=")[0]: (line.partition("=")[2], meaning)
        for line, meaning in itertools.pairwise(lines)
        if line.startswith("  --config.")
    }
    assert fields.keys() == config_lib.flatten(config_lib.default_config()).keys()
    assert all(meaning.startswith("      ") for _, meaning in fields.values())
    assert fields["data.scale_range"] == (
        "0.5,2.0",
        "      random resize, ratio to the image (decisions.md 22)",
    )
    assert fields["data.image_size"][1].strip() == (
        "(height, width) px every image is resized to first; (0, 0) = own size"
    )


def test_a_config_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = str(ROOT / "configs" / "camvid.py")
    for value in ("camvid", "camvid.py", "configs/camvid", "configs/camvid.py"):
        assert config_files.find(value) == shipped
    assert config_files.find("camvid:text") == f"{shipped}:text"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "camvid.py").touch()
    assert config_files.find("configs/camvid.py") == "configs/camvid.py"  # a file goes first
    assert config_files.find("camvid") == shipped
    (tmp_path / "cityscapes").mkdir()  # such as one with the data
    assert config_files.find("cityscapes") == str(ROOT / "configs" / "cityscapes.py")


@pytest.mark.parametrize("value", ["camvit", "elsewhere/camvid.py", "configs", "", "../camvid"])
def test_an_unknown_config_is_answered_with_the_names(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"neither a file nor the name of a config") as caught:
        config_files.find(value)
    assert f"--config={value} " in str(caught.value)
    assert "camvid, camvid_full, camvid_pretrained, cityscapes, " in str(caught.value)
    assert ("Did you mean --config=camvid?" in str(caught.value)) == ("camvi" in value)


def test_a_config_that_cannot_be_loaded_is_named(tmp_path, capsys):
    path = tmp_path / "own.py"
    path.write_text("open('a file that is not there')")
    assert run(f"--config={path}", "--workdir=x") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --config cannot be read.")
    assert "a file that is not there" in error


def test_answers_come_without_importing_jax(tmp_path):
    """In a process of its own, in another folder; the config's own values and overrides count."""
    calls = [
        ["--help"],
        ["--config=nowhere.py", "--version"],
        ["--config=camvid", "--workdir=x", "--config.train.step=3"],  # a slip: status 2
        ["--config=configs/camvid_pretrained.py", "--config.train.steps=7", "--helpfull"],
    ]
    code = (
        "import sys\n"
        "from csc_jax import main\n"
        f"sys.argv = {['csc-jax', *calls[-1]]!r}\n"
        f"print([main.main(['csc-jax', *call]) for call in {calls!r}])\n"
        "print('jax' in sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-2:] == ["[0, 0, 2, 0]", "False"], done.stderr
    assert "\n  --config.model.backbone=efficientnet_lite0\n" in done.stdout
    assert "\n  --config.train.steps=7\n" in done.stdout


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_says_how_it_is_called(script, option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), option])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert script.name in printed.out
    assert printed.err == ""
