"""What somebody types first: help, versions, configs by name."""

import contextlib
import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

import csc_jax
from csc_jax import command_help, command_line, commands, main
from csc_jax import config as config_lib
from csc_jax.config import files as config_files
from csc_jax.errors import UserError

ROOT = Path(__file__).parents[1]
MODES = flags.FLAGS["mode"].parser.enum_values
SCRIPTS = [p for p in sorted((ROOT / "scripts").glob("*.py")) if "__main__" in p.read_text()]


def run(*arguments: str) -> int:
    with flagsaver.flagsaver():
        return main.main(["csc-jax", *arguments])


def test_help_fits_a_screen_and_has_each_mode_and_config(capsys):
    for arguments in (["--help"], ["-h"], ["help"], ["--config=configs/camvid.py", "--help"]):
        assert run(*arguments) == 0
    first, *others = capsys.readouterr().out.split("csc-jax trains")[1:]
    assert others == [first] * 3
    lines = f"csc-jax trains{first}".splitlines()
    assert len(lines) <= 22  # of 24: the command itself and the next prompt
    assert max(len(line) for line in lines if str(ROOT) not in line) <= 80
    for mode in MODES:
        assert re.search(rf"^  csc-jax {mode} --", first, re.MULTILINE), mode
    for name in commands.NAMES:
        assert re.search(rf"[ ,]{name}[,\n]", first), name
    for path in (ROOT / "configs").glob("*.py"):
        assert re.search(rf"\b{path.stem}\b", first)
    assert str(ROOT / "configs") in first


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_says_what_it_takes(mode, capsys):
    assert run(mode, "--help") == 0
    printed = capsys.readouterr().out
    for arguments in (["-h", f"--mode={mode}"], ["help", mode]):
        assert run(*arguments) == 0
        assert capsys.readouterr().out == printed
    lines = printed.splitlines()
    assert len(lines) <= 22
    assert max(map(len, lines)) <= 80
    assert f"  csc-jax {mode} {command_help.EXAMPLES[mode]}" in lines
    listed = re.findall(r"^  --(\w+)(=?) +\w", printed, re.MULTILINE)
    assert ("config", "=") in listed
    for flag in flags.FLAGS.get_flags_for_module(command_line.__name__):
        said = re.search(rf"\b{mode}\b[\w, ]*: ", flag.help)
        if said or flag.name in command_line.REQUIRED[mode]:
            assert (flag.name, "" if flag.boolean else "=") in listed
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("name", commands.NAMES)
def test_a_command_says_what_it_takes(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.suppress(SystemExit):  # argparse
        run(name, "--help")
    printed = capsys.readouterr().out
    assert f"Command:    csc-jax {name} " in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_a_mode_by_its_name_is_that_mode(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(main, "dispatch", lambda config: seen.append(command_line.MODE.value))
    required = {name: "v5e:4x4" for needed in command_line.REQUIRED.values() for name in needed}
    required["format"] = "bundle"
    for mode in MODES:
        given = [f"--{name}={required[name]}" for name in command_line.REQUIRED[mode]]
        assert run(mode, "--config=synthetic", *given) == 0
        assert run("--config=synthetic", f"--mode={mode}", *given) == 0
    assert seen == [mode for mode in MODES for _ in range(2)]
    assert run("evaluate", "--config=synthetic", "--mode=train", "--workdir=W") == 2
    assert "evaluate and --mode both say what to do" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["trian"], "'trian' is no command of csc-jax. Did you mean train? There are train, "),
        (["prepare_data", "-h"], "Did you mean prepare?"),
        (["import_weights"], "Did you mean import-weights?"),
        (["x\x1b[2J"], r"'x\x1b[2J' is no command of csc-jax. There are train, evaluate"),
        (["--config=synthetic", "train"], "comes first, and once: csc-jax train --config=…"),
        (["train", "--config=synthetic", "evaluate"], "comes first, and once: csc-jax evaluate"),
        (["train", "train"], "The command comes first, and once: csc-jax train"),
        (["--mode=train", "evaluate"], "The command comes first, and once: csc-jax evaluate"),
        (["train", "--config=synthetic", "more"], "'more' is no flag"),
        (["train", "--confg=folder"], "no flag --confg. Did you mean --config?"),
        (["label", "--workdirr=W"], "no flag --workdirr. Did you mean --workdir?"),
        (["train", "--bands=1"], "no flag --bands. Did you mean --config.data.bands?"),
        (["train", "--data.root=D"], "no flag --data.root. Did you mean --config.data.root?"),
        (["label", "--workdir", "nowhere"], "nowhere/config.json cannot be read"),
        (["--mode", "evaluate", "--workdir", "nowhere"], "nowhere/config.json cannot be read"),
        (["train", "--config.seed=1", "--config=folder"], "comes after --config=…"),
        (
            ["train", "--config=synthetic", "--workdir=W", "--out=x"],
            "--out goes with --mode=predict",
        ),
        (
            ["label", "--config=synthetic", "--workdir=W", "--images=x"],
            "--images goes with --mode=",
        ),
        (
            ["reproduce", "--config=folder", "--rows=csc", "--seeds=0"],
            "argument --seeds: '0' is no number",
        ),
        (["demo", "--seeds=-1"], "argument --seeds: '-1' is no number"),
        (["demo", "--methods", "nix"], "argument --methods: invalid choice: 'nix'"),
        (["prepare", "--config=synthetic", "--config.seed=x"], "--config.seed=x: "),
        (["import-weights", "--weights=W", "--workdir=W"], "--config is missing"),
        (["export-torch", "--workdir=nowhere", "--out=x"], "nowhere"),
    ],
)
def test_a_slip_in_a_command_is_explained(arguments, answer, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["csc-jax", *arguments])  # where ml-collections finds fields
    if answer.startswith("argument "):  # argparse
        with pytest.raises(SystemExit, match="2"):
            run(*arguments)
    else:
        assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(("error: ", "usage: csc-jax "))
    assert answer in error


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (b"\x89PNG\0", "it is not Python"),
        (b"root:x:0\n", r"it is not Python \(invalid syntax, line 1\)"),
        (b"(" * 10_000, "it is not Python"),
        (b"config = 1\n", "it has no function get_config"),
    ],
)
@pytest.mark.parametrize("command", [["train", "--workdir=W"], ["reproduce", "--rows=csc"]])
def test_a_file_that_is_no_config_is_explained(content, answer, command, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_bytes(content)
    assert run(*command, f"--config={file}") == 2
    assert re.search(f"^error: --config={file} is no config: {answer}", capsys.readouterr().err)


@pytest.mark.parametrize("value", ["None", "3", "ConfigDict({'seed': 1})"])
def test_a_config_that_is_not_whole_is_explained(value, tmp_path, capsys):
    file = tmp_path / "own.py"
    file.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return {value}\n"
    )
    assert run("train", f"--config={file}", "--workdir=W") == 2
    assert "get_config returns no whole config" in capsys.readouterr().err


def completed(script: str, line: str) -> list[str]:
    """What bash offers at the end of a line; it takes "=" for a word of its own."""
    words = [word for word in re.split(r" |(=)", line) if word is not None]
    if words[-2] == "=" and not words[-1]:
        words.pop()
    code = (
        f"{script}\ncompopt() {{ :; }}\nCOMP_LINE={shlex.quote(line)} COMP_POINT={len(line)}\n"
        f"COMP_CWORD={len(words) - 1}\n_csc_jax csc-jax {shlex.quote(words[-1])}\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_bash_completes_commands_flags_fields_and_configs(capsys):
    assert run("--completion") == 0
    script = capsys.readouterr().out
    assert completed(script, "csc-jax re") == ["report", "reproduce"]
    assert set(completed(script, "csc-jax ")) == {*MODES, *commands.NAMES}
    assert completed(script, "csc-jax predict --so") == ["--soft"]
    assert completed(script, "csc-jax train --workd") == ["--workdir="]
    assert completed(script, "csc-jax train --config.train.st") == ["--config.train.steps="]
    assert "camvid" in completed(script, "csc-jax train --config=")
    assert completed(script, "csc-jax train --config=camvid_p") == ["camvid_pretrained"]
    assert completed(script, "csc-jax train --workdir=re") == []  # a file
    assert completed(script, "csc-jax compare re") == []


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
    (tmp_path / "configs" / "camvid.py").write_text("def get_config(): ...")
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
    path.write_text("def get_config(): ...\nopen('a file that is not there')")
    assert run(f"--config={path}", "--workdir=x") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --config cannot be read.")
    assert "a file that is not there" in error


def test_answers_come_without_importing_jax(tmp_path):
    """In a process of its own, in another folder; the config's own values and overrides count."""
    calls = [
        ["--help"],
        ["train", "--help"],
        ["prepare", "--help"],
        ["--completion"],
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
    assert done.stdout.splitlines()[-2:] == ["[0, 0, 0, 0, 0, 2, 0]", "False"], done.stderr
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
    assert re.search(rf"{script.name}|Command: +csc-jax ", printed.out)
    assert printed.err == ""
