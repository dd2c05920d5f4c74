"""Writes a checkpoint's network as a PyTorch state dict under the names of the lineage (U2PL).

Command:    python scripts/export_torch.py --workdir=W --out=FILE.safetensors
            [--checkpoint=best] [--network=student]
In PyTorch: model.load_state_dict(safetensors.torch.load_file(FILE))
"""

import argparse
import sys
from pathlib import Path

from safetensors.numpy import save_file

from csc_jax import stored_config
from csc_jax.errors import UserError
from csc_jax.evaluation import score
from csc_jax.models.weights import to_torch_state_dict
from csc_jax.text import printable


def run() -> int:
    """Exports; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="of a training run")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors to write")
    parser.add_argument("--checkpoint", default="latest", help="latest, best or a step")
    parser.add_argument("--network", choices=["teacher", "student"], default="teacher")
    options = parser.parse_args()
    try:
        export(options.workdir, options.out, options.checkpoint, options.network)
    except (UserError, OSError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


def export(workdir: Path, out: Path, checkpoint: str, network: str) -> None:
    """Writes one network of a checkpoint.

    Args:
      workdir: of a run.
      out: the file to write.
      checkpoint: latest | best | a step.
      network: teacher | student.

    Raises:
      UserError: no such checkpoint, or a layer that the lineage has no name for.
    """
    config = stored_config.get_config(str(workdir))
    config.eval.network = network
    _, chosen, _ = score.load(config, workdir, checkpoint)
    save_file(to_torch_state_dict(chosen.variables), out, metadata={"format": "pt"})


if __name__ == "__main__":
    sys.exit(run())
