"""Semi-supervised semantic segmentation by consistency and separation of pixel features (CSC).

The package trains, evaluates and runs segmentation networks from few labelled and many
unlabelled images. `csc_jax.main` is the command line; `csc_jax.contrast` holds the paper's own
contribution and needs nothing but JAX. `csc_jax.load` gives a trained network to use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from csc_jax.deploy import load

__all__ = ["load"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    # On first use: `import csc_jax` takes no second for JAX.
    if name == "load":
        from csc_jax.deploy import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
