"""Using a trained network: `load` takes a run, an exported file or a bundle, here or on the Hub.

model = csc_jax.load("runs/camvid")
result = model.predict("street.jpg")
result.classes, result.confidence, result.overlay()
"""

from csc_jax.deploy.load import load
from csc_jax.deploy.model import Model, Result

__all__ = ["Model", "Result", "load"]
