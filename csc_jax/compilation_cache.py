"""Where compiled programs are kept between runs."""

import logging
import os

import jax

from csc_jax import paths
from csc_jax.errors import UserError


def use() -> None:
    """Keeps compiled programs between runs, unless the environment names another place.

    JAX has XLA keep there as well, fusion by fusion, which kernels were the fastest on a GPU, so
    that a changed program tries those anew alone that it has changed.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        cache = paths.given("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    except UserError as error:  # no reason not to run
        logging.getLogger("csc_jax").info("Compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(cache / "csc_jax" / "xla"))
