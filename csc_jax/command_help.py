"""What `csc-jax` says about itself. Nothing here imports JAX, so that the answer comes at once."""

import inspect
import platform
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

from absl import flags as absl_flags
from ml_collections import ConfigDict

import csc_jax
from csc_jax import commands
from csc_jax import config as config_lib
from csc_jax.config import files as config_files

EXAMPLES = {  # of each mode
    "train": "--config=synthetic --workdir=W",
    "evaluate": "--workdir=W --checkpoint=best",
    "report": "--workdir=W --compare=W2,W3",
    "predict": "--workdir=W --images=DIR --out=DIR",
    "label": "--workdir=W",
    "export": "--workdir=W --format=bundle --out=DIR",
    "plan": "--config=cityscapes --topology=v5e:4x4",
}
_ABOUT = {
    "train": "Trains a network, or continues a training that was stopped.",
    "evaluate": "Scores a checkpoint, and draws the worst and the best images.",
    "report": "Writes report.html: the whole run on one page, beside other runs.",
    "predict": "Segments images, TIFFs larger than memory, or a video.",
    "label": "Ranks unlabelled images by the use of a label, and writes masks to correct.",
    "export": "Writes the network to a file or folder, and compares it with the run.",
    "plan": "Compiles a training step for hardware that is not there.",
}

# A field of `default_config` with its value, over several lines where that is long.
_FIELD = re.compile(
    r"^    c\.([\w.]+) = (.*?)(?=^    c\.|^    return|^\n)", re.DOTALL | re.MULTILINE
)


def asked(argv: Sequence[str]) -> str:
    """Returns what a command line asks for: help, helpfull, version, completion; "" if nothing."""
    questions = {"h": "help"} | {q: q for q in ("help", "helpfull", "version", "completion")}
    words = (argument.lstrip("-") for argument in argv[1:] if argument.startswith("-"))
    return next((questions[word] for word in words if word in questions), "")


def screen() -> str:
    """Returns the help that fits a terminal of 80 columns and 24 lines."""
    examples = "\n".join(f"  csc-jax {mode} {flags}" for mode, flags in EXAMPLES.items())
    more = _filled("More: " + ", ".join(commands.NAMES), indent="  ")
    configs = _filled("  " + ", ".join(config_files.names()), indent="  ")
    return f"""\
csc-jax trains, evaluates and runs segmentation networks that learn from few
labelled and many unlabelled images. `csc-jax demo` shows it in five minutes.

{examples}
{more}
`csc-jax COMMAND --help` describes one. A train that was stopped continues.

--config takes a file, or a name (files in {config_files.folder()}):
{configs}
--config.SECTION.FIELD=VALUE overrides a field, for example
  --config.data.root=DIR --config.method.name=unimatch --config.train.steps=500
--helpfull lists every flag, and every field with its value, meaning and source.
--version prints versions, --completion what completes these words in bash."""


def of_mode(mode: str, flags: Iterable[absl_flags.Flag], required: Mapping[str, str]) -> str:
    """Returns the help of one mode.

    Args:
      mode: of EXAMPLES.
      flags: of the command; the help of one says first which modes it is for, `predict, export: …`.
      required: flag -> what to give, of those that the mode cannot do without.
    """
    lines = [_ABOUT[mode], "", f"  csc-jax {mode} {EXAMPLES[mode]}", ""]
    needs_config = mode == "train"
    config = "a file, or a name of those that `csc-jax --help` lists"
    lines += _row("--config=", config if needs_config else f"{config}; by default the run's own")
    for flag in flags:
        meaning = required.get(flag.name) or _about_mode(flag, mode)
        if meaning:
            lines += _row(f"--{flag.name}{'' if flag.boolean else '='}", meaning)
    must = ", ".join(f"--{name}" for name in (*(("config",) if needs_config else ()), *required))
    return "\n".join(
        [
            *lines,
            "",
            f"Required: {must}.",
            "--config.SECTION.FIELD=VALUE overrides a field. `csc-jax --helpfull` lists all",
            "fields, and the flags for several processes.",
        ]
    )


def _row(flag: str, meaning: str) -> list[str]:
    return textwrap.wrap(meaning, 79, initial_indent=f"  {flag:<20}", subsequent_indent=" " * 22)


def _filled(text: str, indent: str) -> str:
    return textwrap.fill(text, 79, subsequent_indent=indent, break_on_hyphens=False)


def _about_mode(flag: absl_flags.Flag, mode: str) -> str:
    """Returns the part of a flag's help that is about a mode; "" if there is none."""
    for modes, meaning in _parts(flag):
        if mode in modes:
            values = getattr(flag.parser, "enum_values", None)
            which = f" ({' or '.join(values)})" if values else ""
            default = f" (default: {flag.default})" if flag.default else ""
            return f"{meaning.rstrip('.')}{which}{default}"
    return ""


def modes_of(flag: absl_flags.Flag, modes: Iterable[str]) -> list[str]:
    """Returns those of `modes` that a flag is for, as its help says; [] if it says nothing."""
    own = [mode for of, _ in _parts(flag) for mode in of]
    return [mode for mode in modes if mode in own]


def _parts(flag: absl_flags.Flag) -> list[tuple[list[str], str]]:
    """Returns (modes, meaning) of each part of a flag's help, `predict, export: …; plan: …`."""
    text = re.sub(r"^<.*?>: ", "", str(flag.help))  # absl puts choices there
    split = (part.partition(": ") for part in text.split("; "))
    return [(modes.split(", "), meaning) for modes, _, meaning in split]


def everything(flags: str, config: ConfigDict) -> str:
    """Returns the list for --helpfull.

    Args:
      flags: those of the command, described.
      config: whose values are shown.
    """
    values = config_lib.flatten(config)
    lines = []
    for name, meaning in _meanings().items():
        if name in values:
            lines += [f"  --config.{name}={_as_typed(values[name])}", f"      {meaning}"]
        elif meaning:  # of a section
            lines += ["", f"  {name}: {meaning}"]
    fields = "\n".join(lines)
    return f"{screen()}\n\nFlags:\n{flags}\n\nFields, with the values of this config:\n{fields}"


def versions() -> str:
    """Returns one line for --version."""
    jax, python = metadata.version("jax"), platform.python_version()
    return f"csc_jax {csc_jax.__version__}, jax {jax}, Python {python}"


def _meanings() -> dict[str, str]:
    """Returns the comment beside each field and section in the source of `default_config`."""
    source = inspect.getsource(config_lib.default_config)
    return {
        name: " ".join(re.findall(r"  # (.*)", value)) for name, value in _FIELD.findall(source)
    }


def _as_typed(value: Any) -> str:
    """Returns a value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "()"
    return str(value)
