"""Semi-supervised semantic segmentation by consistency and separation of pixel features (CSC).

The package trains, evaluates and runs segmentation networks from few labelled and many
unlabelled images. `csc_jax.main` is the command line; `csc_jax.contrast` holds the paper's own
contribution and needs nothing but JAX.
"""

__version__ = "0.2.0"
