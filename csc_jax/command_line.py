"""Flags of `csc-jax`, and how a command line becomes a config.

The help of a flag begins with the modes that it is for, `predict, export: …`; from there comes what
`csc-jax MODE --help` lists, and which flags another mode refuses. Nothing here imports JAX, which
takes a second, so that help and errors come at once.
"""

import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from csc_jax import command_help, commands, completion, stored_config
from csc_jax import config as config_lib
from csc_jax.config import checks as config_checks
from csc_jax.config import files as config_files
from csc_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A file, or the name of one that comes with csc_jax; any field is overridden by "
    "--config.section.field=value. Without it, every mode but train takes the "
    "config of the run in --workdir.",
)
flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, plots.")
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "report", "predict", "label", "export", "plan"],
    "What to do.",
)
flags.DEFINE_string(
    "checkpoint",
    "latest",
    "evaluate, report, predict, label, export: latest, best (by mIoU on the val split) or a step.",
)
flags.DEFINE_string(
    "save_predictions",
    None,
    "evaluate: folder for a PNG an image: Cityscapes label ids, Pascal VOC palette, or class ids.",
)
flags.DEFINE_list(
    "compare", [], "report: work directories of other runs to show, separated by commas."
)
flags.DEFINE_string("images", None, "predict: an image, a folder of images or a video.")
flags.DEFINE_bool(
    "confidence", False, "predict: write the probability of each pixel's class, an 8-bit PNG."
)
flags.DEFINE_bool(
    "soft", False, "predict: write the probabilities of all classes, an .npz of float16."
)
flags.DEFINE_enum(
    "polygons", None, ["coco", "labelme"], "predict, label: write the masks as polygons."
)
flags.DEFINE_integer(
    "tile", None, "predict: px, sides of the tiles that a TIFF is segmented in.", lower_bound=64
)
flags.DEFINE_string(
    "out",
    None,
    "predict: folder for overlays and index PNGs; label: folder of the ranking and the masks, "
    "WORKDIR/label by default; export: the file, or the folder of a bundle; "
    "plan: JSON file of the plan.",
)
flags.DEFINE_enum(
    "format", None, ["stablehlo", "safetensors", "bundle", "onnx"], "export: what to write."
)
flags.DEFINE_string(
    "size",
    None,
    "export: H,W px of all images, for onnx and stablehlo (none = any, where possible).",
)
flags.DEFINE_string("push", None, "export: publish the bundle as hf:OWNER/REPO.")
flags.DEFINE_string("topology", None, "plan: hardware to compile for, such as v5e:4x4 or h100:8.")
flags.DEFINE_integer(
    "classes", None, "plan: number of classes of a data set of your own.", lower_bound=1
)
flags.DEFINE_integer(
    "unlabeled", None, "plan: number of unlabelled images of such a data set.", lower_bound=1
)
flags.DEFINE_bool("fit", False, "plan: look for the largest batch, compiling a few times.")
flags.DEFINE_string(
    "coordinator",
    None,
    "Several processes started by hand: HOST:PORT of process 0. On Slurm, Kubernetes, Open MPI and "
    "TPU pods leave out --coordinator, --num_processes and --process_id.",
)
flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", lower_bound=0)
flags.DEFINE_integer(
    "initialization_timeout", 300, "Seconds to wait for all processes to start.", lower_bound=1
)
flags.DEFINE_integer(
    "heartbeat_timeout",
    100,
    "Seconds without a sign of life after which a process counts as dead and the others end.",
    lower_bound=2,
)

_RUN = {"workdir": "the folder of the run"}
REQUIRED = {  # flags that a mode cannot do without
    "train": _RUN,
    "evaluate": _RUN,
    "report": _RUN,
    "predict": _RUN
    | {"images": "an image, a folder of images or a video", "out": "the folder to write to"},
    "label": _RUN,
    "export": _RUN
    | {
        "format": "stablehlo, safetensors, bundle or onnx",
        "out": "the file to write, or the folder of a bundle",
    },
    "plan": {"topology": "hardware to compile for, such as v5e:4x4 or h100:8"},
}


def check_required() -> None:
    """Raises UserError for a flag that the mode needs, or for one that is for other modes."""
    for name, what in REQUIRED[MODE.value].items():
        if not flags.FLAGS[name].value:
            raise UserError(f"--{name} is missing: give {what}.")
    for flag in flags.FLAGS.get_flags_for_module(__name__):
        modes = command_help.modes_of(flag, REQUIRED)
        if flag.present and modes and MODE.value not in modes:
            raise UserError(
                f"--{flag.name} goes with --mode={' or '.join(modes)}, not with "
                f"--mode={MODE.value}."
            )


def parse(argv: Sequence[str]) -> ConfigDict:
    """Parses the flags and returns the config that they make, checked.

    Raises:
      UserError: a flag or a field that there is not, with near misses, or a value that cannot be.
    """
    known = config_lib.flatten(config_lib.default_config())
    for argument in argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
        if not name.startswith("config."):
            continue
        field = name.removeprefix("config.").removeprefix("no")
        if field not in known and name.removeprefix("config.") not in known:
            raise UserError(_unknown_field(name.removeprefix("config."), known))
    _check_words(argv, known)
    arguments = _with_config_path(argv)
    try:
        flags.FLAGS(arguments)
        config = CONFIG.value
        # ml-collections keeps a failure to load until a field is read.
        getattr(config, "seed", None)
        if not isinstance(config, ConfigDict) or known.keys() - config_lib.flatten(config).keys():
            raise UserError(
                "--config: get_config returns no whole config. Begin it with "
                "csc_jax.config.default_config(), change fields and return that."
            )
        config_checks.validate(config)
    except flags.Error as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"--config cannot be read. {error}") from error
    except TypeError as error:
        raise UserError(f"A value on the command line has the wrong type: {error}") from error
    return config


def answer(question: str, argv: Sequence[str]) -> str:
    """Returns what help, helpfull, version or completion prints."""
    mine = flags.FLAGS.get_flags_for_module(__name__)
    mode = _given(argv).get("mode")
    if question == "help" and mode in REQUIRED:
        return command_help.of_mode(mode, mine, REQUIRED[mode])
    if question == "help":
        return command_help.screen()
    if question == "version":
        return command_help.versions()
    if question == "completion":
        names = [f"--{flag.name}{'' if flag.boolean else '='}" for flag in mine]
        fields = config_lib.flatten(config_lib.default_config())
        return completion.script(_commands(), names, fields, config_files.names())
    rest = [argument for argument in argv if argument.lstrip("-") != question]
    config = parse(rest) if _gives(rest, "config") else config_lib.default_config()
    described = flags.FLAGS.module_help(sys.modules[__name__]).partition(":\n")[2]
    return command_help.everything(described, config)


def with_mode(argv: Sequence[str]) -> Sequence[str]:
    """Returns the arguments with --mode=NAME for a mode that stands first by its name."""
    name = argv[1]
    if name.startswith("-"):
        return argv
    if name not in REQUIRED:
        near = difflib.get_close_matches(name, _commands(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"{name!r} is no command of csc-jax.{hint} There are {', '.join(_commands())}."
        )
    if _gives(argv, "mode"):
        raise UserError(f"{name} and --mode both say what to do. Leave one of them out.")
    return [argv[0], f"--mode={name}", *argv[2:]]


def _commands() -> list[str]:
    return [*REQUIRED, *commands.NAMES]


def _gives(argv: Sequence[str], flag: str) -> bool:
    return any(argument.lstrip("-").partition("=")[0] == flag for argument in argv)


def _with_config_path(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with the path of the config for its name, or with the stored config."""
    if not _gives(argv, "config"):
        return [argv[0], f"--config={_stored_config(argv)}", *argv[1:]]
    arguments = list(argv)
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag not in ("-config", "--config"):
            continue
        if equals:
            arguments[i] = f"{flag}={config_files.find(value)}"
        elif i + 1 < len(argv):
            arguments[i + 1] = config_files.find(argv[i + 1])
    return arguments


def _given(argv: Sequence[str]) -> dict[str, str]:
    """Returns flag -> value of those that are given as --flag=value or --flag value."""
    return {name: value for name, value in _words(argv) if name}


def _words(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields (flag, value), and ("", word) for a word that is the value of no flag."""
    known = config_lib.flatten(config_lib.default_config())
    takes_value = {f"config.{name}" for name, value in known.items() if not isinstance(value, bool)}
    takes_value |= {name for name in flags.FLAGS if not flags.FLAGS[name].boolean}
    words = iter(argv[1:])
    for word in words:
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-"):
            yield "", word
        else:
            yield name, next(words, "") if not equals and name in takes_value else value


def _check_words(argv: Sequence[str], fields: Mapping[str, object]) -> None:
    """Raises UserError for a flag that there is not, and for a word that is no flag's value."""
    words = list(_words(argv))
    names = [name for name, _ in words]
    early = names[: names.index("config")] if "config" in names else []
    if field := next((name for name in early if name.startswith("config.")), ""):
        raise UserError(f"--{field} changes a field of the config, and so comes after --config=….")
    for name, word in words:
        if not name and word in _commands():
            raise UserError(f"The command comes first, and once: csc-jax {word} --config=…")
        if not name and word:
            raise UserError(f"{word!r} is no flag; fields are set as --config.section.field=value.")
        flag = name if name in flags.FLAGS else name.removeprefix("no")
        if name and flag not in flags.FLAGS and not name.startswith("config."):
            own = [f.name for f in flags.FLAGS.get_flags_for_module(__name__)]
            near = difflib.get_close_matches(name, own, n=1, cutoff=0.75)
            near += [f"config.{field}" for field in _near_fields(name, fields)]
            hint = f" Did you mean {' or '.join(f'--{each}' for each in near[:3])}?" if near else ""
            raise UserError(f"There is no flag --{name}.{hint} --helpfull lists the flags.")


def _stored_config(argv: Sequence[str]) -> str:
    """Returns the config file that stands in for a missing --config."""
    given = _given(argv)
    mode = given.get("mode", "train")
    if mode == "train" or (mode == "plan" and not given.get("workdir")):
        raise UserError(
            "--config is missing: give a file, or one of the names "
            f"{', '.join(config_files.names())}."
        )
    if not given.get("workdir"):
        raise UserError("--workdir is missing: give the folder of the run, as --workdir=DIR.")
    return f"{Path(stored_config.__file__)}:{given['workdir']}"


def _unknown_field(field: str, known: dict[str, object]) -> str:
    sections = {name.rpartition(".")[0] for name in known}
    if field in sections:
        inside = ", ".join(name for name in known if name.startswith(field + "."))
        return f"--config.{field} is a section, not a field; it holds {inside}."
    near = _near_fields(field, known)
    hint = f" Did you mean {' or '.join('--config.' + name for name in near[:3])}?" if near else ""
    return f"--config.{field} is not a field of the config.{hint} --helpfull lists them all."


def _near_fields(field: str, known: Mapping[str, object]) -> list[str]:
    """Returns fields of a like name, or of this name where the section is wrong or missing."""
    last = field.rpartition(".")[2]
    near = difflib.get_close_matches(field, known, n=3, cutoff=0.75)
    return near + [name for name in known if name.rpartition(".")[2] == last and name not in near]
