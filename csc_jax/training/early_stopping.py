"""When a run ends before its last step: `train.patience`."""

from collections.abc import Sequence

Score = tuple[int, float]  # step, val mIoU in [0, 1]; below 0 where nothing could be scored


def best(history: Sequence[Score]) -> Score:
    """Returns the first of the highest scores."""
    return max(history, key=lambda score: score[1])


def has_ended(history: Sequence[Score], patience: int) -> bool:
    """Whether the last `patience` evaluations brought no higher score than those before them.

    It depends on the scores alone, which a checkpoint keeps, so that a run that was stopped ends
    where it would have ended.

    Args:
      history: of all evaluations so far, in order.
      patience: evaluations; 0 = a run never ends early.
    """
    if not patience or len(history) <= patience:
        return False
    return best(history[-patience:])[1] <= best(history[:-patience])[1]
