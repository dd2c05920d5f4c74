"""Scores of a network on a split: inference, confusion matrix, mean IoU, files to submit."""

from csc_jax.evaluation.metrics import OnImage, Scores, confusion_matrix, evaluate
from csc_jax.evaluation.predictor import enlarge, enlarge_planes, make_predictor
from csc_jax.evaluation.submission import (
    PredictionWriter,
    check_folder,
    check_outside,
    encode_with_palette,
)

__all__ = [
    "OnImage",
    "PredictionWriter",
    "Scores",
    "check_folder",
    "check_outside",
    "confusion_matrix",
    "encode_with_palette",
    "enlarge",
    "enlarge_planes",
    "evaluate",
    "make_predictor",
]
