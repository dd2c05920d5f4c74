"""Writes a checkpoint's network as a PyTorch state dict under published names.

Command:    csc-jax export-torch --workdir=W --out=FILE.safetensors
                [--checkpoint=best] [--network=student] [--names=transformers]
A DeepLabv3+ gets the names of the lineage (U2PL), a transformer with its head
those of UniMatch V2; --names=meta, transformers or timm writes a transformer
alone.
In PyTorch: model.load_state_dict(safetensors.torch.load_file(FILE))
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from safetensors.numpy import save_file

from csc_jax import stored_config
from csc_jax.evaluation import score
from csc_jax.models.transformer_weights import NAMINGS
from csc_jax.models.weights import to_torch_state_dict
from csc_jax.text import printable


def main(arguments: Sequence[str]) -> int:
    """Exports; returns 0."""
    parser = argparse.ArgumentParser(
        prog="csc-jax export-torch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="of a training run")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors to write")
    parser.add_argument("--checkpoint", default="latest", help="latest, best or a step")
    parser.add_argument("--network", choices=["teacher", "student"], default="teacher")
    parser.add_argument(
        "--names", default="", choices=["", *NAMINGS], help="of a transformer; the whole by default"
    )
    options = parser.parse_args(arguments)
    export(options.workdir, options.out, options.checkpoint, options.network, options.names)
    print(printable(options.out))
    return 0


def export(workdir: Path, out: Path, checkpoint: str, network: str, names: str = "") -> None:
    """Writes one network of a checkpoint.

    Args:
      workdir: of a run.
      out: the file to write.
      checkpoint: latest | best | a step.
      network: teacher | student.
      names: as `to_torch_state_dict` takes them.

    Raises:
      UserError: no such checkpoint, or a layer that there is no name for.
    """
    config = stored_config.get_config(str(workdir))
    config.eval.network = network
    _, chosen, _ = score.load(config, workdir, checkpoint)
    save_file(to_torch_state_dict(chosen.variables, names), out, metadata={"format": "pt"})
