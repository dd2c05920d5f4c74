"""Every command that the README, CONTRIBUTING or a page of docs/ prints is one that works.

A command of this project is parsed as it would be, up to the point where its work begins: flags,
fields, values, files, targets of make. Any other stands in NOT_RUN with the reason. So a command
that is neither fails, as does a field that there is not.
"""

import argparse
import functools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from absl.testing import flagsaver

from csc_jax import command_help, command_line, commands, main
from csc_jax import config as config_lib
from csc_jax.commands import demo

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FIELDS = set(config_lib.flatten(config_lib.default_config()))
SECTIONS = {field.rpartition(".")[0] for field in FIELDS}

NOT_RUN = {  # how a line begins -> why nothing here tries it
    "#": "a comment, or a line that Slurm reads",
    "pip install": "installs packages from the network",
    "pip wheel": "builds a wheel; tests/test_packaging.py",
    "uv pip compile": "asks the network for the versions of packages",
    "python -m venv cs": "installs the Cityscapes evaluator; tests/test_official_cityscapes.py",
    "cs/bin/python": "needs that evaluator; tests/test_official_cityscapes.py",
    ".venv/bin/pre-commit": "changes the hooks of the checkout",
    "gcloud": "needs a TPU pod",
}

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
COMMAND = re.compile(r"(\w+=\S+ )*(python3?|make|csc-jax|pip|uv|srun|gcloud|git|\S+/bin/\S+) ")


class Parsed(Exception):
    """A command has been understood; its work would begin now."""


def commands_of(page: str) -> Iterator[str]:
    """Yields the lines of all blocks without language but listings of folders, then inline ones."""
    for language, block in BLOCK.findall(page):
        if language in ("", "bash", "console", "sh") and not block.startswith("DIR/"):
            yield from filter(str.strip, block.replace("\\\n", "").splitlines())
    for span in INLINE.findall(BLOCK.sub("", page)):
        line = " ".join(span.split())
        if COMMAND.match(line) or line.startswith("--config"):
            yield line


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises where a command would not get as far as its work."""
    for field in re.findall(r"--config\.([\w.]*\w)", command):
        assert field in FIELDS | SECTIONS | {"section.field"}, f"--config.{field}"
    for path in re.findall(r"(?<![\w/])(?:configs|docs|scripts|tests)/[\w./-]+\.\w+", command):
        assert (ROOT / path).is_file(), path
    words = shlex.split(command.replace("=…", "=synthetic"), comments=True)
    while words and (re.match(r"\w+=", words[0]) or words[0] == "srun"):
        del words[0]
    partial = "…" in words
    words = [word for word in words if word != "…"]
    match words:
        case ["csc-jax", name] if name in (*command_help.EXAMPLES, *commands.NAMES):
            pass  # the name of a command
        case ["csc-jax", name, *arguments] if name in commands.NAMES:
            monkeypatch.setattr(sys, "argv", ["csc-jax", name, *arguments])
            parse_command(lambda: main.main(sys.argv), monkeypatch)
        case ["python", "-m", "csc_jax.main", *arguments] | ["csc-jax", *arguments]:
            parse_main(arguments, partial, monkeypatch)
        case ["python", script, *arguments] if script.startswith("scripts/"):
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            run = functools.partial(runpy.run_path, str(ROOT / script), run_name="__main__")
            parse_command(run, monkeypatch)
        case ["make", *arguments]:
            # With a PYTHON it need not try the interpreters of this machine one by one.
            environment = {**os.environ, "PYTHON": sys.executable}
            dry = ["make", "-n", *arguments]
            subprocess.run(dry, cwd=ROOT, env=environment, check=True, capture_output=True)
        case [option, *_] if option.startswith("--config"):
            pass  # a part of a command, whose fields there are
        case _:
            line = shlex.join(words)
            assert any(command.startswith(begin) or line.startswith(begin) for begin in NOT_RUN)


def parse_main(arguments: Sequence[str], partial: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {argument.partition("=")[0] for argument in arguments}
    argv = ["csc-jax", *arguments]
    mode = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    other = "--mode" in given or mode not in ("", "train")
    if "--config" not in given and (partial or other):
        # For that of the run in W, which is not there.
        argv.insert(2 if mode else 1, "--config=synthetic")
    if "--workdir" not in given and partial:
        argv.append("--workdir=W")
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(main, "dispatch", lambda config: None)
    with flagsaver.flagsaver():
        assert main.main(argv) == 0


def parse_command(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_after(parse):
        def parse_and_stop(*values):
            parse(*values)
            raise Parsed

        return parse_and_stop

    for owner, name in ((argparse.ArgumentParser, "parse_args"), (command_line, "parse")):
        monkeypatch.setattr(owner, name, stop_after(getattr(owner, name)))
    with flagsaver.flagsaver(), pytest.raises(Parsed):
        run()


PRINTED = [
    (page.name, line) for page in PAGES for line in dict.fromkeys(commands_of(page.read_text()))
]


@pytest.mark.parametrize(("page", "command"), PRINTED)
def test_printed_commands_work(page, command, monkeypatch):
    check(command, monkeypatch)


@pytest.mark.parametrize("mode", command_help.EXAMPLES)
def test_the_examples_of_help_work(mode, monkeypatch):
    check(f"csc-jax {mode} {command_help.EXAMPLES[mode]}", monkeypatch)


def test_what_the_demo_suggests_works(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    text = demo._next_steps(Path("runs/demo/csc seed 0"))
    suggested = [line for line in text.splitlines() if "csc_jax.main" in line]
    assert len(suggested) == 4
    for line in suggested:
        check(f"python {line[line.index('-m csc_jax') :]}", monkeypatch)
    monkeypatch.chdir(Path(sys.executable).parents[1])  # as in a checkout with its .venv
    assert " bin/python" in demo._next_steps(Path("W"))
    monkeypatch.setattr(shutil, "which", lambda name: str(Path(sys.executable).with_name(name)))
    assert " csc-jax evaluate --workdir=W " in demo._next_steps(Path("W"))


@pytest.mark.parametrize("reason", NOT_RUN)
def test_what_is_not_run_is_still_printed(reason):
    assert any(reason in line for _, line in PRINTED)


@pytest.mark.parametrize(
    "command",
    [
        "csc-jax --config=camvid --workdir=W --config.train.step=3",
        "csc-jax --config=camvid --workdir=W --config.train.steps=many",
        "csc-jax --config=camvid",  # without --workdir
        "csc-jax trian --config=camvid --workdir=W",
        "csc-jax train --workdir=W",  # without --config
        "csc-jax prepare --config=camvit",
        "csc-jax label-all",
        "csc-jax demo --step5=3",
        "csc-jax import-weights --config=camvid --workdir=W",  # without --weights
        "python -m csc_jax.main --config=configs/camvit.py --workdir=W",
        "--config.train.step=3",
        "python scripts/demo.py --step5=3",
        "python scripts/compare.py RUNS.csv",  # without --baseline
        "python scripts/nowhere.py",
        "make demos",
        "make test ARGS=tests/test_nothing.py",
        "git push --force",
    ],
)
def test_a_command_that_does_not_work_is_noticed(command, monkeypatch):
    failures = (AssertionError, SystemExit, subprocess.CalledProcessError, pytest.fail.Exception)
    with pytest.raises(failures):
        check(command, monkeypatch)


def test_commands_are_found_in_blocks_and_in_lines():
    page = """`make
demo` and `--config.train.steps=3` but not `make`, and

```
python -m csc_jax.main --workdir=W \\
    --config=camvid   # comment

other
```

```
DIR/  images/
```

```python
import csc_jax
```
"""
    assert list(commands_of(page)) == [
        "python -m csc_jax.main --workdir=W     --config=camvid   # comment",
        "other",
        "make demo",
        "--config.train.steps=3",
    ]
