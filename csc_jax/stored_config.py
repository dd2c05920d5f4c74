"""A config file with the values of an existing run: `--config=csc_jax/stored_config.py:WORKDIR`.

`main` passes it where evaluate or predict are called without --config, so that fields of the stored
config can be overridden like those of any other.
"""

import json
from pathlib import Path

from ml_collections import ConfigDict

from csc_jax.config import from_plain
from csc_jax.errors import UserError


def get_config(workdir: str) -> ConfigDict:
    """Returns the config kept in `workdir`.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = Path(workdir) / "config.json"
    try:
        plain = json.loads(path.read_text())
        if not isinstance(plain, dict):
            raise TypeError(f"it holds a {type(plain).__name__}, and no fields")
        return from_plain(plain)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Give the --workdir of a training run, or "
            "--config=FILE."
        ) from error
