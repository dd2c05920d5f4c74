"""Scores of a network on a split: inference, confusion matrix, mean IoU."""

from csc_jax.evaluation.metrics import Scores, confusion_matrix, evaluate
from csc_jax.evaluation.predictor import make_predictor

__all__ = ["Scores", "confusion_matrix", "evaluate", "make_predictor"]
