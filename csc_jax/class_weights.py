"""Weights of the classes in the supervised loss, by `loss.class_weights`.

Rare classes count more with the two rules: n_c pixels of N labelled ones are of class c, and

    inverse_frequency   w_c = N / (K n_c), K the number of classes that occur
    enet                w_c = 1 / ln(1.02 + n_c / N), between 1.4 and 50.5 (Paszke et al. 2016)

A class that no label holds has weight 0. The mean is taken as sum w l / sum w (`losses.py`), so
that a factor common to all weights changes nothing.
"""

import math
from collections.abc import Sequence

from csc_jax.errors import UserError

RULES = ("inverse_frequency", "enet")
NONE = "none"
_BOUNDS = 1e-9, 1e9  # of a weight that is given: float32 then holds sums of weighted losses


def given(text: str) -> tuple[float, ...]:
    """Returns the numbers in a value of `loss.class_weights`; () for "none" and the rules.

    Raises:
      UserError: it is nothing of all that, or a number that is no weight.
    """
    if text == NONE or text in RULES:
        return ()
    try:
        weights = tuple(float(part) for part in text.strip("() ,").split(","))
    except ValueError:
        weights = ()
    low, high = _BOUNDS
    if not any(weights) or not all(weight == 0 or low <= weight <= high for weight in weights):
        raise UserError(
            f"loss.class_weights is {text[:200]!r}; it takes {NONE}, {', '.join(RULES)}, or a "
            f"number for each class, 0 or between {low:g} and {high:g} and not all 0, as in "
            "--config.loss.class_weights=1,2.5,0.7."
        )
    return weights


def class_weights(text: str, num_classes: int, pixels: Sequence[int] = ()) -> tuple[float, ...]:
    """Returns the weight of each class, () where all count alike.

    Args:
      text: `loss.class_weights`.
      num_classes: C.
      pixels: of each class in the labelled images; () where nothing is trained, so that a rule has
        nothing to count and gives ().

    Raises:
      UserError: numbers for more or fewer classes than there are.
    """
    weights = given(text)
    if weights and len(weights) != num_classes:
        raise UserError(
            f"loss.class_weights has {len(weights)} numbers, but the data set has {num_classes} "
            "classes; give one for each, in the order of the class ids."
        )
    if weights or text == NONE or not pixels:
        return weights
    whole, occurring = sum(pixels), sum(count > 0 for count in pixels)
    if text == "enet":
        return tuple(1 / math.log(1.02 + n / whole) if n else 0.0 for n in pixels)
    return tuple(whole / (occurring * n) if n else 0.0 for n in pixels)
