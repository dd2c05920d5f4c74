"""What `csc-jax` says about itself. Nothing here imports JAX, so that the answer comes at once."""

import inspect
import platform
import re
import textwrap
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from ml_collections import ConfigDict

import csc_jax
from csc_jax import config as config_lib
from csc_jax.config import files as config_files

EXAMPLES = {  # of each --mode
    "train": "--config=synthetic --workdir=W",
    "evaluate": "--mode=evaluate --workdir=W --checkpoint=best",
    "report": "--mode=report --workdir=W --compare=W2,W3",
    "predict": "--mode=predict --workdir=W --images=DIR --out=DIR",
    "export": "--mode=export --workdir=W --format=bundle --out=DIR",
    "plan": "--mode=plan --config=cityscapes --topology=v5e:4x4",
}

# A field of `default_config` with its value, over several lines where that is long.
_FIELD = re.compile(
    r"^    c\.([\w.]+) = (.*?)(?=^    c\.|^    return|^\n)", re.DOTALL | re.MULTILINE
)


def asked(argv: Sequence[str]) -> str:
    """Returns which of `help`, `helpfull` and `version` a command line asks for; "" if none."""
    questions = {"h": "help", "help": "help", "helpfull": "helpfull", "version": "version"}
    words = (argument.lstrip("-") for argument in argv[1:] if argument.startswith("-"))
    return next((questions[word] for word in words if word in questions), "")


def screen() -> str:
    """Returns the help that fits a terminal of 80 columns and 24 lines."""
    examples = "\n".join(f"  {mode:<10}csc-jax {flags}" for mode, flags in EXAMPLES.items())
    configs = ", ".join(config_files.names())
    return f"""\
csc-jax trains, evaluates and runs segmentation networks that learn from few
labelled and many unlabelled images. `python -m csc_jax.main` is the same.

{examples}
To continue a training that was stopped, give its command again.

--config takes a file, or one of these names:
{textwrap.fill(configs, 78, initial_indent="  ", subsequent_indent="  ")}
  (files in {config_files.folder()})
--config.SECTION.FIELD=VALUE overrides a field, for example
  --config.data.root=DIR --config.method.name=unimatch --config.train.steps=500
  -h, --help    this screen
  --helpfull    every flag, and every field with its value, meaning and source
  --version     versions of csc_jax, jax and Python
Documentation: README.md and docs/ of the repository"""


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
